//! What becomes of the TCP connections of a machine that is gone: their other ends are reset, and not left waiting.
//!
//! The host's kernel knows the connections (conntrack) but not where in their streams they are, so it cannot end them by
//! itself. But whoever gets a segment that cannot be right answers where it is (RFC 9293, 3.10.7.4), and to an answer to nobody
//! the host's TCP says RST, with just the right number. So the connections are forgotten first, by which nothing is
//! translated for them any more, and then such a segment goes to each other end.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr as NetlinkAddr};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, ipproto, sendto, socket_with};

use super::address::Number;
use super::link;
use super::nfnetlink::{
    ACK, DONE, DUMP, ERROR, NESTED, REQUEST, attribute, failure, find, message, messages,
};

// include/uapi/linux/netfilter/nfnetlink.h and netfilter/nfnetlink_conntrack.h.
const CONNTRACK: u16 = 1 << 8;
const NEW: u16 = CONNTRACK;
const GET: u16 = CONNTRACK | 1;
const DELETE: u16 = CONNTRACK | 2;
const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
const PROTO_NUM: u16 = 1;
const PROTO_SRC_PORT: u16 = 2;
const PROTO_DST_PORT: u16 = 3;
const TCP: u8 = 6;

/// The most connections that are dealt with, far beyond those of any machine.
const MAX_CONNECTIONS: usize = 65_536;
/// The most datagrams of a dump that are read.
const MAX_DATAGRAMS: usize = 1 << 16;

/// One direction of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Tuple {
    source: SocketAddr,
    destination: SocketAddr,
    protocol: u8,
    /// As the kernel gave it, to name the connection by.
    raw: Vec<u8>,
}

/// A connection as conntrack knows it: whoever began it sees the first tuple, the other the second turned round.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Connection {
    orig: Tuple,
    reply: Tuple,
}

/// The two ends of a connection as its other end knows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ends {
    own: SocketAddr,
    peer: SocketAddr,
}

impl Connection {
    /// What the other end of one of the machine's connections sees; `None` of somebody else's.
    fn ends(&self, machines: &[IpAddr]) -> Option<Ends> {
        if machines.contains(&self.reply.source.ip()) {
            return Some(Ends { own: self.orig.destination, peer: self.orig.source });
        }
        machines
            .contains(&self.orig.source.ip())
            .then_some(Ends { own: self.reply.destination, peer: self.orig.destination })
    }
}

/// The connections of machines that are about to be taken away.
#[derive(Debug, Default)]
pub struct Connections(Vec<(Connection, Ends)>);

impl Connections {
    /// Finds them: before the interfaces and rules go, with which the kernel forgets some of them. A host that does not tell
    /// leaves the other ends waiting.
    pub fn of(numbers: &[Number]) -> Connections {
        let machines: Vec<IpAddr> =
            numbers.iter().flat_map(|number| [number.guest4().into(), number.guest6().into()]).collect();
        // Without conntrack nothing was translated, and without rights there was no network.
        let connections = list().unwrap_or_default().into_iter();
        Connections(connections.filter_map(|one| one.ends(&machines).map(|ends| (one, ends))).collect())
    }

    /// Resets their other ends. After the interfaces and rules are gone.
    pub fn reset(self, numbers: &[Number]) {
        // This host's own connections are between two addresses that went with the interface. For this moment both are the
        // host's, which knows of one end only.
        let gateways: Vec<IpAddr> =
            numbers.iter().flat_map(|number| [number.gateway4().into(), number.gateway6().into()]).collect();
        let has_own = self.0.iter().any(|(_, ends)| gateways.contains(&ends.peer.ip()));
        let _stand_in = has_own.then(|| link::StandIn::begin(numbers));
        for (connection, _) in &self.0 {
            // Most often it is gone already.
            let _ = forget(connection);
        }
        for (_, ends) in self.0.iter().filter(|(connection, _)| connection.orig.protocol == TCP) {
            // The one or the other is outside of any window.
            for sequence in [0, 1 << 31] {
                let _ = provoke(*ends, sequence);
            }
        }
    }
}

