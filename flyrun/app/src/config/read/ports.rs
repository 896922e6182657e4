//! `[[services.ports]]`: which ports, and what is spoken on them.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::UP_TO_A_DAY;
use super::words::*;
use crate::config::model::*;
use crate::config::problem::{Log, quote};
use crate::config::table::{Bare, Node, Table, one_of};
use crate::config::{Named, keys};

const HTTP_ALPN: [&str; 2] = ["h2", "http/1.1"];

/// Where the parts of a port stand, as offsets.
#[derive(Debug)]
pub(crate) struct PortAt {
    pub whole: usize,
    /// `force_https`, where it is true.
    pub force_https: Option<usize>,
}

/// The handlers of a port.
#[derive(Clone, Copy, Debug, Default)]
struct Handlers {
    http: bool,
    tls: bool,
    proxy_proto: bool,
}

/// One `[[services.ports]]`.
pub(super) fn read(table: &Table<'_>, log: &Log<'_>) -> Option<(Port, PortAt)> {
    let numbers = numbers(table, log)?;
    let handlers = handlers(table, log);
    let tls = tls(table, handlers);
    let carries = if handlers.http { Carries::Http(http(table, log)) } else { tcp(table, handlers) };
    for (needed, name, handler) in [
        (handlers.http, "http_options", "http"),
        (handlers.http, "force_https", "http"),
        (handlers.tls, "tls_options", "tls"),
        (handlers.proxy_proto, "proxy_proto_options", "proxy_proto"),
    ] {
        // A false force_https says nothing.
        let meant = table.get(name).filter(|node| node.as_flag() != Some(false));
        if let Some(node) = meant.filter(|_| !needed) {
            node.refuse(
                &format!("needs the handler \"{handler}\""),
                "Add it to handlers, or leave this away.",
            );
        }
    }
    let force_https = table.get("force_https").filter(|node| node.as_flag() == Some(true));
    if let Some(node) = force_https.filter(|_| handlers.tls) {
        node.refuse("is of no use with the handler \"tls\": requests here are https", "Leave it away.");
    }
    Some((
        Port { numbers, tls, carries },
        PortAt { whole: table.at, force_https: force_https.filter(|_| handlers.http).map(|node| node.at) },
    ))
}

/// What `[http_service]` stands for.
pub(super) fn of_http_service(
    table: &Table<'_>,
    has_certificate: bool,
    log: &Log<'_>,
) -> Vec<(Port, PortAt)> {
    let force_https = table.get("force_https").filter(|node| node.as_flag() == Some(true));
    let at = |force_https: Option<Node<'_>>| PortAt {
        whole: table.at,
        force_https: force_https.map(|node| node.at),
    };
    let http = http(table, log);
    let port = |number, tls, http| Port { numbers: number..=number, tls, carries: Carries::Http(http) };
    let secure = Http { force_https: false, ..http.clone() };
    let mut ports = vec![(port(80, None, http), at(force_https))];
    let tls = tls(table, Handlers { http: true, tls: true, proxy_proto: false });
    if has_certificate {
        ports.push((port(443, tls, secure), at(None)));
    } else if let Some(node) = table.get("tls_options") {
        node.refuse(
            "has no meaning without a certificate",
            "Name one under [[flyrun.tls]], or leave this away.",
        );
    }
    ports
}

fn numbers(table: &Table<'_>, log: &Log<'_>) -> Option<RangeInclusive<u16>> {
    let read = |name| table.get(name).map(|node| node.port());
    match (read("port"), read("start_port"), read("end_port")) {
        (Some(port), None, None) => port.map(|port| port..=port),
        (None, Some(first), Some(last)) => {
            let (first, last) = (first?, last?);
            if first > last {
                let message = format!("there is no port from {first} to {last}");
                log.advise(table.at, message, "Let start_port be the lower one.");
                return None;
            }
            Some(first..=last)
        }
        _ => {
            log.advise(table.at, "these ports have no number", "Write port, or start_port and end_port.");
            None
        }
    }
}

fn handlers(table: &Table<'_>, log: &Log<'_>) -> Handlers {
    const KNOWN: &str = "\"http\", \"tls\" or \"proxy_proto\"";
    let mut handlers = Handlers::default();
    let Some(node) = table.get("handlers") else { return handlers };
    for element in node.list("a list of handlers") {
        let Some(name) = element.text(KNOWN) else { continue };
        let handler = match name {
            "http" => &mut handlers.http,
            "tls" => &mut handlers.tls,
            "proxy_proto" => &mut handlers.proxy_proto,
            "pg_tls" => {
                let advice = "Let PostgreSQL speak TLS itself, with handlers = [].";
                element.refuse("has \"pg_tls\", which flyrun does not support", advice);
                continue;
            }
            _ => {
                element.wrong(KNOWN);
                continue;
            }
        };
        if std::mem::replace(handler, true) {
            log.advise(
                element.at,
                format!("the handler {} is there twice", quote(name)),
                "Leave one of them away.",
            );
        }
    }
    if handlers.http && handlers.proxy_proto {
        node.refuse(
            "cannot have both \"http\" and \"proxy_proto\"",
            "With http the client's address is in Fly-Client-IP and X-Forwarded-For: leave proxy_proto away.",
        );
    }
    handlers
}

