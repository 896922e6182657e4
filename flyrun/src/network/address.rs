//! What follows from a machine's number in the host's network: the names and addresses on both ends of its cable.

use std::net::{Ipv4Addr, Ipv6Addr};

const TAP_PREFIX: &str = "fly";
/// 10.91.0.0/16: two addresses for each machine, the gateway's and its own.
pub const SUBNET4: &str = "10.91.0.0/16";
/// A unique local prefix (RFC 4193); "flyr" is its global id.
pub const SUBNET6: &str = "fd66:6c79:7200::/64";
const BASE4: u32 = 0x0a5b_0000;
const BASE6: u128 = 0xfd66_6c79_7200_0000 << 64;

/// A machine's number: lives on this host in one network namespace have different ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Number(u16);

impl Number {
    /// The first address of the subnet is its own name, and the last one its broadcast.
    pub const LAST: u16 = 0x7ffe;

    pub fn new(number: u16) -> Option<Number> {
        (1..=Self::LAST).contains(&number).then_some(Number(number))
    }

    pub fn get(self) -> u16 {
        self.0
    }

    /// All that there are.
    pub fn all() -> impl Iterator<Item = Number> {
        (1..=Self::LAST).map(Number)
    }

    /// The number of an interface that is named as flyrun names its own.
    pub fn of_tap(name: &str) -> Option<Number> {
        let digits = name.strip_prefix(TAP_PREFIX)?;
        let number = digits.parse().ok().filter(|number| (1..=Self::LAST).contains(number)).map(Number)?;
        (number.tap() == name).then_some(number)
    }

    /// The TAP interface on the host.
    pub fn tap(self) -> String {
        format!("{TAP_PREFIX}{}", self.0)
    }

    /// The guest's Ethernet address: locally administered, "fly" and the number.
    pub fn mac(self) -> [u8; 6] {
        let [high, low] = self.0.to_be_bytes();
        [0x02, 0x66, 0x6c, 0x79, high, low]
    }

    /// The Ethernet address of the host's end: the same whenever the interface is made again, so that a guest which has known it
    /// still does.
    pub fn gateway_mac(self) -> [u8; 6] {
        let [high, low] = self.0.to_be_bytes();
        [0x06, 0x66, 0x6c, 0x79, high, low]
    }

    /// The host's end.
    pub fn gateway4(self) -> Ipv4Addr {
        Ipv4Addr::from(BASE4 + 2 * u32::from(self.0))
    }

    /// The guest's end.
    pub fn guest4(self) -> Ipv4Addr {
        Ipv4Addr::from(BASE4 + 2 * u32::from(self.0) + 1)
    }

    /// The host's end.
    pub fn gateway6(self) -> Ipv6Addr {
        Ipv6Addr::from(BASE6 + 2 * u128::from(self.0))
    }

    /// The guest's end.
    pub fn guest6(self) -> Ipv6Addr {
        Ipv6Addr::from(BASE6 + 2 * u128::from(self.0) + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_make_addresses_in_the_subnet_and_names_that_lead_back() {
        let mut seen = std::collections::HashSet::new();
        for number in Number::all() {
            for address in [number.gateway4(), number.guest4()] {
                assert_eq!(address.octets()[..2], [10, 91]);
                assert!(seen.insert(address), "{address} is given twice");
            }
            assert_eq!(Number::of_tap(&number.tap()), Some(number));
            assert_eq!(number.tap().len().max(15), 15);
        }
        assert!(
            !seen.contains(&Ipv4Addr::new(10, 91, 0, 0)) && !seen.contains(&Ipv4Addr::new(10, 91, 255, 255))
        );
        assert_eq!(Number(1).guest6().to_string(), "fd66:6c79:7200::3");
    }

    #[test]
    fn other_interfaces_are_not_flyruns() {
        for name in ["eth0", "fly", "fly0", "fly01", "fly32767", "fly99999", "flying1", "fly+1"] {
            assert_eq!(Number::of_tap(name), None, "{name}");
        }
    }
}
