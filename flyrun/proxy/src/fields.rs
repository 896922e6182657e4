//! What happens to fields on their way. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::SystemTime;

use app::config::model::HeaderRule;
use http::header::{CONNECTION, DATE, HeaderName, SERVER, TE, TRAILER, TRANSFER_ENCODING, UPGRADE, VIA};
use http::{HeaderMap, HeaderValue, header};

use crate::machines::Steer;

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
pub(crate) const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
pub(crate) const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
pub(crate) const X_FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
const X_FORWARDED_SSL: HeaderName = HeaderName::from_static("x-forwarded-ssl");
pub(crate) const FORWARDED: HeaderName = header::FORWARDED;
pub(crate) const FLY_CLIENT_IP: HeaderName = HeaderName::from_static("fly-client-ip");
const FLY_FORWARDED_PORT: HeaderName = HeaderName::from_static("fly-forwarded-port");
const FLY_REGION: HeaderName = HeaderName::from_static("fly-region");
const FLY_REQUEST_ID: HeaderName = HeaderName::from_static("fly-request-id");
const FLY_REPLAY_SRC: HeaderName = HeaderName::from_static("fly-replay-src");
const FLY_FORCE_INSTANCE_ID: HeaderName = HeaderName::from_static("fly-force-instance-id");
const FLY_PREFER_INSTANCE_ID: HeaderName = HeaderName::from_static("fly-prefer-instance-id");

/// What the other side of one connection alone is told (RFC 9110, section 7.6.1), with what Connection names.
pub(crate) fn strip_hop_by_hop(fields: &mut HeaderMap) {
    // One look at each name instead of a search for each that may be there: most messages have none.
    let is_hop = |name: &HeaderName| {
        [CONNECTION, KEEP_ALIVE, PROXY_CONNECTION, TE, TRANSFER_ENCODING, UPGRADE].contains(name)
    };
    let hops: Vec<HeaderName> = fields.keys().filter(|name| is_hop(name)).cloned().collect();
    if hops.contains(&CONNECTION) {
        let named: Vec<HeaderName> = fields
            .get_all(CONNECTION)
            .iter()
            .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
            .filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok())
            .collect();
        for name in named {
            fields.remove(name);
        }
    }
    for name in hops {
        fields.remove(name);
    }
}

/// What must not come after a body, as it frames, routes or admits a message (RFC 9110, section 6.5.1).
pub(crate) fn strip_from_trailers(fields: &mut HeaderMap) {
    strip_hop_by_hop(fields);
    for name in [
        header::CONTENT_LENGTH,
        header::HOST,
        TRAILER,
        header::CONTENT_ENCODING,
        header::CONTENT_TYPE,
        header::CONTENT_RANGE,
        header::AUTHORIZATION,
        header::COOKIE,
        header::SET_COOKIE,
        header::CACHE_CONTROL,
        header::EXPECT,
        header::RANGE,
        header::MAX_FORWARDS,
    ] {
        fields.remove(name);
    }
    remove_told_by_proxies(fields);
}

/// Whether the client takes trailers.
pub(crate) fn takes_trailers(fields: &HeaderMap) -> bool {
    let elements = |value: &HeaderValue| {
        value.as_bytes().split(|byte| *byte == b',').any(|element| {
            let name = element.split(|byte| *byte == b';').next().unwrap_or_default();
            name.trim_ascii().eq_ignore_ascii_case(b"trailers")
        })
    };
    fields.get_all(TE).iter().any(elements)
}

/// The protocol that an HTTP/1.1 client asks to go on with.
pub(crate) fn wanted_upgrade(fields: &HeaderMap) -> Option<HeaderValue> {
    let protocol = fields.get(UPGRADE)?;
    let asks = fields.get_all(CONNECTION).iter().any(|value| {
        value
            .as_bytes()
            .split(|byte| *byte == b',')
            .any(|name| name.trim_ascii().eq_ignore_ascii_case(b"upgrade"))
    });
    // Whoever went on with another HTTP would pass by everything that is done to requests here.
    let is_http = protocol.as_bytes().split(|byte| *byte == b',').any(|name| {
        let name = name.trim_ascii();
        name.eq_ignore_ascii_case(b"h2c")
            || name.get(..4).is_some_and(|start| start.eq_ignore_ascii_case(b"HTTP"))
    });
    (asks && !is_http).then(|| protocol.clone())
}

/// Whether an answer tells what happens as it happens, without an end of its own.
pub(crate) fn is_event_stream(fields: &HeaderMap) -> bool {
    let is_it = |value: &HeaderValue| {
        let kind = value.as_bytes().split(|byte| *byte == b';').next().unwrap_or_default();
        kind.trim_ascii().eq_ignore_ascii_case(b"text/event-stream")
    };
    fields.get(header::CONTENT_TYPE).is_some_and(is_it)
}

/// Which machine the client asks for.
pub(crate) fn steer(fields: &HeaderMap) -> Option<Steer> {
    let id = |name: HeaderName| {
        Some(fields.get(name)?.to_str().ok()?.trim().to_string()).filter(|id| !id.is_empty())
    };
    id(FLY_FORCE_INSTANCE_ID).map(Steer::Force).or_else(|| id(FLY_PREFER_INSTANCE_ID).map(Steer::Prefer))
}

