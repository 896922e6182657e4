//! The guest's end of a session's connection: frames in both directions, never blocking, within bounds.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use protocol::{
    frame,
    session::{FromSession, MAX_CHUNK},
};
use rustix::{
    event::PollFlags,
    io::Errno,
    net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown},
};
use serde::de::DeserializeOwned;

/// Nothing more is read from a process while this much waits for its client.
const HIGH_WATER: usize = 2 * MAX_CHUNK;
/// As much as one read takes from the connection.
const READ_BYTES: usize = 64 * 1024;

/// A connected client.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    decoder: frame::Decoder,
    pending: Vec<u8>,
    sent: usize,
    closed: bool,
    finished: bool,
}

impl Client {
    /// Speaks over this non-blocking socket.
    pub fn new(socket: OwnedFd) -> Self {
        let decoder = frame::Decoder::default();
        Self { socket, decoder, pending: Vec::new(), sent: 0, closed: false, finished: false }
    }

    /// Queues a frame. Those that carry data may only be sent while there [is room](Self::has_room).
    pub fn send(&mut self, frame: &FromSession) {
        // Only a message beyond the frame's bound fails, and none that is made here is that long.
        if let Ok(bytes) = frame::encode(frame) {
            self.pending.extend_from_slice(&bytes);
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
    }

    /// Whether the client has gone.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Writes what the connection takes.
    pub fn flush(&mut self) {
        while !self.closed && self.sent < self.pending.len() {
            let rest = self.pending.get(self.sent..).unwrap_or_default();
            match send(&self.socket, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => self.sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => self.closed = true,
            }
        }
        self.pending.clear();
        self.sent = 0;
        if self.finished && !self.closed {
            let _ = shutdown(&self.socket, Shutdown::Write);
        }
    }

    /// What to wait for.
    pub fn interest(&self) -> PollFlags {
        if self.sent < self.pending.len() { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN }
    }

    /// Reads once what has arrived; [`Client::next_frame`] then gives the whole frames, all of which must be taken.
    pub fn receive(&mut self) {
        let mut chunk = vec![0; READ_BYTES];
        match recv(&self.socket, &mut chunk[..], RecvFlags::DONTWAIT) {
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

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
