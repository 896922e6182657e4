//! `-p [ip:][host[-last]:]guest[-last][/tcp|/udp]`, as docker has it.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// No range is longer.
const MAX_RANGE: usize = 1024;

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
}

/// A port of the host that leads to one of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Publish {
    /// The host's address; without one all of them, of IPv4 and IPv6.
    pub host_ip: Option<IpAddr>,
    /// The host's port; 0 for one that is free.
    pub host: u16,
    pub guest: u16,
    pub protocol: Protocol,
}

/// Why a word behind `-p` is none.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PublishError {
    #[error("'{0}' is not an address of the host: write 127.0.0.1:8080:80, or [2001:db8::1]:8080:80")]
    Address(String),
    #[error("::1 cannot lead to a machine, as IPv6's loopback goes nowhere else: publish on 127.0.0.1")]
    Loopback6,
    #[error("'{0}' is not a port between 1 and 65535, nor a range of up to {MAX_RANGE} such as 8000-8010")]
    Port(String),
    #[error("'{0}' is not a protocol: tcp and udp are possible")]
    Protocol(String),
    #[error("{0} ports of the host cannot lead to {1} of the machine: the ranges must be equally long")]
    Ranges(usize, usize),
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        })
    }
}

impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host_ip {
            Some(IpAddr::V4(address)) => write!(f, "{address}:")?,
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
            None => {}
        }
        write!(f, "{}:{}/{}", self.host, self.guest, self.protocol)
    }
}

/// Reads one word; a range makes several.
///
/// # Errors
/// [`PublishError`] names the part that is wrong.
pub fn parse(word: &str) -> Result<Vec<Publish>, PublishError> {
    let (rest, protocol) = match word.rsplit_once('/') {
        None => (word, Protocol::Tcp),
        Some((rest, "tcp")) => (rest, Protocol::Tcp),
        Some((rest, "udp")) => (rest, Protocol::Udp),
        Some((_, other)) => return Err(PublishError::Protocol(other.to_string())),
    };
    let (rest, guest) = rest.rsplit_once(':').map_or((None, rest), |(rest, guest)| (Some(rest), guest));
    let (host_ip, host) = match rest.map(|rest| (rest, rest.rsplit_once(':'))) {
        None => (None, None),
        // An IPv6 address without a port ends in its bracket.
        Some((rest, _)) if rest.ends_with(']') => (Some(address(rest)?), None),
        Some((host, None)) if host.contains('.') => (Some(address(host)?), None),
        Some((host, None)) => (None, Some(host)),
        Some((_, Some((ip, host)))) => (Some(address(ip)?), Some(host).filter(|host| !host.is_empty())),
    };
    let guests = ports(guest)?;
    let hosts = match host {
        Some(host) => ports(host)?,
        None => vec![0; guests.len()],
    };
    if hosts.len() != guests.len() {
        return Err(PublishError::Ranges(hosts.len(), guests.len()));
    }
    let pairs = hosts.into_iter().zip(guests);
    Ok(pairs.map(|(host, guest)| Publish { host_ip, host, guest, protocol }).collect())
}

/// 0.0.0.0 and :: mean their own family only.
fn address(text: &str) -> Result<IpAddr, PublishError> {
    let inner = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
    let address = match inner {
        Some(inner) => inner.parse().map(IpAddr::V6).ok(),
        None => text.parse().map(IpAddr::V4).ok(),
    };
    match address {
        Some(IpAddr::V6(address)) if address.is_loopback() => Err(PublishError::Loopback6),
        Some(address) => Ok(address),
        None => Err(PublishError::Address(text.to_string())),
    }
}

fn ports(text: &str) -> Result<Vec<u16>, PublishError> {
    let wrong = || PublishError::Port(text.to_string());
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let port = |text: &str| {
        let digits = text.chars().all(|c| c.is_ascii_digit());
        text.parse::<u16>().ok().filter(|port| digits && *port > 0).ok_or_else(wrong)
    };
    let ports: Vec<u16> = (port(first)?..=port(last)?).collect();
    if (1..=MAX_RANGE).contains(&ports.len()) { Ok(ports) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn told(word: &str) -> String {
        match parse(word) {
            Ok(all) => all.iter().map(Publish::to_string).collect::<Vec<_>>().join(" "),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn every_form_of_dockers_is_understood() {
        for (word, meaning) in [
            ("8080:80", "8080:80/tcp"),
            ("80", "0:80/tcp"),
            ("53:53/udp", "53:53/udp"),
            ("127.0.0.1:8080:80", "127.0.0.1:8080:80/tcp"),
            ("127.0.0.1::80", "127.0.0.1:0:80/tcp"),
            ("127.0.0.1:80", "127.0.0.1:0:80/tcp"),
            ("[::2]:8080:80/tcp", "[::2]:8080:80/tcp"),
            ("[::2]:80", "[::2]:0:80/tcp"),
            ("8000-8001:80-81/udp", "8000:80/udp 8001:81/udp"),
            ("7000-7001", "0:7000/tcp 0:7001/tcp"),
        ] {
            assert_eq!(told(word), meaning, "{word}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (word, part) in [
            ("", "''"),
            ("0", "'0'"),
            ("80:65536", "'65536'"),
            ("80:x", "'x'"),
            ("+80:80", "'+80'"),
            ("80:80/sctp", "'sctp'"),
            ("host:80:80", "'host'"),
            ("::1:80:80", "'::1'"),
            ("[::1]:80:80", "loopback"),
            ("8000-8002:80-81", "3 ports"),
            ("9-8:9-8", "'9-8'"),
            ("1-65535:1-65535", "'1-65535'"),
        ] {
            assert!(told(word).contains(part), "{word}: {}", told(word));
        }
    }

    proptest! {
        #[test]
        fn no_word_makes_it_panic(word in "[0-9a-z:./\\[\\]-]{0,24}") {
            let _ = parse(&word);
        }

        #[test]
        fn what_is_told_is_understood_again(host in 1u16.., guest in 1u16.., udp: bool, ip: Option<IpAddr>) {
            let protocol = if udp { Protocol::Udp } else { Protocol::Tcp };
            let ip = ip.filter(|ip| *ip != IpAddr::V6(std::net::Ipv6Addr::LOCALHOST));
            let publish = Publish { host_ip: ip, host, guest, protocol };
            prop_assert_eq!(parse(&publish.to_string()), Ok(vec![publish]));
        }
    }
}