fn list() -> io::Result<Vec<Connection>> {
    let mut connections = Vec::new();
    let socket = Socket::new(NETLINK_NETFILTER)?;
    socket.send_to(&message(GET, REQUEST | DUMP, 0, &[]), &NetlinkAddr::new(0, 0), 0)?;
    for _ in 0..MAX_DATAGRAMS {
        let (datagram, _) = socket.recv_from_full()?;
        for (kind, body) in messages(&datagram) {
            match kind {
                DONE => return Ok(connections),
                ERROR => return Err(failure(body)),
                NEW if connections.len() < MAX_CONNECTIONS => connections.extend(connection(body)),
                _ => {}
            }
        }
    }
    Ok(connections)
}

fn forget(connection: &Connection) -> io::Result<()> {
    let family = if connection.orig.source.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let tuple = attribute(TUPLE_ORIG | NESTED, &connection.orig.raw);
    let request = message(DELETE, REQUEST | ACK, family.as_raw() as u8, &tuple);
    let socket = Socket::new(NETLINK_NETFILTER)?;
    socket.send_to(&request, &NetlinkAddr::new(0, 0), 0)?;
    let (answer, _) = socket.recv_from_full()?;
    match messages(&answer).next() {
        Some((ERROR, body)) if body.first_chunk() == Some(&[0; 4]) => Ok(()),
        Some((ERROR, body)) => Err(failure(body)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn connection(body: &[u8]) -> Option<Connection> {
    let attributes = body.get(4..)?;
    let side = |kind| tuple(find(attributes, kind)?);
    Some(Connection { orig: side(TUPLE_ORIG)?, reply: side(TUPLE_REPLY)? })
}

fn tuple(raw: &[u8]) -> Option<Tuple> {
    let (ip, protocol) = (find(raw, TUPLE_IP)?, find(raw, TUPLE_PROTO)?);
    // Source and destination of IPv4 are 1 and 2, those of IPv6 3 and 4.
    let address = |four, six| -> Option<IpAddr> {
        match (find(ip, four), find(ip, six)) {
            (Some(four), _) => Some(Ipv4Addr::from(*four.first_chunk::<4>()?).into()),
            (None, six) => Some(Ipv6Addr::from(*six?.first_chunk::<16>()?).into()),
        }
    };
    // Those of ICMP have none.
    let port =
        |kind| find(protocol, kind).and_then(|port| port.first_chunk()).map_or(0, |p| u16::from_be_bytes(*p));
    Some(Tuple {
        source: SocketAddr::new(address(1, 3)?, port(PROTO_SRC_PORT)),
        destination: SocketAddr::new(address(2, 4)?, port(PROTO_DST_PORT)),
        protocol: *find(protocol, PROTO_NUM)?.first()?,
        raw: raw.to_vec(),
    })
}

/// Sends the other end a segment of this one that carries nothing.
fn provoke(ends: Ends, sequence: u32) -> io::Result<()> {
    let packet = packet(ends, sequence).ok_or(io::ErrorKind::InvalidInput)?;
    let family = if ends.peer.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::RAW))?;
    let destination = SocketAddr::new(ends.peer.ip(), 0);
    sendto(&socket, &packet, SendFlags::empty(), &destination)?;
    Ok(())
}

/// An IP packet with that segment; `None` if the ends are of different families.
fn packet(ends: Ends, sequence: u32) -> Option<Vec<u8>> {
    let mut segment = Vec::with_capacity(20);
    segment.extend(ends.own.port().to_be_bytes());
    segment.extend(ends.peer.port().to_be_bytes());
    segment.extend(sequence.to_be_bytes());
    // Acknowledged: nothing. Five words of header, flag ACK, no window, then checksum and urgent pointer.
    segment.extend([0, 0, 0, 0, 0x50, 0x10, 0, 0, 0, 0, 0, 0]);
    let (header, addresses) = match (ends.own.ip(), ends.peer.ip()) {
        (IpAddr::V4(own), IpAddr::V4(peer)) => {
            let addresses = [own.octets(), peer.octets()].concat();
            // The kernel fills in length, identification and checksum.
            let mut header = vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, TCP, 0, 0];
            header.extend(&addresses);
            (header, addresses)
        }
        (IpAddr::V6(own), IpAddr::V6(peer)) => {
            let addresses = [own.octets(), peer.octets()].concat();
            let mut header = vec![0x60, 0, 0, 0, 0, segment.len() as u8, TCP, 64];
            header.extend(&addresses);
            (header, addresses)
        }
        _ => return None,
    };
    let pseudo = [&addresses[..], &[0, TCP, 0, segment.len() as u8], &segment].concat();
    segment.get_mut(16..18)?.copy_from_slice(&checksum(&pseudo).to_be_bytes());
    Some([header, segment].concat())
}

