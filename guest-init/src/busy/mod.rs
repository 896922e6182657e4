//! The lease by which a workload says that it works though nobody asks it anything: HTTP on a unix socket in the machine.
//!
//! The loop of PID 1 serves it, so nothing here waits, and whatever a process does there is bounded: so many connections, so many
//! bytes, so much time. Who holds a lease is not told apart: it is the machine's, lasts as long as the longest that was asked for,
//! and ends for all.

use std::{
    io::{ErrorKind, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::{UnixListener, UnixStream},
    },
};

use crate::{
    failure::Failure,
    pid1::{Kept, mount_at},
    run::early::COMMON,
};

mod request;

pub use request::{Asked, MAX_BYTES, Refused, read};

/// The socket, for all users of the machine.
pub const SOCKET: &str = "/run/flyrun/api.sock";
const DIRECTORY: &str = "/run/flyrun";
/// Of a filesystem for one socket.
const OPTIONS: &str = "mode=755,size=64k,nr_inodes=16";
/// Connections at a time; others wait.
const MAX_CLIENTS: usize = 8;
/// How long a client may take.
const CLIENT_LIMIT_MS: i64 = 5_000;

/// The socket, in a filesystem of its own: it is there before the machine's root is, and on the machine's disk it would be a directory
/// copied up, which is a start's longest write.
#[derive(Debug)]
pub struct Door {
    listener: UnixListener,
    mount: Kept,
}

impl Door {
    /// Listens. The umask of this process is 0.
    ///
    /// # Errors
    /// [`protocol::FailureKind::Setup`] naming the step.
    pub fn make() -> Result<Door, Failure> {
        mount_at("flyrun", DIRECTORY, "tmpfs", COMMON, OPTIONS)?;
        let listener = UnixListener::bind(SOCKET).and_then(|listener| {
            listener.set_nonblocking(true)?;
            Ok(listener)
        });
        let listener = listener.map_err(|error| {
            Failure::new(protocol::FailureKind::Setup, format!("cannot listen at {SOCKET}: {error}"))
        })?;
        Ok(Door { listener, mount: Kept::of(DIRECTORY)? })
    }

    /// Shows it in the root that this process sees now. A machine whose image leaves no place for it has no lease.
    pub fn show(self) -> Busy {
        Busy { listener: self.mount.show().ok().map(|()| self.listener), ..Busy::default() }
    }
}

/// The lease, and those who ask about it.
#[derive(Debug, Default)]
pub struct Busy {
    listener: Option<UnixListener>,
    clients: Vec<Client>,
    /// Until when, by the monotonic clock in milliseconds.
    until: Option<i64>,
}

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    read: Vec<u8>,
    until: i64,
}

impl Busy {
    /// The listening socket, if there is room for another client.
    pub fn listener(&self) -> Option<BorrowedFd<'_>> {
        self.listener.as_ref().filter(|_| self.clients.len() < MAX_CLIENTS).map(AsFd::as_fd)
    }

    /// The clients, each with its number, whose words are waited for.
    pub fn clients(&self) -> impl Iterator<Item = (usize, BorrowedFd<'_>)> {
        self.clients.iter().map(|client| client.stream.as_fd()).enumerate()
    }

    /// Takes a client that waits.
    pub fn accept(&mut self, now: i64) {
        if let Some(Ok((stream, _))) = self.listener.as_ref().map(UnixListener::accept)
            && stream.set_nonblocking(true).is_ok()
        {
            self.clients.push(Client { stream, read: Vec::new(), until: now + CLIENT_LIMIT_MS });
        }
    }

    /// Reads what a client has written, and answers if that is a whole request. `true` if the host is to hear of it.
    pub fn turn(&mut self, index: usize, now: i64) -> bool {
        let left = self.left(now);
        let Some(client) = self.clients.get_mut(index) else { return false };
        let asked = match client.read() {
            Ok(None) => return false,
            Ok(Some(asked)) => asked,
            Err(refused) => {
                client.answer(refused.status, &format!("{{\"error\":\"{}\"}}\n", refused.why));
                client.until = now;
                return false;
            }
        };
        match asked {
            Asked::Get => {}
            Asked::Hold { seconds } => {
                let until = now.saturating_add(i64::from(seconds) * 1000);
                self.until = self.until.max(Some(until));
            }
            Asked::Release => self.until = None,
        }
        let seconds = self.left(now);
        if let Some(client) = self.clients.get_mut(index) {
            client.answer("200 OK", &format!("{{\"seconds\":{seconds}}}\n"));
            client.until = now;
        }
        asked != Asked::Get && (left, seconds) != (0, 0)
    }

    /// Parts from those who have had their answer, or too much time.
    pub fn advance(&mut self, now: i64) {
        self.clients.retain(|client| client.until > now);
        self.until.take_if(|until| *until <= now);
    }

    /// When [`Self::advance`] is due.
    pub fn next_deadline(&self) -> Option<i64> {
        self.clients.iter().map(|client| client.until).min()
    }

    /// How many seconds the lease still lasts, begun ones included.
    pub fn left(&self, now: i64) -> u32 {
        let left = self.until.map_or(0, |until| until.saturating_sub(now).max(0));
        u32::try_from(left.saturating_add(999) / 1000).unwrap_or(u32::MAX)
    }
}

