//! The guest's end of a session's connection: frames in both directions, never blocking, within bounds. With a ticket it
//! outlives the connection.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use protocol::{
    frame,
    replay::{Count, Sent},
    session::{FromSession, MAX_CHUNK, Ticket, ToSession},
};
use rustix::{
    event::PollFlags,
    io::Errno,
    net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown},
};
use serde::de::DeserializeOwned;

/// Nothing more is read from a process while this much waits for its client.
const HIGH_WATER: usize = 2 * MAX_CHUNK;
/// Nor while so much was sent that its client has not counted.
const MAX_UNCOUNTED: usize = 256 * 1024;
/// As much as one read takes from the connection.
const READ_BYTES: usize = 64 * 1024;

/// A client, connected or expected back.
#[derive(Debug)]
pub struct Client {
    /// `None` for one that is expected back.
    socket: Option<OwnedFd>,
    decoder: frame::Decoder,
    pending: Vec<u8>,
    sent: usize,
    closed: bool,
    finished: bool,
    lasting: Option<Lasting>,
}

/// What a client needs to go on over another connection.
#[derive(Debug)]
struct Lasting {
    ticket: Ticket,
    sent: Sent,
    received: Count,
}

impl Client {
    /// Speaks over this non-blocking socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self {
            socket: Some(socket),
            decoder: frame::Decoder::default(),
            pending: Vec::new(),
            sent: 0,
            closed: false,
            finished: false,
            lasting: None,
        }
    }

    /// From now on frames are counted, and the client may come back with this ticket.
    pub fn outlast(&mut self, ticket: Ticket) {
        self.lasting = Some(Lasting { ticket, sent: Sent::default(), received: Count::default() });
    }

    /// Whether the ticket is this client's.
    pub fn has(&self, ticket: &Ticket) -> bool {
        self.lasting.as_ref().is_some_and(|lasting| lasting.ticket.matches(ticket))
    }

    /// Lets go of the connection, which the client will replace. False for a client that cannot.
    pub fn part(&mut self) -> bool {
        if self.lasting.is_none() || self.closed {
            return false;
        }
        self.socket = None;
        self.decoder = frame::Decoder::default();
        self.pending.clear();
        self.sent = 0;
        true
    }

    /// Whether the client is expected back.
    pub fn is_away(&self) -> bool {
        self.socket.is_none()
    }

    /// Goes on over the connection of another client, which is this one come back and has received so many frames. False if
    /// that cannot be; the other has its connection then.
    pub fn rejoin(&mut self, other: &mut Client, received: u64) -> bool {
        let Some(lasting) = &mut self.lasting else { return false };
        if !lasting.sent.counted(received) {
            return false;
        }
        let answer = FromSession::Rejoined { frames: lasting.received.frames() };
        self.pending = frame::encode(&answer).unwrap_or_default();
        self.pending.extend(lasting.sent.missing());
        self.sent = 0;
        (self.socket, self.decoder) = (other.socket.take(), std::mem::take(&mut other.decoder));
        self.flush();
        true
    }

    /// Queues a frame. Those that carry data may only be sent while there [is room](Self::has_room).
    pub fn send(&mut self, frame: &FromSession) {
        // Only a message beyond the frame's bound fails, and none that is made here is that long.
        let Ok(bytes) = frame::encode(frame) else { return };
        if self.socket.is_some() {
            self.pending.extend_from_slice(&bytes);
        }
        if let Some(lasting) = &mut self.lasting {
            lasting.sent.keep(bytes);
        }
    }

    /// Queues the last frame; behind it the connection ends.
    pub fn send_last(&mut self, frame: &FromSession) {
        self.send(frame);
        self.finished = true;
        self.flush();
    }

    /// Whether the client reads fast enough to be sent data.
    pub fn has_room(&self) -> bool {
        self.pending.len() - self.sent < HIGH_WATER
            && self.lasting.as_ref().is_none_or(|lasting| lasting.sent.bytes() < MAX_UNCOUNTED)
    }

    /// Whether the client has gone.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Writes what the connection takes.
    pub fn flush(&mut self) {
        let Some(socket) = &self.socket else { return };
        while !self.closed && self.sent < self.pending.len() {
            let rest = self.pending.get(self.sent..).unwrap_or_default();
            match send(socket, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => self.sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => self.closed = true,
            }
        }
        self.pending.clear();
        self.sent = 0;
        if self.finished && !self.closed {
            let _ = shutdown(socket, Shutdown::Write);
        }
    }

    /// What to wait for.
    pub fn interest(&self) -> PollFlags {
        if self.sent < self.pending.len() { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN }
    }

    /// Reads once what has arrived; [`Client::next_frame`] then gives the whole frames, all of which must be taken.
    pub fn receive(&mut self) {
        let Some(socket) = &self.socket else { return };
        let mut chunk = vec![0; READ_BYTES];
        match recv(socket, &mut chunk[..], RecvFlags::DONTWAIT) {
            Ok((0, _)) => self.closed = true,
            Ok((count, _)) => self.decoder.push(chunk.get(..count).unwrap_or_default()),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => self.closed = true,
        }
    }

    /// The next frame that has arrived whole. One that does not parse ends the connection.
    pub fn next_frame<T: DeserializeOwned>(&mut self) -> Option<T> {
        self.decoder.decode().unwrap_or_else(|_| {
            self.closed = true;
            None
        })
    }

    /// The next frame that has arrived whole for a command. What it says of frames is heeded here.
    pub fn next_order(&mut self) -> Option<ToSession> {
        loop {
            let before = self.decoder.len();
            let order = self.next_frame()?;
            let bytes = before - self.decoder.len();
            match (&order, &mut self.lasting) {
                (ToSession::Received { frames }, Some(lasting)) => {
                    if !lasting.sent.counted(*frames) {
                        self.closed = true;
                    }
                }
                (_, Some(lasting)) => {
                    lasting.received.add(bytes);
                    return Some(order);
                }
                (_, None) => return Some(order),
            }
        }
    }

    /// Tells the client how much of what it sent was received, where that is due.
    pub fn tell_received(&mut self) {
        let due = self.lasting.as_mut().filter(|_| self.socket.is_some() && !self.finished);
        if let Some(frames) = due.and_then(|lasting| lasting.received.due())
            && let Ok(bytes) = frame::encode(&FromSession::Received { frames })
        {
            self.pending.extend_from_slice(&bytes);
        }
    }

    /// Reads once and throws it away: after the last frame, only the client's end is of interest.
    pub fn discard(&mut self) {
        self.decoder = frame::Decoder::default();
        self.receive();
    }

    /// Ends the connection without a word more.
    pub fn close(&mut self) {
        self.closed = true;
    }

    /// Whether the last frame has been queued.
    pub fn is_finished(&self) -> bool {
        self.finished
    }

    /// What has arrived and was not taken, for a child that goes on with the connection.
    pub fn decoder(&self) -> &frame::Decoder {
        &self.decoder
    }
}

