//! One connection: a stream between a port of the guest and a unix socket of the host.
//!
//! ```text
//!  guest asks ─────────────────────────────▶ Established ──both sides have shut down, or a reset──▶ Detached ──▶ gone
//!  host connects ─▶ Greeting ─▶ Requested ──────▲                                               (bytes that the guest
//!                   (CONNECT)   (RESPONSE)                                                      has sent still go out)
//! ```
//!
//! From host to guest nothing is buffered here: the socket is read into the guest's buffers when there are some and the
//! guest has credit. From guest to host bytes go straight to the socket; only what it does not take waits here, and the
//! credit given to the guest bounds that.

use std::{
    collections::VecDeque,
    io::{ErrorKind, Write},
    net::Shutdown,
    os::{fd::AsFd, unix::net::UnixStream},
};

use event_manager::EventSet;
use rustix::net::RecvFlags;

use super::packet::{HEADER_BYTES, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use crate::virtio::{
    Memory,
    ring::{Chain, RingError, total},
    transfer::{Span, Transfer},
};

/// The longest greeting: "CONNECT 4294967295\n".
const GREETING_BYTES: usize = 19;
/// The most data in one packet to the guest, as much as Linux sends in one.
const MAX_DATA_BYTES: u64 = 64 << 10;
/// The most that is read and thrown away when a socket is closed.
const DISCARD_BYTES: usize = 1 << 20;

/// The two ports of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    /// The host's.
    pub host: u32,
    /// The guest's.
    pub guest: u32,
}

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Greeting => (Requested | gone): the host has connected and not yet said to which port.
    Greeting,
    /// Requested => (Established | gone): the guest has been asked.
    Requested,
    /// Established => Detached.
    Established,
    /// Detached => gone: nothing more to or from the guest; what it has sent goes out first.
    Detached,
}

/// What the greeting of a host's connection has turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greeting {
    /// It has not all come yet.
    Incomplete,
    /// The host wants this port of the guest.
    Port(u32),
    /// It is not one.
    Bad,
}

/// Packets that the guest is still to get. Data is not among them: it is in the socket.
#[derive(Debug, Default)]
struct Owed {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
    shutdown: bool,
}

/// One connection.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    ports: Ports,
    state: State,
    owed: Owed,
    /// The guest waits in the muxer's list of those with something to send.
    pub queued: bool,
    /// What the event loop watches the socket for.
    pub watched: EventSet,

    /// The socket may have bytes or an end to read. Cleared by reading; set by an edge of the event loop.
    readable: bool,
    /// The host has closed or shut down; the next short read may not be taken for an empty socket.
    hung_up: bool,
    /// What the host has shut down, as the guest is (to be) told.
    host_shutdown: u32,
    guest_allocation: u32,
    guest_forwarded: u32,
    sent: u32,
    credit_requested: bool,

    /// What the guest has shut down.
    guest_shutdown: u32,
    unsent: VecDeque<u8>,
    allocation: u32,
    forwarded: u32,
    forwarded_told: u32,
}

impl Connection {
    /// A connection that the guest asked for; it is told of the success.
    pub fn from_guest(stream: UnixStream, ports: Ports, allocation: u32, request: &Header) -> Self {
        let mut connection = Self::new(stream, ports, State::Established, allocation);
        connection.owed.response = true;
        connection.readable = true;
        connection.take_credit(request);
        connection
    }

    /// A connection that the host has begun.
    pub fn from_host(stream: UnixStream, host_port: u32, allocation: u32) -> Self {
        Self::new(stream, Ports { host: host_port, guest: 0 }, State::Greeting, allocation)
    }

    fn new(stream: UnixStream, ports: Ports, state: State, allocation: u32) -> Self {
        Connection {
            stream,
            ports,
            state,
            owed: Owed::default(),
            queued: false,
            watched: EventSet::empty(),
            readable: false,
            hung_up: false,
            host_shutdown: 0,
            guest_allocation: 0,
            guest_forwarded: 0,
            sent: 0,
            credit_requested: false,
            guest_shutdown: 0,
            unsent: VecDeque::new(),
            allocation,
            forwarded: 0,
            forwarded_told: 0,
        }
    }

