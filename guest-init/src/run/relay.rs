//! One direction of one stream: bytes from a descriptor to another, both non-blocking, losing none.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::{
    buffer::spare_capacity,
    event::PollFlags,
    io::{Errno, read, write},
    net::{Shutdown, shutdown},
};

/// As much as a pipe holds; more would only copy the same bytes later.
const BUFFER_BYTES: usize = 64 * 1024;
/// Far more than a connection of the host holds.
const MAX_ABSORBED: usize = 4 << 20;
/// Reads and writes of one turn, so that a busy stream does not keep the loop from the others.
const TURN: usize = 8;

/// Copies from a source to a sink.
///
/// When the source ends and all is written, the sink is finished: a socket is shut down for writing (and kept, so
/// that its peer's close can be seen), anything else closed. When the sink breaks, a relay either goes on reading
/// and discards (output: the workload must not notice that nobody looks), or closes its source (input).
#[derive(Debug)]
pub struct Relay {
    source: Option<OwnedFd>,
    sink: Option<OwnedFd>,
    sink_is_socket: bool,
    finished: bool,
    /// What was read last.
    buffer: Vec<u8>,
    /// How much of it is written.
    start: usize,
}

impl Relay {
    /// A relay of output, from a pipe or terminal of the workload to a socket of the host.
    pub fn output(source: OwnedFd, sink: OwnedFd) -> Self {
        Self::new(source, sink, true)
    }

    /// A relay of input, from a socket of the host to a pipe or terminal of the workload.
    pub fn input(source: OwnedFd, sink: OwnedFd) -> Self {
        Self::new(source, sink, false)
    }

    fn new(source: OwnedFd, sink: OwnedFd, sink_is_socket: bool) -> Self {
        Self {
            source: Some(source),
            sink: Some(sink),
            sink_is_socket,
            finished: false,
            buffer: Vec::new(),
            start: 0,
        }
    }

