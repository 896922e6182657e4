//! The machine's name server, on the host's end of its cable: it knows the machines of its network, and passes all else
//! on to the host's name servers, which may well be on the host's loopback, where the machine itself cannot ask.
//!
//! One thread for a machine. What is under way is bounded; a guest that asks more than that only slows itself down.

pub mod answer;
mod forward;
pub mod tcp;

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use self::forward::Forward;
use super::address::Number;
use super::link::Owner;
use crate::error::{Context, Result};
use crate::pace::Pace;

const PORT: u16 = 53;
/// More than any question needs, and what most answers are limited to (RFC 6891).
const MAX_UDP_BYTES: usize = 4096;
/// Questions by UDP that wait for an answer of the host's name servers.
const MAX_UNDER_WAY: usize = 64;
/// Questions of a machine in a second, in the long run, and at once. Each is a look at all of the host's interfaces.
const QUESTIONS_PER_SECOND: u32 = 1000;
const QUESTIONS_AT_ONCE: u32 = 1000;
/// How long a name server has before the next one is asked.
const PATIENCE: Duration = Duration::from_secs(2);
const HOSTS_RESOLVER: &str = "/etc/resolv.conf";
const STACK_BYTES: usize = 128 << 10;

/// A running name server; dropping it ends it.
#[derive(Debug)]
pub struct Server {
    /// Its closing tells the thread.
    _alive: UnixStream,
}

/// Whom to answer for, and whom to ask.
#[derive(Clone, Debug)]
struct Sources {
    number: Number,
    owner: Owner,
    servers: Vec<IpAddr>,
}

impl Server {
    /// Starts it on the gateway's address. `None` where the host itself serves names on all its addresses: then that is
    /// what the machine asks.
    ///
    /// # Errors
    /// The host grants no socket or thread.
    pub fn start(number: Number, owner: Owner, servers: Vec<IpAddr>) -> Result<Option<Server>> {
        let address = SocketAddr::new(number.gateway4().into(), PORT);
        let bound = UdpSocket::bind(address).and_then(|udp| Ok((udp, TcpListener::bind(address)?)));
        let (udp, tcp) = match bound {
            Ok(sockets) => sockets,
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => return Ok(None),
            Err(error) => return Err(error).context(format!("cannot serve names on {address}")),
        };
        let told = "cannot start the machine's name server";
        udp.set_nonblocking(true).and_then(|()| tcp.set_nonblocking(true)).context(told)?;
        let (alive, ended) = UnixStream::pair().context(told)?;
        let sources = Sources { number, owner, servers };
        let pace = Pace::new(QUESTIONS_PER_SECOND, QUESTIONS_AT_ONCE, Instant::now());
        let thread = std::thread::Builder::new().name("names".into()).stack_size(STACK_BYTES);
        thread
            .spawn(move || Loop { sources, udp, tcp, ended, under_way: Vec::new(), pace }.run())
            .context(told)?;
        Ok(Some(Server { _alive: alive }))
    }
}

impl Sources {
    /// Those that the user named, or the host's at this moment.
    fn servers(&self) -> Vec<SocketAddr> {
        let hosts = || name_servers(&fs::read_to_string(HOSTS_RESOLVER).unwrap_or_default());
        let servers = if self.servers.is_empty() { hosts() } else { self.servers.clone() };
        servers.into_iter().map(|server| SocketAddr::new(server, PORT)).collect()
    }

    /// Whether it is the machine that asks. Names of its network are nobody else's.
    fn is_own(&self, client: SocketAddr) -> bool {
        client.ip() == IpAddr::V4(self.number.guest4())
    }

    fn own_answer(&self, question: &[u8]) -> Option<Vec<u8>> {
        answer::own(question, |name| self.owner.find(self.number, name))
    }
}

/// What the machine's own /etc/resolv.conf says: this server, and the host's habits.
pub fn resolv_conf(gateway: IpAddr) -> Vec<String> {
    let hosts = fs::read_to_string(HOSTS_RESOLVER).unwrap_or_default();
    let habits = hosts
        .lines()
        .map(str::trim)
        .filter(|line| ["search ", "domain ", "options "].iter().any(|habit| line.starts_with(habit)));
    std::iter::once(format!("nameserver {gateway}")).chain(habits.map(str::to_string)).collect()
}