    /// Its ports.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// How far it has come.
    pub fn state(&self) -> State {
        self.state
    }

    /// The socket.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The bytes of buffer that the guest was given credit for.
    pub fn allocation(&self) -> u32 {
        self.allocation
    }

    /// What the socket must be watched for now.
    pub fn interest(&self) -> EventSet {
        // Edges: a socket whose peer has hung up would otherwise keep the loop busy until the guest has room.
        let always = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        if self.unsent.is_empty() { always } else { always | EventSet::OUT }
    }

    /// Whether there is nothing left to do for it.
    pub fn is_over(&self) -> bool {
        self.state == State::Detached && self.unsent.is_empty()
    }

    /// Ends the connection for the guest; its last bytes still go out.
    pub fn detach(&mut self) {
        self.state = State::Detached;
        self.owed = Owed::default();
    }

    /// Reads the host's greeting, and nothing of what follows it.
    pub fn read_greeting(&mut self) -> Greeting {
        let mut line = [0; GREETING_BYTES];
        let peeked = loop {
            match rustix::net::recv(&self.stream, &mut line, RecvFlags::PEEK) {
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Greeting::Incomplete,
                Err(_) | Ok((0, _)) => return Greeting::Bad,
                Ok((length, _)) => break line.get(..length).unwrap_or_default(),
            }
        };
        let Some(end) = peeked.iter().position(|byte| *byte == b'\n') else {
            return if peeked.len() == GREETING_BYTES { Greeting::Bad } else { Greeting::Incomplete };
        };
        let port = peeked
            .get(..end)
            .and_then(|line| line.strip_prefix(b"CONNECT "))
            .and_then(|port| std::str::from_utf8(port).ok())
            .and_then(|port| port.parse().ok());
        // The bytes are there, so this takes exactly the line.
        let mut taken = [0; GREETING_BYTES];
        match (port, rustix::net::recv(&self.stream, taken.split_at_mut(end + 1).0, RecvFlags::empty())) {
            (Some(port), Ok((length, _))) if length == end + 1 => Greeting::Port(port),
            _ => Greeting::Bad,
        }
    }

    /// Greeting => Requested.
    pub fn request(&mut self, guest_port: u32) {
        self.ports.guest = guest_port;
        self.state = State::Requested;
        self.owed.request = true;
        self.readable = true;
    }

    /// Requested => Established: the guest has accepted, and the host is told.
    pub fn accepted(&mut self) {
        self.state = State::Established;
        let line = format!("OK {}\n", self.ports.host);
        // The socket's buffer is empty, so a short line fits. A host that has closed already may have sent all it wanted.
        if (&self.stream).write_all(line.as_bytes()).is_err() {
            self.host_receives_no_more();
        }
    }

    /// Takes note of the guest's buffer space, which every packet tells.
    pub fn take_credit(&mut self, header: &Header) {
        self.guest_allocation = header.buffer_allocation;
        self.guest_forwarded = header.forward_count;
        // As long as there is none, asking again would only keep both sides busy: the guest tells when it has some.
        self.credit_requested &= self.credit() == 0;
    }

    /// The guest wants to know our buffer space.
    pub fn owe_credit_update(&mut self) {
        self.owed.credit_update = true;
    }

    /// Bytes that the guest has room for (section 5.10.6.3). A guest whose numbers make no sense has none.
    fn credit(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_allocation.saturating_sub(in_flight)
    }

