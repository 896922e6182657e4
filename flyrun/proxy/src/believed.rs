//! What proxies in front say of a request, and how far they are believed. Pure.
//!
//! Each of them adds whom it was connected from, so that the list is read from its end: as long as an address is a trusted proxy's,
//! what stands before it was said by that proxy. The first other one is the client, and what it says of itself is nothing to go by.

use std::net::{IpAddr, SocketAddr};

use http::{HeaderMap, HeaderName, HeaderValue};
use ipnet::IpNet;

use crate::fields::{FLY_CLIENT_IP, FORWARDED, Told, X_FORWARDED_FOR, X_FORWARDED_PORT, X_FORWARDED_PROTO};

/// Proxies in a row that are believed.
const MAX_HOPS: usize = 32;

/// Who a request is from.
#[derive(Debug)]
pub(crate) struct Believed {
    pub address: IpAddr,
    pub told: Told,
}

/// What the request of a trusted proxy says; `None` if the peer is none, or says nothing.
pub(crate) fn read(peer: IpAddr, own: &Told, trusted: &[IpNet], fields: &HeaderMap) -> Option<Believed> {
    if !is_in(trusted, peer) {
        return None;
    }
    let listed = chain(list(fields, X_FORWARDED_FOR).iter().rev().map(|text| address(text)), trusted);
    let elements = list(fields, FORWARDED);
    let parsed: Vec<_> = elements.iter().map(|element| Element::parse(element)).collect();
    let mut forwarded = chain(parsed.iter().rev().map(|element| element.from), trusted);
    let is_listed = fields.contains_key(X_FORWARDED_FOR);
    // One of them may be the client's, passed on by a proxy that does not know it.
    if is_listed && listed.last() != forwarded.last() {
        forwarded.clear();
    }
    // What is there and says nothing is not made up for by the others.
    let hops = if is_listed {
        listed
    } else if fields.contains_key(FORWARDED) {
        forwarded.clone()
    } else {
        only(fields, FLY_CLIENT_IP).and_then(address).into_iter().collect()
    };
    let of_client = parsed.len().checked_sub(forwarded.len()).and_then(|index| parsed.get(index));
    let proto = scheme(only(fields, X_FORWARDED_PROTO))
        .or_else(|| of_client.filter(|_| !forwarded.is_empty()).and_then(|element| element.is_tls));
    let port =
        only(fields, X_FORWARDED_PORT).and_then(|text| text.parse().ok()).filter(|port: &u16| *port != 0);
    if hops.is_empty() && proto.is_none() && port.is_none() {
        return None;
    }
    let client = hops.last().copied().unwrap_or(peer);
    // A proxy that tells the protocol alone means its usual port.
    let usual = proto.map(|is_tls| if is_tls { 443 } else { 80 });
    let through = hops.iter().rev().chain([&peer]);
    let told = Told {
        address: value(client.to_string()),
        forwarded_for: value(through.map(ToString::to_string).collect::<Vec<_>>().join(", ")),
        forwarded: (!forwarded.is_empty()).then(|| {
            let kept = elements.iter().skip(elements.len() - forwarded.len()).map(|text| text.to_string());
            let scheme = if own.is_tls { "https" } else { "http" };
            value(kept.chain([format!("for={};proto={scheme}", node(peer))]).collect::<Vec<_>>().join(", "))
        }),
        port: port.or(usual).map_or_else(|| own.port.clone(), HeaderValue::from),
        is_tls: proto.unwrap_or(own.is_tls),
    };
    Some(Believed { address: client, told })
}

fn is_in(ranges: &[IpNet], address: IpAddr) -> bool {
    ranges.iter().any(|range| range.contains(&address))
}