/// As resolv.conf(5) has it: three at most, and the local host where there is none.
fn name_servers(resolv_conf: &str) -> Vec<IpAddr> {
    let mut servers: Vec<IpAddr> = resolv_conf
        .lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver")?.split_whitespace().next()?.parse().ok())
        .take(3)
        .collect();
    if servers.is_empty() {
        servers.push(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST));
    }
    servers
}

struct Loop {
    sources: Sources,
    udp: UdpSocket,
    tcp: TcpListener,
    ended: UnixStream,
    under_way: Vec<Forward>,
    pace: Pace,
}

impl Loop {
    fn run(mut self) {
        loop {
            let ready = match self.wait() {
                Ok(ready) => ready,
                Err(_) => return,
            };
            let [ended, udp, tcp, forwards @ ..] = ready.as_slice() else { return };
            if *ended {
                return;
            }
            let forwards = forwards.to_vec();
            self.pass_on(&forwards);
            if *udp {
                self.take_questions();
            }
            if *tcp
                && let Ok((stream, client)) = self.tcp.accept()
                && self.sources.is_own(client)
            {
                self.pace.wait();
                tcp::serve(stream, self.sources.clone());
            }
        }
    }

    /// Which of the end, the sockets and the questions under way have something to say.
    fn wait(&self) -> io::Result<Vec<bool>> {
        let mut fds = vec![
            PollFd::new(&self.ended, PollFlags::IN),
            PollFd::new(&self.udp, PollFlags::IN),
            PollFd::new(&self.tcp, PollFlags::IN),
        ];
        fds.extend(self.under_way.iter().map(|forward| PollFd::new(forward.socket(), PollFlags::IN)));
        let next = self.under_way.iter().map(Forward::deadline).min();
        let timeout = next.map(|at| {
            let left = at.saturating_duration_since(Instant::now());
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        Ok(fds.iter().map(|fd| !fd.revents().is_empty()).collect())
    }

    fn take_questions(&mut self) {
        let mut buffer = [0; MAX_UDP_BYTES];
        for _ in 0..MAX_UNDER_WAY {
            let Ok((length, client)) = self.udp.recv_from(&mut buffer) else { return };
            // What the rules have let through by mistake, or on a host where others have removed them.
            if !self.sources.is_own(client) {
                continue;
            }
            self.pace.wait();
            let question = buffer.get(..length).unwrap_or_default();
            if let Some(answer) = self.sources.own_answer(question) {
                let _ = self.udp.send_to(&answer, client);
            } else if let Some(id) = answer::id_of_question(question)
                && self.under_way.len() < MAX_UNDER_WAY
                && let Some(forward) = Forward::new(id, question, client, self.sources.servers())
            {
                self.under_way.push(forward);
            }
        }
    }

    /// Hands answers to those who asked, and asks the next server where one was silent.
    fn pass_on(&mut self, ready: &[bool]) {
        let now = Instant::now();
        let mut readiness = ready.iter();
        let udp = &self.udp;
        self.under_way.retain_mut(|forward| {
            if readiness.next().copied().unwrap_or(false) {
                if let Some(answer) = forward.answer() {
                    let _ = udp.send_to(&answer, forward.client());
                    return false;
                }
            } else if forward.deadline() > now {
                return true;
            }
            forward.ask_next()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_are_read_as_resolv_conf_has_them() {
        let text = "# c\nsearch a\nnameserver 127.0.0.53\n nameserver\t::1 # x\nnameserver bad\nnameserver 1.1.1.1\nnameserver 8.8.8.8\n";
        let told: Vec<_> = name_servers(text).iter().map(IpAddr::to_string).collect();
        assert_eq!(told, ["127.0.0.53", "::1", "1.1.1.1"]);
        assert_eq!(name_servers("").len(), 1);
    }
}
