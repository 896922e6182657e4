//! The TAP interfaces of this host, which are also the record of who has which number: an interface's alias tells its
//! machine, and the kernel gives each name once, whichever flyrun asks.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

use super::address::Number;

const INTERFACES: &str = "/sys/class/net";
/// The index of the loopback interface, in each network namespace (include/net/net_namespace.h, LOOPBACK_IFINDEX).
const LOOPBACK: u32 = 1;

/// Whose interface it is, as its alias tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The directory of running machines it belongs to, as a digest.
    pub host: u64,
    pub machine: String,
    /// What the machines of its network call it.
    pub name: String,
    /// The named network it is in, as a digest.
    pub network: Option<u64>,
}

impl Owner {
    fn alias(&self) -> String {
        let network = self.network.map_or_else(|| "-".to_string(), |network| format!("{network:016x}"));
        format!("flyrun {:016x} {} {} {network}", self.host, self.machine, self.name)
    }

    fn parse(alias: &str) -> Option<Owner> {
        let mut words = alias.trim_end().strip_prefix("flyrun ")?.split(' ');
        let mut next = || words.next().filter(|word| !word.is_empty());
        let host = u64::from_str_radix(next()?, 16).ok()?;
        let (machine, name) = (next()?.to_string(), next()?.to_string());
        let network = match next()? {
            "-" => None,
            digits => Some(u64::from_str_radix(digits, 16).ok()?),
        };
        Some(Owner { host, machine, name, network })
    }
}

impl Owner {
    /// The addresses of a machine in this one's network by its name or id, its own among them.
    pub fn find(&self, own: Number, name: &str) -> Option<(Ipv4Addr, Ipv6Addr)> {
        let is_called = |owner: &Owner| owner.machine == name || owner.name.eq_ignore_ascii_case(name);
        if is_called(self) {
            return Some((own.guest4(), own.guest6()));
        }
        self.network?;
        let others = list().into_iter();
        let found = others
            .filter_map(|(number, owner)| Some((number, owner?)))
            .find(|(_, owner)| owner.network == self.network && is_called(owner));
        found.map(|(number, _)| (number.guest4(), number.guest6()))
    }
}

/// All interfaces of flyrun's on this host. One without an owner was left half made.
pub fn list() -> Vec<(Number, Option<Owner>)> {
    let names = fs::read_dir(INTERFACES).into_iter().flatten().flatten();
    let numbers = names.filter_map(|entry| Number::of_tap(entry.file_name().to_str()?));
    let owner = |number: Number| {
        let alias = fs::read_to_string(format!("{INTERFACES}/{}/ifalias", number.tap())).ok()?;
        Owner::parse(&alias)
    };
    let mut all: Vec<_> = numbers.map(|number| (number, owner(number))).collect();
    all.sort_by_key(|(number, _)| *number);
    all
}

/// Makes the interface of that number, or else the first whose name is free, for so many pairs of queues.
///
/// # Errors
/// What /dev/net/tun says.
pub fn create(preferred: Option<Number>, queue_pairs: u16) -> io::Result<Number> {
    let taken: Vec<_> = list().into_iter().map(|(number, _)| number).collect();
    for number in
        preferred.into_iter().chain(Number::all()).filter(|number| taken.binary_search(number).is_err())
    {
        match vmm::PersistentTap::create(&number.tap(), queue_pairs > 1) {
            // Somebody who does not take flyrun's lock was faster.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
            made => return made.map(|()| number),
        }
    }
    Err(io::Error::other("all numbers of machines are taken"))
}

/// Brings the host's end up, with its addresses and the routes to the guest's, and writes down whose it is.
///
/// # Errors
/// What the kernel says to one of the messages.
pub fn configure(number: Number, owner: &Owner) -> io::Result<()> {
    let index = index(number)?;
    let mut up = LinkMessage::default();
    up.header.index = index;
    up.header.flags = LinkFlags::Up;
    up.header.change_mask = LinkFlags::Up;
    up.attributes.push(LinkAttribute::Address(number.gateway_mac().to_vec()));
    converse(&[
        (
            RouteNetlinkMessage::NewAddress(address(index, number.gateway4().into(), number.guest4().into())),
            NLM_F_CREATE,
        ),
        (
            RouteNetlinkMessage::NewAddress(address(index, number.gateway6().into(), number.guest6().into())),
            NLM_F_CREATE,
        ),
        (RouteNetlinkMessage::SetLink(up), 0),
        (RouteNetlinkMessage::NewRoute(route6(index, number)), NLM_F_CREATE),
        (RouteNetlinkMessage::NewNeighbour(neighbour(index, number.guest4().into(), number)), NLM_F_CREATE),
        (RouteNetlinkMessage::NewNeighbour(neighbour(index, number.guest6().into(), number)), NLM_F_CREATE),
        (RouteNetlinkMessage::SetLink(alias(index, owner)), 0),
    ])
}