impl Client {
    /// The connection, unless the client is away.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use protocol::ExitStatus;

    use super::*;

    const TICKET: Ticket = Ticket([7; 16]);

    fn pair() -> (Client, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (Client::new(ours.into()), theirs)
    }

    fn said(stream: &mut UnixStream) -> FromSession {
        frame::read(stream).unwrap().unwrap()
    }

    fn stdin(bytes: &[u8]) -> ToSession {
        ToSession::Stdin(bytes.to_vec())
    }

    fn heard(client: &mut Client) -> Vec<ToSession> {
        client.receive();
        std::iter::from_fn(|| client.next_order()).collect()
    }

    #[test]
    fn a_client_that_comes_back_misses_nothing_and_hears_nothing_twice() {
        let (mut client, mut first) = pair();
        client.outlast(TICKET);
        client.send(&FromSession::Stdout(b"one".to_vec()));
        client.send(&FromSession::Stdout(b"two".to_vec()));
        client.flush();
        assert_eq!(said(&mut first), FromSession::Stdout(b"one".to_vec()));
        frame::write(&mut first, &stdin(b"a")).unwrap();
        assert_eq!(heard(&mut client), [stdin(b"a")]);
        // Half a frame and what was under way are lost with the connection.
        std::io::Write::write_all(&mut first, &[5, 0]).unwrap();
        assert_eq!(heard(&mut client), []);
        assert!(client.part());
        assert!(client.is_away() && !client.is_closed() && client.fd().is_none());
        client.send(&FromSession::Stdout(b"three".to_vec()));

        let (mut greeting, mut second) = pair();
        assert!(client.has(&TICKET) && !client.has(&Ticket([8; 16])) && !greeting.has(&TICKET));
        assert!(client.rejoin(&mut greeting, 1));
        assert_eq!(said(&mut second), FromSession::Rejoined { frames: 1 });
        assert_eq!(said(&mut second), FromSession::Stdout(b"two".to_vec()));
        assert_eq!(said(&mut second), FromSession::Stdout(b"three".to_vec()));
        frame::write(&mut second, &stdin(b"b")).unwrap();
        assert_eq!(heard(&mut client), [stdin(b"b")]);
        client.send_last(&FromSession::Exited(ExitStatus::Code(3)));
        assert_eq!(said(&mut second), FromSession::Exited(ExitStatus::Code(3)));
        assert_eq!(frame::read::<FromSession>(&mut second).unwrap(), None);
    }