/// Addresses, the nearest first, up to the first that is no trusted proxy's.
fn chain(nearest_first: impl Iterator<Item = Option<IpAddr>>, trusted: &[IpNet]) -> Vec<IpAddr> {
    let mut hops = Vec::new();
    for hop in nearest_first.take(MAX_HOPS) {
        let Some(hop) = hop else { break };
        hops.push(hop);
        if !is_in(trusted, hop) {
            break;
        }
    }
    hops
}

/// The elements of a field that is a list, in however many lines.
fn list(fields: &HeaderMap, name: HeaderName) -> Vec<&str> {
    let lines = fields.get_all(&name).iter().filter_map(|value| value.to_str().ok());
    // Quotes mean something in `Forwarded` alone.
    let is_quoting = name == FORWARDED;
    lines
        .flat_map(move |line| split(line, ',', is_quoting))
        .map(str::trim)
        .filter(|element| !element.is_empty())
        .collect()
}

/// The value of a field that is there once.
fn only(fields: &HeaderMap, name: HeaderName) -> Option<&str> {
    let mut values = fields.get_all(&name).iter();
    let value = values.next()?.to_str().ok()?.trim();
    values.next().is_none().then_some(value)
}

fn scheme(text: Option<&str>) -> Option<bool> {
    match text?.to_ascii_lowercase().as_str() {
        "https" => Some(true),
        "http" => Some(false),
        _ => None,
    }
}

/// An address, which some proxies write with a port.
fn address(text: &str) -> Option<IpAddr> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    let with_port = || text.parse().map(|address: SocketAddr| address.ip());
    bare.parse().or_else(|_| with_port()).ok().map(|address: IpAddr| address.to_canonical())
}

/// An element of `Forwarded` (RFC 7239, section 4).
#[derive(Clone, Copy, Debug, Default)]
struct Element {
    from: Option<IpAddr>,
    is_tls: Option<bool>,
}

impl Element {
    fn parse(text: &str) -> Element {
        let mut element = Element::default();
        for pair in split(text, ';', true) {
            let Some((name, value)) = pair.split_once('=') else { return Element::default() };
            let value = value.trim();
            let value = value.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(value);
            match name.trim().to_ascii_lowercase().as_str() {
                // Each name is there once at most.
                "for" if element.from.is_none() => element.from = address(value),
                "proto" if element.is_tls.is_none() => element.is_tls = scheme(Some(value)),
                "for" | "proto" => return Element::default(),
                _ => {}
            }
        }
        element
    }
}

/// As `Forwarded` has addresses (RFC 7239, section 6).
fn node(address: IpAddr) -> String {
    match address {
        IpAddr::V4(four) => four.to_string(),
        IpAddr::V6(six) => format!("\"[{six}]\""),
    }
}

/// At each separator; at those that are in no quoted string, where there are such.
fn split(text: &str, separator: char, is_quoting: bool) -> impl Iterator<Item = &str> {
    let (mut is_quoted, mut is_escaped) = (false, false);
    text.split(move |c| {
        if std::mem::take(&mut is_escaped) {
            return false;
        }
        match c {
            '\\' if is_quoted => is_escaped = true,
            '"' => is_quoted = is_quoting && !is_quoted,
            _ => {}
        }
        c == separator && !is_quoted
    })
}