    /// What to wait for on the source, if anything.
    pub fn source_interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let has_room = self.start == self.buffer.len();
        self.source.as_ref().filter(|_| has_room).map(|fd| (fd.as_fd(), PollFlags::IN))
    }

    /// What to wait for on the sink, if anything.
    pub fn sink_interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let waits = self.start < self.buffer.len();
        self.sink.as_ref().filter(|_| waits && !self.finished).map(|fd| (fd.as_fd(), PollFlags::OUT))
    }

    /// Whether the source has ended and everything from it is written or discarded.
    pub fn is_done(&self) -> bool {
        self.source.is_none() && self.start == self.buffer.len()
    }

    /// Whether anything that was read is not yet written.
    pub fn has_pending(&self) -> bool {
        self.start < self.buffer.len()
    }

    /// Reads nothing more: what was read is still written.
    pub fn end_source(&mut self) {
        self.source = None;
        self.finish_when_done();
    }

    /// Closes the finished sink.
    pub fn close(&mut self) {
        if self.finished {
            self.sink = None;
        }
    }

    /// The socket that this relay wrote to and has finished.
    pub fn finished_socket(&self) -> Option<BorrowedFd<'_>> {
        self.sink.as_ref().filter(|_| self.finished && self.sink_is_socket).map(|fd| fd.as_fd())
    }

    /// Writes what was read to the host and says that nothing follows for now; whether all of it went out.
    pub fn flush_to_host(&mut self) -> bool {
        if !self.drain() {
            return false;
        }
        if let Some(socket) = self.sink.as_ref().filter(|_| self.sink_is_socket) {
            let _ = shutdown(socket, Shutdown::Write);
        }
        true
    }

    /// Takes what the source has, beyond what is waiting to be written; whether the source has ended.
    ///
    /// # Errors
    /// `ENOBUFS` when that is more than any connection holds.
    pub fn absorb(&mut self) -> rustix::io::Result<bool> {
        let Some(source) = &self.source else { return Ok(true) };
        self.buffer.drain(..self.start.min(self.buffer.len()));
        self.start = 0;
        loop {
            self.buffer.reserve(BUFFER_BYTES);
            match read(source, spare_capacity(&mut self.buffer)) {
                Ok(0) | Err(Errno::IO | Errno::CONNRESET | Errno::NOTCONN) => break Ok(true),
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break Ok(false),
                Err(_) => break Ok(true),
            }
            if self.buffer.len() > MAX_ABSORBED {
                break Err(Errno::NOBUFS);
            }
        }
    }

    /// The source, if it has not ended.
    pub fn source(&self) -> Option<BorrowedFd<'_>> {
        self.source.as_ref().map(|fd| fd.as_fd())
    }

    /// Goes on with another connection to the host, in the place of the old one.
    pub fn join_host(&mut self, socket: OwnedFd) {
        if self.sink_is_socket {
            self.sink = Some(socket);
            self.finished = false;
            self.finish_when_done();
        } else if !self.finished {
            self.source = Some(socket);
        }
    }

    /// Copies what is there without blocking; returns whether the source gave anything.
    pub fn pump(&mut self) -> bool {
        let mut has_read = false;
        for _ in 0..TURN {
            if self.start == self.buffer.len() && !self.fill() {
                break;
            }
            has_read = true;
            if !self.drain() {
                break;
            }
        }
        self.finish_when_done();
        has_read
    }

    /// Reads once into the empty buffer; whether there is something now. Only as much of the guest's memory is touched as was read.
    fn fill(&mut self) -> bool {
        let Some(source) = &self.source else { return false };
        self.buffer.clear();
        self.start = 0;
        self.buffer.reserve(BUFFER_BYTES);
        loop {
            match read(source, spare_capacity(&mut self.buffer)) {
                // A terminal says EIO when the last process has closed it.
                Ok(0) | Err(Errno::IO | Errno::CONNRESET | Errno::NOTCONN) => {
                    self.source = None;
                    return false;
                }
                Ok(_) => return true,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return false,
                Err(_) => {
                    self.source = None;
                    return false;
                }
            }
        }
    }

    /// Writes the buffer; whether all of it went out.
    fn drain(&mut self) -> bool {
        while self.start < self.buffer.len() {
            let Some(sink) = &self.sink else {
                self.start = self.buffer.len();
                return true;
            };
            let chunk = self.buffer.get(self.start..).unwrap_or_default();
            match write(sink, chunk) {
                Ok(count) => self.start += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return false,
                Err(_) => {
                    self.sink = None;
                    if !self.sink_is_socket {
                        self.source = None;
                    }
                }
            }
        }
        true
    }

    fn finish_when_done(&mut self) {
        if !self.is_done() || self.finished {
            return;
        }
        self.finished = true;
        match &self.sink {
            Some(socket) if self.sink_is_socket => {
                let _ = shutdown(socket, Shutdown::Write);
            }
            _ => self.sink = None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::unix::net::UnixStream,
    };

    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;

    fn socket() -> (OwnedFd, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (ours.into(), theirs)
    }

    fn pipe() -> (OwnedFd, OwnedFd) {
        pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap()
    }

    #[test]
    fn output_arrives_whole_although_the_host_reads_late() {
        let (pipe_read, pipe_write) = pipe();
        let (ours, mut host) = socket();
        let mut relay = Relay::output(pipe_read, ours);
        let sent: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
        let mut rest = &sent[..];
        let mut received = Vec::new();
        let mut chunk = vec![0; 10_000];
        host.set_nonblocking(true).unwrap();
        let mut pipe_write = Some(pipe_write);
        while !relay.is_done() || relay.finished_socket().is_none() {
            match pipe_write.as_ref().map(|fd| write(fd, rest)) {
                Some(Ok(count)) => rest = &rest[count..],
                Some(Err(errno)) => assert_eq!(errno, Errno::AGAIN),
                None => {}
            }
            if rest.is_empty() {
                pipe_write = None;
            }
            relay.pump();
            if let Ok(count) = host.read(&mut chunk) {
                received.extend_from_slice(&chunk[..count]);
            }
        }
        host.set_nonblocking(false).unwrap();
        host.read_to_end(&mut received).unwrap();
        assert!(received == sent, "{} of {} bytes arrived", received.len(), sent.len());
    }

    #[test]
    fn output_goes_on_when_the_host_has_gone() {
        let (pipe_read, pipe_write) = pipe();
        let (ours, host) = socket();
        drop(host);
        let mut relay = Relay::output(pipe_read, ours);
        for _ in 0..10 {
            write(&pipe_write, &[7; 4096]).unwrap();
            relay.pump();
        }
        assert!(!relay.is_done(), "the workload's pipe was closed");
        drop(pipe_write);
        relay.pump();
        assert!(relay.is_done());
    }

    #[test]
    fn the_end_of_input_closes_the_pipe_behind_the_data() {
        let (pipe_read, pipe_write) = pipe();
        let (ours, mut host) = socket();
        let mut relay = Relay::input(ours, pipe_write);
        host.write_all(b"last words").unwrap();
        host.shutdown(std::net::Shutdown::Write).unwrap();
        relay.pump();
        relay.pump();
        let mut buffer = [0; 64];
        assert_eq!(read(&pipe_read, &mut buffer[..]), Ok(10));
        assert_eq!(read(&pipe_read, &mut buffer[..]), Ok(0));
    }

    #[test]
    fn input_that_nobody_reads_any_more_is_ended() {
        let (pipe_read, pipe_write) = pipe();
        let (ours, mut host) = socket();
        drop(pipe_read);
        let mut relay = Relay::input(ours, pipe_write);
        host.write_all(b"x").unwrap();
        relay.pump();
        assert!(relay.is_done());
        assert!(relay.source_interest().is_none());
    }

    #[test]
    fn output_goes_on_with_another_connection_and_nothing_is_lost_or_said_twice() {
        let (pipe_read, pipe_write) = pipe();
        let (ours, mut first) = socket();
        let mut relay = Relay::output(pipe_read, ours);
        write(&pipe_write, b"before").unwrap();
        relay.pump();
        assert!(relay.flush_to_host());
        let mut text = String::new();
        first.read_to_string(&mut text).unwrap();
        assert_eq!(text, "before");
        write(&pipe_write, b"behind").unwrap();
        drop(pipe_write);
        let (ours, mut second) = socket();
        relay.join_host(ours);
        relay.pump();
        text.clear();
        second.read_to_string(&mut text).unwrap();
        assert_eq!(text, "behind");
        // One that has ended says so again.
        let (ours, mut third) = socket();
        relay.join_host(ours);
        assert_eq!(third.read(&mut [0; 8]).unwrap(), 0);
    }

    #[test]
    fn input_is_taken_whole_before_the_connection_goes() {
        let (pipe_read, pipe_write) = pipe();
        let (ours, mut host) = socket();
        let mut relay = Relay::input(ours, pipe_write);
        let sent: Vec<u8> = (0..300_000u32).map(|n| (n % 251) as u8).collect();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                host.write_all(&sent).unwrap();
                host.shutdown(std::net::Shutdown::Write).unwrap();
            });
            // The pipe is full long before.
            relay.pump();
            while !relay.absorb().unwrap() {}
        });
        let (ours, mut host) = socket();
        relay.join_host(ours);
        host.write_all(b"more").unwrap();
        drop(host);
        let (mut received, mut chunk) = (Vec::new(), vec![0; 65_536]);
        while received.len() < sent.len() + 4 {
            let count = read(&pipe_read, &mut chunk[..]).unwrap_or(0);
            received.extend_from_slice(&chunk[..count]);
            relay.pump();
        }
        assert!(received.starts_with(&sent) && received.ends_with(b"more"));
        assert!(relay.is_done());
    }

    #[test]
    fn a_full_sink_stops_the_reading() {
        let (pipe_read, _keep) = pipe();
        let (ours, mut host) = socket();
        let (sink_read, sink_write) = pipe();
        drop(pipe_read);
        let mut relay = Relay::input(ours, sink_write);
        let writer = std::thread::spawn(move || host.write_all(&[1; 400_000]).is_ok());
        while relay.sink_interest().is_none() {
            relay.pump();
        }
        assert!(relay.source_interest().is_none(), "reads although nothing can be written");
        let mut total = 0;
        let mut buffer = vec![0; 65_536];
        while total < 400_000 {
            total += read(&sink_read, &mut buffer[..]).unwrap_or(0);
            relay.pump();
        }
        assert!(writer.join().unwrap());
    }
}
