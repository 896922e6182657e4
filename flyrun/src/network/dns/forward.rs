//! A question by UDP on its way to the host's name servers, one after another.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Instant;

use super::{MAX_UDP_BYTES, PATIENCE};

/// One question. Its socket is its own, so that the kernel picks a port that nobody can guess, and drops what comes from
/// elsewhere.
pub struct Forward {
    id: [u8; 2],
    question: Vec<u8>,
    client: SocketAddr,
    servers: std::vec::IntoIter<SocketAddr>,
    socket: UdpSocket,
    deadline: Instant,
}

impl Forward {
    /// Asks the first server; `None` when there is none that can be asked.
    pub fn new(id: [u8; 2], question: &[u8], client: SocketAddr, servers: Vec<SocketAddr>) -> Option<Self> {
        let mut servers = servers.into_iter();
        let socket = ask(question, &mut servers)?;
        let deadline = Instant::now() + PATIENCE;
        Some(Forward { id, question: question.to_vec(), client, servers, socket, deadline })
    }

    pub fn socket(&self) -> &UdpSocket {
        &self.socket
    }

    pub fn client(&self) -> SocketAddr {
        self.client
    }

    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// The server's answer, if that is what has arrived.
    pub fn answer(&self) -> Option<Vec<u8>> {
        let mut buffer = [0; MAX_UDP_BYTES];
        let length = self.socket.recv(&mut buffer).ok()?;
        let answer = buffer.get(..length)?;
        answer.starts_with(&self.id).then(|| answer.to_vec())
    }

    /// False when nobody is left to be asked.
    pub fn ask_next(&mut self) -> bool {
        let Some(socket) = ask(&self.question, &mut self.servers) else { return false };
        self.socket = socket;
        self.deadline = Instant::now() + PATIENCE;
        true
    }
}

fn ask(question: &[u8], servers: &mut impl Iterator<Item = SocketAddr>) -> Option<UdpSocket> {
    servers.find_map(|server| {
        let any: IpAddr = match server {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((any, 0)).ok()?;
        socket.set_nonblocking(true).ok()?;
        socket.connect(server).ok()?;
        socket.send(question).ok()?;
        Some(socket)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_server_is_asked_when_one_cannot_be() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        let client = "127.0.0.1:9".parse().unwrap();
        let servers = vec!["255.255.255.255:53".parse().unwrap(), server.local_addr().unwrap()];
        let mut forward = Forward::new([1, 2], &[1, 2, 3], client, servers).unwrap();
        let mut got = [0; 8];
        let (length, asker) = server.recv_from(&mut got).unwrap();
        assert_eq!(got[..length], [1, 2, 3]);
        server.send_to(&[9, 9, 9], asker).unwrap();
        server.send_to(&[1, 2, 4], asker).unwrap();
        forward.socket.set_nonblocking(false).unwrap();
        forward.socket.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(forward.answer(), None, "an answer with a foreign id was taken");
        assert_eq!(forward.answer(), Some(vec![1, 2, 4]));
        assert!(!forward.ask_next());
    }
}
