//! Where a registry may send us: no nearer to this host than it is itself.
//!
//! An address in a redirect, or of who gives tokens, is a stranger's word. Followed blindly, it has flyrun ask what only this host or
//! its network can reach: a database on loopback, a router, the service at which a cloud keeps a machine's credentials.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// From whom an address can be reached, the widest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Reach {
    /// Everybody.
    Public,
    /// Those in the same network (RFC 1918, RFC 4193, RFC 6598).
    Private,
    /// This host.
    Loopback,
    /// Those on the same link, and the services that clouds have for their machines. No registry is there.
    Link,
}

/// Metadata services that are not on the link: AWS by IPv6, Alibaba, Oracle, Azure.
const METADATA: [IpAddr; 4] = [
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
];

impl Reach {
    pub(super) fn of(address: IpAddr) -> Self {
        let address = embedded(address);
        if METADATA.contains(&address) || address.is_multicast() {
            return Self::Link;
        }
        match address {
            IpAddr::V4(four) => Self::of_v4(four),
            // 0.0.0.0 and :: are this host for connect(2).
            IpAddr::V6(six) if six.is_loopback() || six.is_unspecified() => Self::Loopback,
            IpAddr::V6(six) if six.is_unicast_link_local() => Self::Link,
            // fec0::/10 was that once.
            IpAddr::V6(six) if six.is_unique_local() || six.segments()[0] & 0xffc0 == 0xfec0 => Self::Private,
            IpAddr::V6(_) => Self::Public,
        }
    }

    fn of_v4(address: Ipv4Addr) -> Self {
        let [first, second, ..] = address.octets();
        if first == 0 || address.is_loopback() {
            Self::Loopback
        } else if address.is_link_local() || address.is_broadcast() {
            Self::Link
        } else if address.is_private() || first == 100 && second & 0xc0 == 64 {
            Self::Private
        } else {
            Self::Public
        }
    }

    /// Whether whoever is there may send us to another host that is `there`.
    pub(super) fn may_send_to(self, there: Self) -> bool {
        there != Self::Link && there <= self
    }

    /// What an address with this reach is called.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Public => "an address of the internet",
            Self::Private => "an address of a private network",
            Self::Loopback => "this host itself",
            Self::Link => "an address of the link, where clouds keep their machines' credentials",
        }
    }
}

/// The IPv4 address in an IPv6 one by which it is reached (RFC 4291, section 2.5.5; RFC 6052, section 2.1; RFC 3056, section 2).
fn embedded(address: IpAddr) -> IpAddr {
    let IpAddr::V6(six) = address else { return address };
    let four = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        IpAddr::V4(Ipv4Addr::new(a, b, c, d))
    };
    match six.segments() {
        [0, 0, 0, 0, 0, 0xffff, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] => four(high, low),
        [0x2002, high, low, ..] => four(high, low),
        _ => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reach(text: &str) -> Reach {
        Reach::of(text.parse().unwrap())
    }

    #[test]
    fn addresses_are_as_near_as_they_are() {
        for (wanted, addresses) in [
            (
                Reach::Public,
                &["1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1", "64:ff9b::101:101"][..],
            ),
            (
                Reach::Private,
                &["10.0.0.1", "172.16.3.4", "192.168.1.1", "100.64.0.1", "fd00::1", "::ffff:10.0.0.1"],
            ),
            (
                Reach::Loopback,
                &["127.0.0.1", "127.9.9.9", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1", "64:ff9b::7f00:1"],
            ),
            (
                Reach::Link,
                &[
                    "169.254.169.254",
                    "fe80::1",
                    "::ffff:169.254.169.254",
                    "2002:a9fe:a9fe::",
                    "fd00:ec2::254",
                ],
            ),
            (Reach::Link, &["100.100.100.200", "168.63.129.16", "224.0.0.1", "ff02::1", "255.255.255.255"]),
        ] {
            for address in addresses {
                assert_eq!(reach(address), wanted, "{address}");
            }
        }
    }

    #[test]
    fn nobody_sends_us_nearer_and_nobody_to_the_link() {
        use Reach::{Link, Loopback, Private, Public};
        for (from, to, may) in [
            (Public, Public, true),
            (Public, Private, false),
            (Public, Loopback, false),
            (Private, Public, true),
            (Private, Private, true),
            (Private, Loopback, false),
            (Loopback, Private, true),
            (Loopback, Loopback, true),
        ] {
            assert_eq!(from.may_send_to(to), may, "{from:?} to {to:?}");
        }
        assert!([Public, Private, Loopback, Link].iter().all(|from| !from.may_send_to(Link)));
    }
}
