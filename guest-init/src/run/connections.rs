//! Ends the TCP connections that lead out of a machine which was on disk: sock_diag(7) finds them, and SOCK_DESTROY gives the
//! workload ECONNABORTED instead of leaving it to wait for a peer that the host has reset.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;

use rustix::{
    io::Errno,
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with},
};

// linux/sock_diag.h, linux/inet_diag.h, linux/netlink.h and net/tcp_states.h.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
/// All but CLOSE (7) and LISTEN (10): states are bits by their numbers.
const STATES: u32 = 0xfff & !(1 << 7) & !(1 << 10);
/// struct nlmsghdr.
const HEADER: usize = 16;
/// struct inet_diag_sockid, and where it lies in struct inet_diag_msg.
const ID: usize = 48;
const ID_AT: usize = 4;
/// The kernel fills at most so much at a time.
const ANSWER: usize = 32 * 1024;
/// A workload with more connections keeps the rest.
const MOST: usize = 65536;

/// One connection, as the kernel identifies it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Connection {
    family: u8,
    id: [u8; ID],
}

/// Ends all of them, and says how many. A kernel that cannot (CONFIG_INET_DIAG_DESTROY) leaves them as they are.
pub fn end() -> usize {
    let families = [libc::AF_INET as u8, libc::AF_INET6 as u8];
    families.into_iter().filter_map(|family| end_of(family).ok()).sum()
}

fn conversation() -> rustix::io::Result<OwnedFd> {
    socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(netlink::SOCK_DIAG))
}

fn list(socket: &OwnedFd, family: u8, answer: &mut [u8]) -> rustix::io::Result<Vec<Connection>> {
    send(socket, &request(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, family, STATES, &[0; ID]), SendFlags::empty())?;
    let mut connections = Vec::new();
    while connections.len() < MOST {
        let (length, _) = recv(socket, &mut *answer, RecvFlags::empty())?;
        if length == 0 || !read(answer.get(..length).unwrap_or_default(), &mut connections)? {
            break;
        }
    }
    Ok(connections)
}

fn end_of(family: u8) -> rustix::io::Result<usize> {
    let socket = conversation()?;
    let mut answer = vec![0; ANSWER];
    let connections = list(&socket, family, &mut answer)?;
    let mut ended = 0;
    for connection in connections.iter().filter(|connection| connection.leads_out()) {
        let message = request(SOCK_DESTROY, NLM_F_ACK, connection.family, STATES, &connection.id);
        send(&socket, &message, SendFlags::empty())?;
        let (length, _) = recv(&socket, &mut answer[..], RecvFlags::empty())?;
        // One may have ended by itself.
        ended += usize::from(error(answer.get(..length).unwrap_or_default()) == Some(0));
    }
    Ok(ended)
}