fn tls(table: &Table<'_>, handlers: Handlers) -> Option<Tls> {
    let options = table.table("tls_options", &keys::TLS_OPTIONS);
    if !handlers.tls {
        return None;
    }
    let alpn = options.and_then(|options| options.get("alpn")).map(|node| {
        node.texts("protocol names", |element, name| {
            let wanted = if handlers.http { "\"h2\" or \"http/1.1\"" } else { "1 to 255 characters" };
            let good =
                if handlers.http { HTTP_ALPN.contains(&name) } else { (1..=255).contains(&name.len()) };
            if !good {
                element.wrong(wanted);
            }
            good.then(|| name.to_string())
        })
    });
    let default_alpn = if handlers.http { HTTP_ALPN.map(String::from).to_vec() } else { Vec::new() };
    let versions = options.and_then(|options| options.get("versions")).map(|node| {
        let known = one_of::<TlsVersion>();
        let mut versions = node.texts(&known, |element, _| element.choice::<TlsVersion>());
        versions.sort_by_key(|version| *version == TlsVersion::V1_3);
        versions.dedup();
        if node.is_empty_list() {
            node.wrong(&format!("a list with {known}"));
        }
        versions
    });
    let all = || TlsVersion::NAMES.iter().map(|(_, version)| *version).collect();
    Some(Tls { alpn: alpn.unwrap_or(default_alpn), versions: versions.unwrap_or_else(all) })
}

fn tcp(table: &Table<'_>, handlers: Handlers) -> Carries {
    let options = table.table("proxy_proto_options", &keys::PROXY_PROTO_OPTIONS);
    let version = options.map_or(ProxyProtocol::V1, |options| options.choice("version", ProxyProtocol::V1));
    Carries::Tcp { proxy_protocol: handlers.proxy_proto.then_some(version) }
}

fn http(table: &Table<'_>, log: &Log<'_>) -> Http {
    let mut http = Http {
        force_https: table.flag("force_https", false),
        h2_backend: false,
        idle_timeout: Duration::from_secs(60),
        headers_read_timeout: Duration::from_secs(30),
        pristine: false,
        response_headers: BTreeMap::new(),
    };
    let Some(options) = table.table("http_options", &keys::HTTP_OPTIONS) else { return http };
    http.h2_backend = options.flag("h2_backend", false);
    http.idle_timeout = options.duration("idle_timeout", Bare::Seconds, UP_TO_A_DAY, http.idle_timeout);
    http.headers_read_timeout =
        options.duration("headers_read_timeout", Bare::Seconds, UP_TO_A_DAY, http.headers_read_timeout);
    let Some(response) = options.table("response", &keys::RESPONSE) else { return http };
    http.pristine = response.flag("pristine", false);
    http.response_headers = response.get("headers").map(|node| rules(&node, log)).unwrap_or_default();
    http
}

/// Headers that belong to a connection and to the length of a body are not the user's to set: RFC 9110, section 7.6.1.
const FRAMING: [&str; 8] = [
    "connection",
    "content-length",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

fn rules(node: &Node<'_>, log: &Log<'_>) -> BTreeMap<String, HeaderRule> {
    let mut rules = BTreeMap::new();
    for entry in node.entries() {
        let name = entry.name.to_ascii_lowercase();
        if !is_header_name(&name) || FRAMING.contains(&name.as_str()) {
            log.add(entry.key_at, format!("{} is not a header that can be changed", quote(entry.name)));
        } else if let Some(rule) = rule(&entry)
            && rules.insert(name, rule).is_some()
        {
            log.advise(
                entry.key_at,
                format!("the header {} is there twice", quote(entry.name)),
                "Leave one of them away.",
            );
        }
    }
    rules
}

fn rule(node: &Node<'_>) -> Option<HeaderRule> {
    const WANTED: &str = "false, a text of printable ASCII, or a list of such texts";
    if node.as_flag() == Some(false) {
        return Some(HeaderRule::Remove);
    }
    let values = if node.is_list() {
        node.texts(WANTED, |element, _| Some(element.text_that(is_header_value, HEADER_VALUE)?.to_string()))
    } else {
        node.text_that(is_header_value, WANTED).map(|text| vec![text.to_string()])?
    };
    if node.is_empty_list() {
        node.wrong(WANTED);
    }
    Some(HeaderRule::Set(values))
}