/// RFC 1071, of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let words =
        bytes.chunks_exact(2).map(|pair| pair.iter().fold(0, |word, byte| word << 8 | u32::from(*byte)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encoded(source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
        let ip = match (source.ip(), destination.ip()) {
            (IpAddr::V4(a), IpAddr::V4(b)) => [attribute(1, &a.octets()), attribute(2, &b.octets())].concat(),
            (IpAddr::V6(a), IpAddr::V6(b)) => [attribute(3, &a.octets()), attribute(4, &b.octets())].concat(),
            _ => unreachable!(),
        };
        let protocol = [
            attribute(PROTO_NUM, &[TCP]),
            attribute(PROTO_SRC_PORT, &source.port().to_be_bytes()),
            attribute(PROTO_DST_PORT, &destination.port().to_be_bytes()),
        ]
        .concat();
        [attribute(TUPLE_IP | NESTED, &ip), attribute(TUPLE_PROTO | NESTED, &protocol)].concat()
    }

    fn known(orig: [&str; 2], reply: [&str; 2]) -> Connection {
        let side = |kind, [source, destination]: [&str; 2]| {
            attribute(kind | NESTED, &encoded(source.parse().unwrap(), destination.parse().unwrap()))
        };
        let attributes = [side(TUPLE_ORIG, orig), side(TUPLE_REPLY, reply)].concat();
        let datagram = message(NEW, 0, 2, &attributes);
        let (kind, body) = messages(&datagram).next().unwrap();
        assert_eq!(kind, NEW);
        connection(body).unwrap()
    }

    #[test]
    fn the_other_end_is_found_of_connections_from_outside_and_to_outside() {
        let machines = ["10.91.0.3".parse().unwrap(), "fd66:6c79:7200::3".parse().unwrap()];
        let ends =
            |own: &str, peer: &str| Some(Ends { own: own.parse().unwrap(), peer: peer.parse().unwrap() });
        let published = known(["192.0.2.1:40000", "192.0.2.2:8080"], ["10.91.0.3:80", "192.0.2.1:40000"]);
        assert_eq!(published.ends(&machines), ends("192.0.2.2:8080", "192.0.2.1:40000"));
        let masqueraded =
            known(["10.91.0.3:50000", "198.51.100.1:5432"], ["198.51.100.1:5432", "192.0.2.2:50001"]);
        assert_eq!(masqueraded.ends(&machines), ends("192.0.2.2:50001", "198.51.100.1:5432"));
        let six = known(
            ["[2001:db8::1]:40000", "[2001:db8::2]:8080"],
            ["[fd66:6c79:7200::3]:80", "[2001:db8::1]:40000"],
        );
        assert_eq!(six.ends(&machines), ends("[2001:db8::2]:8080", "[2001:db8::1]:40000"));
        let of_others = known(["10.91.0.5:1", "192.0.2.1:2"], ["192.0.2.1:2", "192.0.2.2:1"]);
        assert_eq!(of_others.ends(&machines), None);
    }

    #[test]
    fn a_segment_s_checksum_makes_the_sum_of_all_zero() {
        for (own, peer) in [("192.0.2.2:8080", "192.0.2.1:40000"), ("[2001:db8::2]:80", "[2001:db8::1]:4")] {
            let ends = Ends { own: own.parse().unwrap(), peer: peer.parse().unwrap() };
            let packet = packet(ends, 1 << 31).unwrap();
            let (header, segment) = packet.split_at(packet.len() - 20);
            let addresses = &header[header.len() - if ends.own.is_ipv4() { 8 } else { 32 }..];
            let pseudo = [addresses, &[0, TCP, 0, 20], segment].concat();
            assert_eq!(checksum(&pseudo), 0);
            assert_eq!(segment[..2], ends.own.port().to_be_bytes());
        }
        let mixed = Ends { own: "192.0.2.2:1".parse().unwrap(), peer: "[::1]:1".parse().unwrap() };
        assert_eq!(packet(mixed, 0), None);
    }

    proptest! {
        #[test]
        fn no_bytes_of_the_kernel_s_make_it_panic_or_loop(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            for (_, body) in messages(&bytes) {
                let _ = connection(body);
            }
            let _ = tuple(&bytes);
        }
    }
}