    #[test]
    fn the_last_frame_is_heard_by_a_client_that_was_away() {
        let (mut client, first) = pair();
        client.outlast(TICKET);
        assert!(client.part());
        drop(first);
        client.send_last(&FromSession::Exited(ExitStatus::Code(0)));
        assert!(!client.is_closed());
        let (mut greeting, mut second) = pair();
        assert!(client.rejoin(&mut greeting, 0));
        assert_eq!(said(&mut second), FromSession::Rejoined { frames: 0 });
        assert_eq!(said(&mut second), FromSession::Exited(ExitStatus::Code(0)));
        assert_eq!(frame::read::<FromSession>(&mut second).unwrap(), None);
    }

    #[test]
    fn who_counts_wrongly_or_has_no_ticket_does_not_come_back() {
        let (mut client, _first) = pair();
        assert!(!client.part());
        client.outlast(TICKET);
        client.send(&FromSession::Stdout(b"one".to_vec()));
        let (mut greeting, _second) = pair();
        assert!(!client.rejoin(&mut greeting, 2));
        assert!(greeting.fd().is_some());
    }

    #[test]
    fn a_client_that_counts_nothing_is_sent_nothing_more() {
        let (mut client, mut stream) = pair();
        client.outlast(TICKET);
        let reader = std::thread::spawn(move || {
            let mut chunks = 0;
            while let Ok(Some(FromSession::Stdout(_))) = frame::read(&mut stream) {
                chunks += 1;
            }
            (chunks, stream)
        });
        let mut sent = 0;
        while client.has_room() {
            client.send(&FromSession::Stdout(vec![0; MAX_CHUNK]));
            sent += 1;
            while client.interest() != PollFlags::IN {
                client.flush();
            }
        }
        assert!((1..20).contains(&sent), "{sent}");
        client.send_last(&FromSession::Exited(ExitStatus::Code(0)));
        while !reader.is_finished() {
            client.flush();
            std::thread::yield_now();
        }
        let (chunks, mut stream) = reader.join().unwrap();
        assert_eq!(chunks, sent);
        frame::write(&mut stream, &ToSession::Received { frames: sent }).unwrap();
        assert_eq!(heard(&mut client), []);
        assert!(client.has_room());
        frame::write(&mut stream, &ToSession::Received { frames: sent + 7 }).unwrap();
        assert_eq!(heard(&mut client), []);
        assert!(client.is_closed(), "frames that were never sent were counted");
    }

    #[test]
    fn a_client_is_told_what_was_received_before_it_keeps_too_much() {
        let (mut client, mut stream) = pair();
        client.outlast(TICKET);
        let mut told = None;
        for frames in 1..20 {
            frame::write(&mut stream, &stdin(&[0; 4096])).unwrap();
            assert_eq!(heard(&mut client).len(), 1);
            client.tell_received();
            if client.interest() != PollFlags::IN {
                told = Some(frames);
                break;
            }
        }
        client.flush();
        assert_eq!(said(&mut stream), FromSession::Received { frames: told.unwrap() });
    }
}