impl Client {
    fn read(&mut self) -> Result<Option<Asked>, Refused> {
        let mut chunk = [0; MAX_BYTES];
        let gone = Refused { status: "400 Bad Request", why: "no request" };
        let room = MAX_BYTES.saturating_sub(self.read.len());
        match self.stream.read(chunk.get_mut(..room).unwrap_or_default()) {
            Ok(0) => return Err(gone),
            Ok(count) => self.read.extend_from_slice(chunk.get(..count).unwrap_or_default()),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => return Err(gone),
        }
        read(&self.read)
    }

    /// It is short, and a client that leaves no room for it goes without.
    fn answer(&mut self, status: &str, body: &str) {
        let allow = if status.starts_with("405") { "Allow: GET, PUT, DELETE\r\n" } else { "" };
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n{allow}Connection: close\r\n\r\n",
            body.len()
        );
        let _ = self.stream.write(format!("{head}{body}").as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A lease with one client, and that client.
    fn busy() -> (Busy, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let client = Client { stream: ours, read: Vec::new(), until: CLIENT_LIMIT_MS };
        (Busy { clients: vec![client], ..Busy::default() }, theirs)
    }

    fn ask(request: &str, before: Option<i64>, now: i64) -> (Busy, bool, String) {
        let (mut busy, mut client) = busy();
        busy.until = before;
        client.write_all(request.as_bytes()).unwrap();
        let is_told = busy.turn(0, now);
        busy.advance(now);
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        (busy, is_told, answer)
    }

    #[test]
    fn a_lease_lasts_as_long_as_the_longest_and_is_released_by_any() {
        let put = "PUT /.flyrun/busy?seconds=30 HTTP/1.1\r\n\r\n";
        let (busy, is_told, answer) = ask(put, None, 1_000);
        assert!(is_told && answer.ends_with("{\"seconds\":30}\n"), "{answer}");
        assert_eq!((busy.left(1_000), busy.left(30_999), busy.left(31_000)), (30, 1, 0));
        let (busy, is_told, _) = ask(put, Some(500_000), 1_000);
        assert_eq!((busy.left(1_000), is_told), (499, true));
        let (busy, is_told, _) = ask("DELETE /.flyrun/busy HTTP/1.1\r\n\r\n", Some(500_000), 1_000);
        assert_eq!((busy.left(1_000), is_told), (0, true));
        let (_, is_told, answer) = ask("GET /.flyrun/busy HTTP/1.1\r\n\r\n", Some(500_000), 1_000);
        assert!(!is_told && answer.ends_with("{\"seconds\":499}\n"), "{answer}");
    }

    #[test]
    fn a_client_that_says_nothing_has_its_time_and_a_wrong_one_its_answer() {
        let (mut busy, client) = busy();
        assert!(!busy.turn(0, 0));
        assert_eq!(busy.next_deadline(), Some(CLIENT_LIMIT_MS));
        busy.advance(CLIENT_LIMIT_MS);
        assert_eq!(busy.clients().count(), 0);
        drop(client);
        let (busy, is_told, answer) = ask("BREW /.flyrun/busy HTTP/1.1\r\n\r\n", None, 0);
        assert!(!is_told && answer.starts_with("HTTP/1.1 405 ") && answer.contains("Allow: GET"), "{answer}");
        assert_eq!(busy.clients().count(), 0);
    }
}