/// A message with a struct inet_diag_req_v2.
fn request(kind: u16, flags: u16, family: u8, states: u32, id: &[u8; ID]) -> Vec<u8> {
    let mut message = Vec::with_capacity(HEADER + 8 + ID);
    message.extend_from_slice(&((HEADER + 8 + ID) as u32).to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
    // Sequence and port: there is one question at a time.
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(&[family, libc::IPPROTO_TCP as u8, 0, 0]);
    message.extend_from_slice(&states.to_ne_bytes());
    message.extend_from_slice(id);
    message
}

/// Takes the connections of one answer. `false` behind the last.
fn read(mut answer: &[u8], to: &mut Vec<Connection>) -> rustix::io::Result<bool> {
    while let Some((length, kind)) = header(answer) {
        match kind {
            NLMSG_DONE => return Ok(false),
            NLMSG_ERROR => return Err(Errno::from_raw_os_error(error(answer).unwrap_or(libc::EPROTO))),
            _ => {}
        }
        let body = answer.get(HEADER..length).ok_or(Errno::PROTO)?;
        if let (Some(family), Some(id)) = (body.first(), body.get(ID_AT..ID_AT + ID)) {
            to.push(Connection { family: *family, id: id.try_into().map_err(|_| Errno::PROTO)? });
        }
        answer = answer.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(true)
}

/// Length and type of the message that begins here.
fn header(answer: &[u8]) -> Option<(usize, u16)> {
    let length = u32::from_ne_bytes(*answer.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*answer.get(4..)?.first_chunk()?);
    (length >= HEADER).then_some((length, kind))
}

/// What an NLMSG_ERROR says: 0 is an acknowledgement.
fn error(answer: &[u8]) -> Option<i32> {
    let (_, kind) = header(answer)?;
    let code = i32::from_ne_bytes(*answer.get(HEADER..)?.first_chunk()?);
    (kind == NLMSG_ERROR).then_some(code.saturating_neg())
}

impl Connection {
    /// Whether its peer is another machine: neither a loopback address nor the own one.
    fn leads_out(&self) -> bool {
        let (own, peer) = (self.address(4), self.address(20));
        match (own, peer) {
            (Some(own), Some(peer)) => !peer.is_loopback() && !peer.is_unspecified() && own != peer,
            _ => false,
        }
    }

    /// The address there, of which an IPv4 one has the first 4 bytes.
    fn address(&self, at: usize) -> Option<IpAddr> {
        let bytes = self.id.get(at..)?;
        match i32::from(self.family) {
            libc::AF_INET => Some(Ipv4Addr::from(*bytes.first_chunk::<4>()?).into()),
            libc::AF_INET6 => Some(Ipv6Addr::from(*bytes.first_chunk::<16>()?).to_canonical()),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};

    use super::*;

    fn connection(own: IpAddr, peer: IpAddr) -> Connection {
        let mut connection = Connection { family: libc::AF_INET as u8, id: [0; ID] };
        for (at, address) in [(4, own), (20, peer)] {
            match address {
                IpAddr::V4(address) => connection.id[at..at + 4].copy_from_slice(&address.octets()),
                IpAddr::V6(address) => {
                    connection.family = libc::AF_INET6 as u8;
                    connection.id[at..at + 16].copy_from_slice(&address.octets());
                }
            }
        }
        connection
    }

    #[test]
    fn only_what_has_its_peer_elsewhere_leads_out() {
        let leads_out =
            |own: &str, peer: &str| connection(own.parse().unwrap(), peer.parse().unwrap()).leads_out();
        assert!(leads_out("10.91.0.3", "10.91.0.2"));
        assert!(leads_out("fd66::3", "2001:db8::1"));
        assert!(leads_out("::ffff:10.91.0.3", "::ffff:192.0.2.1"));
        for (own, peer) in [
            ("127.0.0.1", "127.0.0.1"),
            ("10.91.0.3", "10.91.0.3"),
            ("::1", "::1"),
            ("::ffff:127.0.0.1", "::ffff:127.0.0.2"),
        ] {
            assert!(!leads_out(own, peer), "{own} {peer}");
        }
    }

    #[test]
    fn an_answer_with_impossible_lengths_gives_nothing() {
        for length in 0..64u32 {
            let mut answer = vec![0; 64];
            answer[..4].copy_from_slice(&length.to_ne_bytes());
            let mut found = Vec::new();
            let _ = read(&answer, &mut found);
            assert!(found.len() <= 1);
        }
        assert_eq!(error(&[0xff; 8]), None);
    }

    /// The kernel of a developer's machine lists connections too, and an ordinary user may not end any.
    #[test]
    fn the_kernel_tells_of_connections() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(server.local_addr().unwrap()).unwrap();
        let own = client.local_addr().unwrap().port();
        let Ok(socket) = conversation() else { return };
        let found = list(&socket, libc::AF_INET as u8, &mut vec![0; ANSWER]).unwrap();
        assert!(found.iter().any(|connection| connection.id[..2] == own.to_be_bytes()), "{found:?}");
        client.set_nonblocking(true).unwrap();
        assert!(client.read(&mut [0]).is_err(), "it goes on");
    }
}
