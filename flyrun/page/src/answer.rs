//! Requests below [`PREFIX`], and what is answered.

use std::net::IpAddr;

use crate::{Events, PREFIX, Source};

const HTML: &str = include_str!("page.html");
const CSS: &str = include_str!("page.css");
const JS: &str = include_str!("page.js");
const ICON: &str = include_str!("icon.svg");

/// Everything from here, nothing from elsewhere, no markup that runs.
const POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'";

/// What is known of a request.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Such as GET.
    pub method: &'a str,
    /// The path, without the query.
    pub path: &'a str,
    /// The host that the client asks, with its port.
    pub host: Option<&'a str>,
    /// Where it comes from.
    pub peer: IpAddr,
}

/// What is answered.
#[derive(Debug)]
pub enum Answer {
    /// All at once.
    Whole(Whole),
    /// A stream, with the status 200.
    Events(Events),
}

/// An answer with its body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Whole {
    /// Such as 200.
    pub status: u16,
    /// The body's type.
    pub content_type: &'static str,
    /// Where to look instead.
    pub location: Option<String>,
    /// The body; of HEAD too, where it is not to be sent.
    pub body: Vec<u8>,
}

impl Answer {
    /// Its status.
    pub fn status(&self) -> u16 {
        match self {
            Answer::Whole(whole) => whole.status,
            Answer::Events(_) => 200,
        }
    }

    /// Its headers, but for those that tell the body's length.
    pub fn headers(&self) -> Vec<(&'static str, String)> {
        let (content_type, location) = match self {
            Answer::Whole(whole) => (whole.content_type, whole.location.clone()),
            Answer::Events(_) => ("text/event-stream", None),
        };
        let mut headers: Vec<(&'static str, String)> = [
            ("content-type", content_type),
            ("content-security-policy", POLICY),
            ("x-content-type-options", "nosniff"),
            ("referrer-policy", "no-referrer"),
            ("cross-origin-resource-policy", "same-origin"),
            ("cache-control", "no-store"),
        ]
        .map(|(name, value)| (name, value.to_string()))
        .into();
        headers.extend(location.map(|location| ("location", location)));
        if self.status() == 405 {
            headers.push(("allow", "GET, HEAD".into()));
        }
        headers
    }
}

/// The answer to a request, or `None` if it is for somebody else: its path is not below [`PREFIX`].
pub fn answer(request: &Request<'_>, source: &dyn Source) -> Option<Answer> {
    let path = request.path.strip_prefix(PREFIX)?;
    if !path.is_empty() && !path.starts_with('/') {
        return None;
    }
    if !request.peer.to_canonical().is_loopback() {
        // As if it were not there.
        return Some(text(404, "There is nothing here.\n"));
    }
    if !request.host.is_some_and(is_loopback) {
        return Some(text(403, "This page is for http://localhost and http://127.0.0.1 alone.\n"));
    }
    if !matches!(request.method, "GET" | "HEAD") {
        return Some(text(405, "This page is only looked at.\n"));
    }
    Some(match path {
        "" => moved(format!("{PREFIX}/")),
        "/" => whole("text/html; charset=utf-8", HTML.as_bytes().to_vec()),
        "/page.css" => whole("text/css; charset=utf-8", CSS.as_bytes().to_vec()),
        "/page.js" => whole("text/javascript; charset=utf-8", JS.as_bytes().to_vec()),
        "/icon.svg" => whole("image/svg+xml", ICON.as_bytes().to_vec()),
        "/state.json" => whole("application/json", source.state().to_json().into_bytes()),
        "/events" if request.method == "GET" => Answer::Events(Events::default()),
        "/events" => whole("text/event-stream", Vec::new()),
        _ => text(404, "There is nothing here.\n"),
    })
}

fn whole(content_type: &'static str, body: Vec<u8>) -> Answer {
    Answer::Whole(Whole { status: 200, content_type, location: None, body })
}

fn text(status: u16, told: &str) -> Answer {
    let content_type = "text/plain; charset=utf-8";
    Answer::Whole(Whole { status, content_type, location: None, body: told.into() })
}

fn moved(location: String) -> Answer {
    let content_type = "text/plain; charset=utf-8";
    Answer::Whole(Whole { status: 308, content_type, location: Some(location), body: Vec::new() })
}

/// Whether a Host header names this host by a name that no DNS can give to another.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split_once(']').map_or("", |(address, _)| address),
        None => host.split_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::State;

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn get(path: &'static str) -> Request<'static> {
        Request { method: "GET", path, host: Some("localhost:8080"), peer: HERE }
    }

    fn ask(request: &Request<'_>) -> Option<(u16, Vec<(&'static str, String)>)> {
        let answer = answer(request, &State::default)?;
        Some((answer.status(), answer.headers()))
    }

    fn status(request: &Request<'_>) -> u16 {
        ask(request).unwrap().0
    }

    #[test]
    fn the_page_has_its_parts_and_nothing_else() {
        for path in
            ["/_flyrun/", "/_flyrun/page.css", "/_flyrun/page.js", "/_flyrun/state.json", "/_flyrun/events"]
        {
            assert_eq!(status(&get(path)), 200, "{path}");
        }
        assert_eq!(status(&get("/_flyrun")), 308);
        assert_eq!(status(&get("/_flyrun/../etc/passwd")), 404);
        for path in ["/", "/_flyrunner", "/a/_flyrun/"] {
            assert!(ask(&get(path)).is_none(), "{path}");
        }
        assert_eq!(status(&Request { method: "POST", ..get("/_flyrun/") }), 405);
    }

    #[test]
    fn only_this_host_sees_it_and_only_by_its_own_name() {
        let from = |peer: &str| status(&Request { peer: peer.parse().unwrap(), ..get("/_flyrun/") });
        assert_eq!([from("127.0.0.9"), from("::1"), from("::ffff:127.0.0.1")], [200; 3]);
        assert_eq!([from("192.0.2.1"), from("10.91.0.2"), from("::ffff:192.0.2.1")], [404; 3]);
        let by = |host: Option<&'static str>| status(&Request { host, ..get("/_flyrun/") });
        assert_eq!([by(Some("127.0.0.1")), by(Some("[::1]:80")), by(Some("LOCALHOST"))], [200; 3]);
        let others =
            [None, Some("evil.example"), Some("localhost.evil.example:80"), Some("127.0.0.1.x"), Some("[")];
        assert!(others.into_iter().all(|host| by(host) == 403));
    }

    #[test]
    fn every_answer_says_what_the_page_may_do() {
        for path in ["/_flyrun/", "/_flyrun/events", "/_flyrun/none", "/_flyrun"] {
            let (_, headers) = ask(&get(path)).unwrap();
            assert!(
                headers.iter().any(|(name, value)| *name == "content-security-policy" && value == POLICY)
            );
            assert!(headers.contains(&("x-content-type-options", "nosniff".to_string())));
        }
    }

    #[test]
    fn nothing_is_loaded_from_elsewhere() {
        for part in [HTML, CSS, JS, ICON] {
            // The name of SVG's namespace is loaded by nobody.
            let part = part.replace("http://www.w3.org/2000/svg", "");
            assert!(!part.contains("http:") && !part.contains("https:") && !part.contains("url("));
        }
        assert!(!JS.contains("innerHTML") && !HTML.contains("style=") && !HTML.contains("onclick"));
    }
}