fn value(text: String) -> HeaderValue {
    HeaderValue::from_str(&text).unwrap_or(HeaderValue::from_static("unknown"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn peer(text: &str) -> (IpAddr, Told) {
        let address = text.parse().unwrap();
        (address, Told::of(address, 80, false))
    }

    fn fields(lines: &[(&'static str, &str)]) -> HeaderMap {
        let mut fields = HeaderMap::new();
        for (name, text) in lines {
            fields.append(*name, HeaderValue::from_str(text).unwrap());
        }
        fields
    }

    fn trusted() -> Vec<IpNet> {
        ["10.0.0.0/8", "2001:db8::/32"].map(|range| range.parse().unwrap()).into()
    }

    /// The client, `X-Forwarded-For`, and `Forwarded`.
    fn told(lines: &[(&'static str, &str)]) -> (String, String, String) {
        let (address, own) = peer("10.0.0.1");
        let believed = read(address, &own, &trusted(), &fields(lines)).unwrap();
        assert_eq!(believed.told.address, believed.address.to_string());
        let text = |value: &HeaderValue| value.to_str().unwrap().to_string();
        let forwarded = believed.told.forwarded.as_ref().map(text).unwrap_or_default();
        (believed.address.to_string(), text(&believed.told.forwarded_for), forwarded)
    }

    #[test]
    fn the_last_address_that_is_no_proxys_is_the_client() {
        for (list, client, through) in [
            ("192.0.2.1", "192.0.2.1", "192.0.2.1, 10.0.0.1"),
            // What the client itself has sent goes no further.
            ("9.9.9.9, 192.0.2.1", "192.0.2.1", "192.0.2.1, 10.0.0.1"),
            ("10.9.9.9, 192.0.2.1, 10.0.0.7", "192.0.2.1", "192.0.2.1, 10.0.0.7, 10.0.0.1"),
            ("garbage, 10.0.0.7,", "10.0.0.7", "10.0.0.7, 10.0.0.1"),
            ("10.0.0.8, 10.0.0.7", "10.0.0.8", "10.0.0.8, 10.0.0.7, 10.0.0.1"),
            ("192.0.2.1:5555", "192.0.2.1", "192.0.2.1, 10.0.0.1"),
            ("[2001:db9::1]:80 , 2001:db8::7", "2001:db9::1", "2001:db9::1, 2001:db8::7, 10.0.0.1"),
            ("::ffff:192.0.2.1", "192.0.2.1", "192.0.2.1, 10.0.0.1"),
        ] {
            let (address, chain, forwarded) = told(&[("x-forwarded-for", list)]);
            assert_eq!((&*address, &*chain, &*forwarded), (client, through, ""), "{list}");
        }
        let two = [("x-forwarded-for", "9.9.9.9"), ("x-forwarded-for", "192.0.2.1, 10.0.0.7")];
        assert_eq!(told(&two).1, "192.0.2.1, 10.0.0.7, 10.0.0.1");
    }

    #[test]
    fn forwarded_counts_where_it_is_the_only_one_or_tells_the_same() {
        let list =
            "for=9.9.9.9;proto=http, for=\"[2001:db9::1]:4711\";proto=https;host=\"a,b;c\", For=10.0.0.7";
        let kept =
            "for=\"[2001:db9::1]:4711\";proto=https;host=\"a,b;c\", For=10.0.0.7, for=10.0.0.1;proto=http";
        let (client, through, forwarded) = told(&[("forwarded", list)]);
        assert_eq!((&*client, &*through), ("2001:db9::1", "2001:db9::1, 10.0.0.7, 10.0.0.1"));
        assert_eq!(forwarded, kept);
        let both = [("forwarded", list), ("x-forwarded-for", "2001:db9::1, 10.0.0.7")];
        assert_eq!(told(&both).2, kept);
        // The proxy has added to the one, and passed the other on as the client sent it.
        let spoofed = [("forwarded", "for=9.9.9.9;proto=https"), ("x-forwarded-for", "192.0.2.1")];
        assert_eq!(told(&spoofed), ("192.0.2.1".into(), "192.0.2.1, 10.0.0.1".into(), String::new()));
        let (address, own) = peer("10.0.0.1");
        assert!(!read(address, &own, &trusted(), &fields(&spoofed)).unwrap().told.is_tls);
        for nonsense in
            ["for=_hidden", "for=unknown", "for", "=;=", "for=1.2.3.4;for=5.6.7.8", "\"", "for=\"1.2.3.4"]
        {
            assert!(
                read(address, &own, &trusted(), &fields(&[("forwarded", nonsense)])).is_none(),
                "{nonsense}"
            );
        }
    }

    #[test]
    fn fly_client_ip_counts_where_nothing_else_is() {
        assert_eq!(told(&[("fly-client-ip", "192.0.2.1")]).0, "192.0.2.1");
        let (address, own) = peer("10.0.0.1");
        for name in ["x-forwarded-for", "forwarded"] {
            let lines = fields(&[("fly-client-ip", "9.9.9.9"), (name, "\"")]);
            assert!(read(address, &own, &trusted(), &lines).is_none(), "{name}");
        }
        assert_eq!(told(&[("fly-client-ip", "9.9.9.9"), ("x-forwarded-for", "192.0.2.1")]).0, "192.0.2.1");
        assert_eq!(told(&[("fly-client-ip", "9.9.9.9"), ("forwarded", "for=192.0.2.1")]).0, "192.0.2.1");
    }

    #[test]
    fn protocol_and_port_are_the_proxys() {
        let (address, own) = peer("10.0.0.1");
        for (lines, expected) in [
            (&[("x-forwarded-proto", "HTTPS")][..], Some((true, "443"))),
            (&[("x-forwarded-proto", "https"), ("x-forwarded-port", "8443")], Some((true, "8443"))),
            (&[("x-forwarded-proto", "http")], Some((false, "80"))),
            (&[("x-forwarded-port", "8080")], Some((false, "8080"))),
            (&[("forwarded", "for=192.0.2.1;proto=https")], Some((true, "443"))),
            (&[("x-forwarded-proto", "https, http")], None),
            (&[("x-forwarded-proto", "https"), ("x-forwarded-proto", "http")], None),
            (&[("x-forwarded-proto", "gopher"), ("x-forwarded-port", "0")], None),
            (&[("x-forwarded-port", "80 ; evil")], None),
        ] {
            let believed = read(address, &own, &trusted(), &fields(lines));
            let seen = believed.as_ref().map(|one| (one.told.is_tls, one.told.port.to_str().unwrap()));
            assert_eq!(seen, expected, "{lines:?}");
        }
    }

    #[test]
    fn nobody_else_is_believed() {
        let lines = fields(&[
            ("x-forwarded-for", "192.0.2.1"),
            ("forwarded", "for=192.0.2.1;proto=https"),
            ("x-forwarded-proto", "https"),
            ("fly-client-ip", "192.0.2.1"),
        ]);
        for other in ["11.0.0.1", "192.0.2.1", "::1", "2001:db9::1"] {
            let (address, own) = peer(other);
            assert!(read(address, &own, &trusted(), &lines).is_none(), "{other}");
            assert!(read(address, &own, &[], &lines).is_none());
        }
        let (address, own) = peer("2001:db8::1");
        assert!(read(address, &own, &trusted(), &lines).is_some());
    }

    proptest! {
        /// Whatever is written before it, the address that the nearest proxy adds is the client's.
        #[test]
        fn a_client_that_lies_is_found_all_the_same(
            lie in "[ -~]{0,60}",
            is_forwarded in any::<bool>(),
            is_one_line in any::<bool>(),
        ) {
            let (address, own) = peer("10.0.0.1");
            let (name, truth) =
                if is_forwarded { ("forwarded", "for=192.0.2.1") } else { ("x-forwarded-for", "192.0.2.1") };
            let lines = match is_one_line {
                true => vec![format!("{lie}, {truth}")],
                false => vec![lie.clone(), truth.to_string()],
            };
            let lines: Vec<_> = lines.iter().map(|line| (name, line.as_str())).collect();
            match read(address, &own, &trusted(), &fields(&lines)) {
                Some(believed) => {
                    prop_assert_eq!(believed.address.to_string(), "192.0.2.1");
                    prop_assert_eq!(believed.told.forwarded_for.to_str().unwrap(), "192.0.2.1, 10.0.0.1");
                }
                // A quote that does not end makes the rest no list: then it says nothing.
                None => prop_assert!(is_forwarded && is_one_line && lie.contains('"')),
            }
        }
    }
}
