//! One HTTP/1.1 request for the lease, from whatever a process writes. Pure.

use std::str;

/// A request has at most so many bytes, its body included.
pub const MAX_BYTES: usize = 4096;
/// Without another word a lease lasts so long, in seconds.
pub const DEFAULT_SECONDS: u32 = 60;

const PATH: &str = "/.flyrun/busy";
const MAX_HEADERS: usize = 64;
const MAX_BODY: usize = 64;

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// How long the lease still lasts.
    Get,
    /// It is to last so many seconds from now, if it does not last longer already.
    Hold {
        /// At least 1.
        seconds: u32,
    },
    /// It is to end.
    Release,
}

/// Why a request is refused: the status, with its reason, and a line for who asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The status line behind the version.
    pub status: &'static str,
    /// What is wrong.
    pub why: &'static str,
}

/// What these bytes ask for; `None` if they are not a whole request yet.
///
/// # Errors
/// They are none, or ask for what is not there.
pub fn read(bytes: &[u8]) -> Result<Option<Asked>, Refused> {
    let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else {
        let is_full = bytes.len() >= MAX_BYTES;
        return if is_full {
            Err(refused("431 Request Header Fields Too Large", "too long"))
        } else {
            Ok(None)
        };
    };
    let head = str::from_utf8(bytes.get(..end).unwrap_or_default()).map_err(|_| bad("not text"))?;
    let mut lines = head.split("\r\n");
    let mut words = lines.next().unwrap_or_default().split(' ');
    let (method, target, version) = match (words.next(), words.next(), words.next(), words.next()) {
        (Some(method), Some(target), Some(version), None) => (method, target, version),
        _ => return Err(bad("not an HTTP request")),
    };
    if !matches!(version, "HTTP/1.1" | "HTTP/1.0") {
        return Err(bad("not HTTP/1.1"));
    }
    let length = body_length(lines)?;
    let body = bytes.get(end + 4..).unwrap_or_default();
    let Some(body) = body.get(..length) else { return Ok(None) };
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    if path != PATH {
        return Err(refused("404 Not Found", "there is /.flyrun/busy"));
    }
    match method {
        "GET" => Ok(Some(Asked::Get)),
        "DELETE" => Ok(Some(Asked::Release)),
        "PUT" | "POST" => Ok(Some(Asked::Hold { seconds: seconds(query, body)? })),
        _ => Err(refused("405 Method Not Allowed", "there are GET, PUT and DELETE")),
    }
}

fn body_length<'a>(lines: impl Iterator<Item = &'a str>) -> Result<usize, Refused> {
    let mut length = None;
    for (count, line) in lines.enumerate() {
        let (name, value) = line.split_once(':').ok_or(bad("a header without a colon"))?;
        if count >= MAX_HEADERS {
            return Err(refused("431 Request Header Fields Too Large", "too many headers"));
        }
        if name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(refused("411 Length Required", "the body needs a Content-Length"));
        }
        if name.eq_ignore_ascii_case("content-length") {
            let told = number(value.trim()).filter(|_| length.is_none()).ok_or(bad("Content-Length"))?;
            length = Some(told as usize);
        }
    }
    match length.unwrap_or(0) {
        length @ 0..=MAX_BODY => Ok(length),
        _ => Err(refused("413 Content Too Large", "the body is a number of seconds")),
    }
}

/// `?seconds=N`, or the body, or neither.
fn seconds(query: &str, body: &[u8]) -> Result<u32, Refused> {
    let wrong = bad("write ?seconds=N, or N as the body: 1 to 3600");
    let body = str::from_utf8(body).map_err(|_| wrong)?.trim();
    let told = match (query, body) {
        ("", "") => return Ok(DEFAULT_SECONDS),
        ("", body) => body,
        (query, "") => query.strip_prefix("seconds=").ok_or(wrong)?,
        _ => return Err(wrong),
    };
    number(told).filter(|seconds| (1..=protocol::MAX_BUSY_SECONDS).contains(seconds)).ok_or(wrong)
}

/// Digits alone, few of them.
fn number(text: &str) -> Option<u32> {
    let is_number = (1..=9).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    if is_number { text.parse().ok() } else { None }
}

fn bad(why: &'static str) -> Refused {
    refused("400 Bad Request", why)
}

fn refused(status: &'static str, why: &'static str) -> Refused {
    Refused { status, why }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(text: &str) -> Result<Option<Asked>, &'static str> {
        read(text.as_bytes()).map_err(|refused| refused.status)
    }

    #[test]
    fn a_lease_is_held_released_and_asked_for() {
        let put = |target: &str, rest: &str| told(&format!("PUT {target} HTTP/1.1\r\nHost: x\r\n{rest}"));
        let hold = |seconds| Ok(Some(Asked::Hold { seconds }));
        assert_eq!(put("/.flyrun/busy", "\r\n"), hold(60));
        assert_eq!(put("/.flyrun/busy?seconds=90", "\r\n"), hold(90));
        assert_eq!(put("/.flyrun/busy", "content-length: 4\r\n\r\n120\n"), hold(120));
        assert_eq!(told("GET /.flyrun/busy HTTP/1.0\r\n\r\n"), Ok(Some(Asked::Get)));
        assert_eq!(told("DELETE /.flyrun/busy HTTP/1.1\r\n\r\n"), Ok(Some(Asked::Release)));
    }

    #[test]
    fn what_is_not_whole_is_waited_for() {
        let whole = "PUT /.flyrun/busy HTTP/1.1\r\nContent-Length: 2\r\n\r\n30";
        for end in 0..whole.len() {
            assert_eq!(told(&whole[..end]), Ok(None), "{end}");
        }
        assert_eq!(told(whole), Ok(Some(Asked::Hold { seconds: 30 })));
    }

    #[test]
    fn all_else_is_refused_with_a_reason() {
        let put = |rest: &str| format!("PUT /.flyrun/busy{rest}");
        for (text, status) in [
            (put("?seconds=0 HTTP/1.1\r\n\r\n"), "400"),
            (put("?seconds=3601 HTTP/1.1\r\n\r\n"), "400"),
            (put("?seconds=+1 HTTP/1.1\r\n\r\n"), "400"),
            (put("?second=1 HTTP/1.1\r\n\r\n"), "400"),
            (put("?seconds=1 HTTP/1.1\r\nContent-Length: 1\r\n\r\n1"), "400"),
            (put(" HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n1"), "400"),
            (put(" HTTP/1.1\r\nContent-Length: -1\r\n\r\n"), "400"),
            (put(" HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n"), "400"),
            (put(" HTTP/1.1\r\nContent-Length: 65\r\n\r\n"), "413"),
            (put(" HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"), "411"),
            (put(" HTTP/2\r\n\r\n"), "400"),
            ("PATCH /.flyrun/busy HTTP/1.1\r\n\r\n".to_string(), "405"),
            ("GET / HTTP/1.1\r\n\r\n".to_string(), "404"),
            ("\r\n\r\n".to_string(), "400"),
            ("x".repeat(MAX_BYTES), "431"),
        ] {
            assert!(told(&text).is_err_and(|told| told.starts_with(status)), "{text:?}: {:?}", told(&text));
        }
        assert!(read(b"GET /\xff HTTP/1.1\r\n\r\n").is_err());
    }
}