    /// Something happened at the socket.
    pub fn socket_event(&mut self, set: EventSet) {
        if set.intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR) {
            self.readable = true;
        }
        if set.intersects(EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR) {
            self.hung_up = true;
        }
        if set.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            self.host_receives_no_more();
        }
        if !self.unsent.is_empty() {
            self.send_unsent();
        }
    }

    fn host_receives_no_more(&mut self) {
        self.forwarded = self.forwarded.wrapping_add(self.unsent.len() as u32);
        self.unsent = VecDeque::new();
        self.owe_shutdown(SHUTDOWN_RECEIVE);
    }

    fn owe_shutdown(&mut self, flags: u32) {
        if self.host_shutdown & flags != flags {
            self.host_shutdown |= flags;
            self.owed.shutdown = true;
        }
    }

    /// Takes data of the guest; false if it sends what it may not.
    ///
    /// # Errors
    /// The chain is shorter than the header says.
    pub fn take_data(
        &mut self,
        transfer: &mut Transfer,
        memory: &Memory,
        chain: &Chain,
        length: u32,
    ) -> Result<bool, RingError> {
        let has = total(chain.readable()).saturating_sub(HEADER_BYTES);
        if has < u64::from(length) {
            return Err(RingError::TooShort { needed: u64::from(length) - has });
        }
        let room = (self.allocation as usize).saturating_sub(self.unsent.len());
        if self.guest_shutdown & SHUTDOWN_SEND != 0 || length as usize > room {
            return Ok(false);
        }
        if self.host_shutdown & SHUTDOWN_RECEIVE != 0 {
            self.forwarded = self.forwarded.wrapping_add(length);
            self.consider_credit_update();
            return Ok(true);
        }
        let span = Span { buffers: chain.readable(), offset: HEADER_BYTES, length: length.into() };
        let sent = if self.unsent.is_empty() && length > 0 {
            match transfer.send(self.stream.as_fd(), memory, span) {
                Ok(sent) => sent,
                Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
                Err(_) => {
                    self.host_receives_no_more();
                    self.forwarded = self.forwarded.wrapping_add(length);
                    return Ok(true);
                }
            }
        } else {
            0
        };
        self.forwarded = self.forwarded.wrapping_add(sent as u32);
        if sent < u64::from(length) {
            let mut rest = vec![0; (u64::from(length) - sent) as usize];
            chain.read(memory, HEADER_BYTES + sent, &mut rest)?;
            self.unsent.extend(rest);
        }
        self.consider_credit_update();
        Ok(true)
    }

    /// Sends what waits, as far as the socket takes it, and the end if that has been waiting behind it.
    fn send_unsent(&mut self) {
        while !self.unsent.is_empty() {
            let (front, _) = self.unsent.as_slices();
            match rustix::net::send(
                &self.stream,
                front,
                rustix::net::SendFlags::NOSIGNAL | rustix::net::SendFlags::DONTWAIT,
            ) {
                Ok(sent) => {
                    self.unsent.drain(..sent.min(self.unsent.len()));
                    self.forwarded = self.forwarded.wrapping_add(sent as u32);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(_) => self.host_receives_no_more(),
            }
        }
        if self.unsent.is_empty() {
            self.unsent = VecDeque::new();
            self.pass_on_end();
        }
        self.consider_credit_update();
    }

    /// The guest waits for credit when it has used up all; it is told at a quarter, so that it never has to.
    fn consider_credit_update(&mut self) {
        if self.forwarded.wrapping_sub(self.forwarded_told) >= self.allocation / 4 {
            self.owed.credit_update = true;
        }
    }

    /// The guest ends one or both directions.
    pub fn take_shutdown(&mut self, flags: u32) {
        self.guest_shutdown |= flags & SHUTDOWN_BOTH;
        if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 {
            let _ = self.stream.shutdown(Shutdown::Read);
            self.readable = false;
        }
        if self.unsent.is_empty() {
            self.pass_on_end();
        }
    }

    /// Whether the guest has ended both directions, which section 5.10.6.6.1 answers with a reset.
    pub fn shut_by_guest(&self) -> bool {
        self.guest_shutdown == SHUTDOWN_BOTH
    }

    fn pass_on_end(&mut self) {
        if self.guest_shutdown & SHUTDOWN_SEND != 0 {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    fn may_read(&self) -> bool {
        self.state == State::Established
            && self.readable
            && self.host_shutdown & SHUTDOWN_SEND == 0
            && self.guest_shutdown & SHUTDOWN_RECEIVE == 0
    }

    /// Whether the guest could be sent something now.
    pub fn has_packet(&self) -> bool {
        let owed = &self.owed;
        match self.state {
            State::Greeting | State::Detached => false,
            State::Requested => owed.request,
            State::Established => {
                owed.response
                    || owed.credit_update
                    || owed.credit_request
                    || owed.shutdown
                    || self.may_read() && (self.credit() > 0 || !self.credit_requested)
            }
        }
    }

    /// Makes the next packet, and puts its data (not its header) into `chain`. `None`: there is none after all.
    ///
    /// # Errors
    /// The chain has no room for a header.
    pub fn next_packet(
        &mut self,
        transfer: &mut Transfer,
        memory: &Memory,
        chain: &Chain,
    ) -> Result<Option<Packet>, RingError> {
        let room = total(chain.writable());
        let Some(room) = room.checked_sub(HEADER_BYTES) else {
            return Err(RingError::TooShort { needed: HEADER_BYTES - room });
        };
        if !self.has_packet() {
            return Ok(None);
        }
        if std::mem::take(&mut self.owed.request) {
            return Ok(Some(self.packet(Op::Request)));
        }
        if std::mem::take(&mut self.owed.response) {
            return Ok(Some(self.packet(Op::Response)));
        }
        if self.may_read() && room > 0 {
            if self.credit() == 0 && !self.credit_requested {
                self.credit_requested = true;
                return Ok(Some(self.packet(Op::CreditRequest)));
            }
            let length = room.min(self.credit().into()).min(MAX_DATA_BYTES);
            if let Some(length) = self.read(transfer, memory, chain, length) {
                let packet = self.packet(Op::ReadWrite);
                self.sent = self.sent.wrapping_add(length);
                return Ok(Some(Packet { length, ..packet }));
            }
        }
        if std::mem::take(&mut self.owed.shutdown) {
            let packet = self.packet(Op::Shutdown);
            return Ok(Some(Packet { flags: self.host_shutdown, ..packet }));
        }
        if std::mem::take(&mut self.owed.credit_update) {
            return Ok(Some(self.packet(Op::CreditUpdate)));
        }
        Ok(None)
    }

    /// Reads from the socket into the guest's buffer; `None` when there is nothing now, or nothing any more.
    fn read(&mut self, transfer: &mut Transfer, memory: &Memory, chain: &Chain, length: u64) -> Option<u32> {
        if length == 0 {
            return None;
        }
        let span = Span { buffers: chain.writable(), offset: HEADER_BYTES, length };
        match transfer.read(self.stream.as_fd(), memory, span) {
            Ok(0) => {
                self.readable = false;
                self.owe_shutdown(SHUTDOWN_SEND);
                None
            }
            Ok(read) => {
                // A short read has emptied the socket; the next byte makes an edge. An end may already be behind it.
                self.readable = read == length || self.hung_up;
                Some(read as u32)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.readable = false;
                None
            }
            Err(_) => {
                self.readable = false;
                self.host_receives_no_more();
                self.owe_shutdown(SHUTDOWN_SEND);
                None
            }
        }
    }

    fn packet(&mut self, op: Op) -> Packet {
        // Every packet tells the credit.
        self.owed.credit_update = false;
        self.forwarded_told = self.forwarded;
        Packet { op, length: 0, flags: 0, buffer_allocation: self.allocation, forward_count: self.forwarded }
    }

    /// Closes the socket so that the host reads an end behind the last byte: a socket that is closed with unread input
    /// gives the other side an error instead.
    pub fn close(self) {
        let _ = self.stream.shutdown(Shutdown::Both);
        let mut scrap = [0; 4096];
        for _ in 0..DISCARD_BYTES / scrap.len() {
            match rustix::net::recv(&self.stream, &mut scrap, RecvFlags::DONTWAIT) {
                Ok((0, _)) | Err(_) => break,
                Ok(_) => {}
            }
        }
    }
}

/// What the muxer makes a header of.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    /// What it is about.
    pub op: Op,
    /// Bytes of data behind the header.
    pub length: u32,
    /// The flags of a shutdown.
    pub flags: u32,
    /// Our buffer's size.
    pub buffer_allocation: u32,
    /// Bytes taken out of it.
    pub forward_count: u32,
}