/// What a machine is told about a client, as values that are made once for a connection.
#[derive(Clone, Debug)]
pub(crate) struct Told {
    pub address: HeaderValue,
    /// The client, and the proxies between it and this one.
    pub forwarded_for: HeaderValue,
    /// The same as RFC 7239 has it, where proxies before this one do.
    pub forwarded: Option<HeaderValue>,
    pub port: HeaderValue,
    pub is_tls: bool,
}

impl Told {
    /// Of a client that is connected itself.
    pub fn of(address: IpAddr, port: u16, is_tls: bool) -> Told {
        let address =
            HeaderValue::from_str(&address.to_string()).unwrap_or(HeaderValue::from_static("unknown"));
        Told { forwarded_for: address.clone(), address, forwarded: None, port: port.into(), is_tls }
    }
}

/// Fields that the proxy adds to a request. They are in no map: nothing else has their names, and nothing looks for them.
pub(crate) type Added = Vec<(HeaderName, HeaderValue)>;

/// Takes away what goes no further, and tells what is added.
pub(crate) fn to_machine(
    fields: &mut HeaderMap,
    told: &Told,
    region: &HeaderValue,
    id: &HeaderValue,
    via: &'static str,
) -> Added {
    let trailers = fields.contains_key(TE) && takes_trailers(fields);
    strip_hop_by_hop(fields);
    remove_told_by_proxies(fields);
    let (proto, ssl) = if told.is_tls { ("https", "on") } else { ("http", "off") };
    let mut added = Vec::with_capacity(13);
    added.extend([
        (X_FORWARDED_FOR, told.forwarded_for.clone()),
        (X_FORWARDED_PROTO, HeaderValue::from_static(proto)),
        (X_FORWARDED_PORT, told.port.clone()),
        (X_FORWARDED_SSL, HeaderValue::from_static(ssl)),
        (FLY_CLIENT_IP, told.address.clone()),
        (FLY_FORWARDED_PORT, told.port.clone()),
        (FLY_REGION, region.clone()),
        (FLY_REQUEST_ID, id.clone()),
        // After those of proxies before this one, which are in the map.
        (VIA, HeaderValue::from_static(via)),
    ]);
    if let Some(forwarded) = &told.forwarded {
        added.push((FORWARDED, forwarded.clone()));
    }
    if trailers {
        added.push((TE, HeaderValue::from_static("trailers")));
    }
    added
}

/// What the replayed request says of the machine that had it replayed.
pub(crate) fn replayed(added: &mut Added, source: &str) {
    if let Ok(value) = HeaderValue::from_str(source) {
        added.retain(|(name, _)| *name != FLY_REPLAY_SRC);
        added.push((FLY_REPLAY_SRC, value));
    }
}

/// What only a proxy may say: no client is believed to be one. A name with underscores is the same one to CGI.
fn remove_told_by_proxies(fields: &mut HeaderMap) {
    let told: Vec<HeaderName> =
        fields.keys().filter(|name| is_told_by_proxies(name.as_str())).cloned().collect();
    for name in told {
        fields.remove(name);
    }
}

fn is_told_by_proxies(name: &str) -> bool {
    let begins = |prefix: &str| {
        let same = |(a, b): (u8, u8)| a == b || a == b'_' && b == b'-';
        name.len() >= prefix.len() && name.bytes().zip(prefix.bytes()).all(same)
    };
    match name.as_bytes().first() {
        Some(b'f') => begins("fly-") || begins("forwarded") && name.len() == "forwarded".len(),
        Some(b'x') => begins("x-forwarded-"),
        _ => false,
    }
}

/// What an answer's fields become.
pub(crate) fn to_client(
    fields: &mut HeaderMap,
    rules: &[(HeaderName, Vec<HeaderValue>)],
    own: Option<&HeaderValue>,
    now: fn() -> SystemTime,
) {
    strip_hop_by_hop(fields);
    if let Some(id) = own {
        fields.append(VIA, HeaderValue::from_static("1.1 flyrun"));
        fields.insert(FLY_REQUEST_ID, id.clone());
        fields.entry(SERVER).or_insert(HeaderValue::from_static("flyrun"));
        // Whoever passes an answer on says when it came, if nobody has (RFC 9110, section 6.6.1).
        fields.entry(DATE).or_insert_with(|| crate::date::value(now()));
    }
    for (name, values) in rules {
        fields.remove(name);
        for value in values {
            fields.append(name.clone(), value.clone());
        }
    }
}

/// `response.headers` as names and values: none take the field away. What frames a message is not theirs to set.
pub(crate) fn rules(rules: &BTreeMap<String, HeaderRule>) -> Vec<(HeaderName, Vec<HeaderValue>)> {
    let framing = [CONNECTION, TRANSFER_ENCODING, header::CONTENT_LENGTH, UPGRADE];
    let mut read = Vec::new();
    for (name, rule) in rules {
        let Ok(name) = HeaderName::from_bytes(name.as_bytes()) else { continue };
        let values = match rule {
            HeaderRule::Remove => Vec::new(),
            HeaderRule::Set(texts) => {
                texts.iter().filter_map(|text| HeaderValue::from_str(text).ok()).collect()
            }
        };
        if !framing.contains(&name) {
            read.push((name, values));
        }
    }
    read
}