/// Writes down whose it is, and how that machine is called now.
///
/// # Errors
/// What the kernel says.
pub fn tell_owner(number: Number, owner: &Owner) -> io::Result<()> {
    converse(&[(RouteNetlinkMessage::SetLink(alias(index(number)?, owner)), 0)])
}

fn index(number: Number) -> io::Result<u32> {
    let probe = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    Ok(rustix::net::netdevice::name_to_index(&probe, &number.tap())?)
}

fn alias(index: u32, owner: &Owner) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes.push(LinkAttribute::IfAlias(owner.alias()));
    message
}

/// IPv6 drops a peer's route when the carrier comes, so the way to the guest is a route of its own.
fn route6(index: u32, number: Number) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet6;
    message.header.destination_prefix_length = 128;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Boot;
    message.header.scope = RouteScope::Universe;
    message.header.kind = RouteType::Unicast;
    message.attributes =
        vec![RouteAttribute::Destination(RouteAddress::Inet6(number.guest6())), RouteAttribute::Oif(index)];
    message
}

/// An address; in IPv4 its peer brings the route to it along.
fn address(index: u32, own: IpAddr, peer: IpAddr) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    (message.header.family, message.header.prefix_len) = match own {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    };
    if own.is_ipv6() {
        message.header.flags = AddressHeaderFlags::Nodad;
    }
    let other = if own.is_ipv6() { own } else { peer };
    message.attributes = vec![AddressAttribute::Local(own), AddressAttribute::Address(other)];
    message
}

/// Who has an address of the guest's is known. Nobody is asked, who on a busy host may not answer in time, and a first request
/// does not wait for the answer.
fn neighbour(index: u32, guest: IpAddr, number: Number) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.header.family = if guest.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.attributes = vec![
        NeighbourAttribute::Destination(guest.into()),
        NeighbourAttribute::LinkLayerAddress(number.mac().to_vec()),
    ];
    message
}

/// The addresses of interfaces that are gone, their guests' too, on the host's loopback until this is dropped.
#[derive(Debug)]
pub struct StandIn<'a>(&'a [Number]);

impl StandIn<'_> {
    /// Puts them there, as far as the kernel lets it.
    pub fn begin(numbers: &[Number]) -> StandIn<'_> {
        let stand_in = StandIn(numbers);
        for address in stand_in.addresses() {
            let _ = converse(&[(RouteNetlinkMessage::NewAddress(address), NLM_F_CREATE)]);
        }
        stand_in
    }

    fn addresses(&self) -> impl Iterator<Item = AddressMessage> {
        let of = |number: &Number| -> [IpAddr; 4] {
            [
                number.gateway4().into(),
                number.guest4().into(),
                number.gateway6().into(),
                number.guest6().into(),
            ]
        };
        self.0.iter().flat_map(of).map(|own| address(LOOPBACK, own, own))
    }
}

impl Drop for StandIn<'_> {
    fn drop(&mut self) {
        for address in self.addresses() {
            let _ = converse(&[(RouteNetlinkMessage::DelAddress(address), 0)]);
        }
    }
}

/// Removes interfaces; one that is gone already is no failure.
///
/// # Errors
/// What the kernel says.
pub fn delete(numbers: &[Number]) -> io::Result<()> {
    for number in numbers {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(number.tap()));
        match converse(&[(RouteNetlinkMessage::DelLink(message), 0)]) {
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error()) => {}
            other => other?,
        }
    }
    Ok(())
}

/// Sends all messages at once, and reads what the kernel says to each.
fn converse(messages: &[(RouteNetlinkMessage, u16)]) -> io::Result<()> {
    let socket = Socket::new(NETLINK_ROUTE)?;
    let mut bytes = Vec::new();
    for (message, flags) in messages {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message.clone()));
        message.finalize();
        let start = bytes.len();
        bytes.resize(start + message.buffer_len(), 0);
        message.serialize(bytes.get_mut(start..).unwrap_or_default());
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    socket.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
    for _ in messages {
        let (answer, _) = socket.recv_from_full()?;
        let parsed = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer).map_err(io::Error::other)?;
        if let NetlinkPayload::Error(error) = parsed.payload
            && error.code.is_some()
        {
            return Err(error.to_io());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alias_tells_the_owner_and_others_tell_nothing() {
        for network in [None, Some(7)] {
            let owner = Owner { host: u64::MAX, machine: "0a".into(), name: "web.1".into(), network };
            assert_eq!(Owner::parse(&format!("{}\n", owner.alias())), Some(owner));
        }
        for alias in ["", "flyrun", "flyrun x y z -", "docker0", "flyrun 1 a", "flyrun 1 a b g"] {
            assert_eq!(Owner::parse(alias), None, "{alias}");
        }
    }

    #[test]
    fn an_alias_is_short_enough_for_the_longest_names() {
        let name = "n".repeat(63);
        let owner = Owner { host: 0, machine: name.clone(), name, network: Some(0) };
        assert!(owner.alias().len() < 256);
    }
}
