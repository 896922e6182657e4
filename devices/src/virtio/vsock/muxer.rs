//! All connections of a machine, and the unix sockets that they end at.
//!
//! The guest's connection to port P of the host becomes one to the socket `<path>_<P>`. Who connects to `<path>` and
//! writes `CONNECT <port>\n` gets one to that port of the guest, and is answered `OK <host's port>\n`.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use event_manager::{EventOps, EventSet, Events};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::{
    connection::{Connection, Greeting, Ports, State},
    packet::{HEADER_BYTES, HOST_CID, Header, Op},
};
use crate::virtio::{
    Memory,
    ring::{Chain, RingError},
    transfer::Transfer,
};

/// The most connections at a time, those included whose last bytes are still going out.
pub const MAX_CONNECTIONS: usize = 1024;
/// The most resets that wait for room in the guest's queue; later ones are dropped, and the guest times out.
const MAX_RESETS: usize = 256;
/// What the guest may send ahead on a connection, in bytes.
pub const ALLOCATION: u32 = 256 << 10;
/// The same for connections that come when [`SHARED_BYTES`] have been promised.
const SMALL_ALLOCATION: u32 = 16 << 10;
/// How much may be promised in full allocations. With the small ones of all further connections it bounds what the
/// guest can make the host buffer at 48 MiB.
const SHARED_BYTES: u32 = 32 << 20;
/// Ports of connections that the host begins; below are those that services listen at.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// How long a client of the host may take to say which port it wants. Looked at when another comes: one that says
/// nothing costs a slot, and must not cost all of them.
const GREETING_LIMIT: Duration = Duration::from_secs(10);

/// The event data of connections begins here; below are queues and the listener.
pub const FIRST_CONNECTION: u32 = 16;

/// The connections.
pub struct Muxer {
    guest_cid: u64,
    path: PathBuf,
    slots: Vec<Option<Connection>>,
    free: Vec<usize>,
    by_ports: HashMap<Ports, usize>,
    /// Slots of connections that have something for the guest, each once.
    ready: VecDeque<usize>,
    resets: VecDeque<Header>,
    /// Clients that have not said their port when they came, in that order, with their slot and port.
    silent: VecDeque<(Instant, usize, u32)>,
    /// See [`GREETING_LIMIT`].
    pub greeting_limit: Duration,
    promised: u32,
    next_port: u32,
    transfer: Transfer,
}

impl Muxer {
    /// Makes an empty muxer.
    pub fn new(guest_cid: u64, path: PathBuf) -> Self {
        Muxer {
            guest_cid,
            path,
            slots: Vec::new(),
            free: Vec::new(),
            by_ports: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            silent: VecDeque::new(),
            greeting_limit: GREETING_LIMIT,
            promised: 0,
            next_port: FIRST_HOST_PORT,
            transfer: Transfer::default(),
        }
    }

    /// Forgets everything and hands out the connections, whose sockets the event loop still watches.
    pub fn clear(&mut self) -> Vec<Connection> {
        self.free.clear();
        self.by_ports.clear();
        self.ready.clear();
        self.resets.clear();
        self.silent.clear();
        self.promised = 0;
        self.slots.drain(..).flatten().collect()
    }

    /// Number of connections.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Takes all new connections of the host.
    pub fn accept(&mut self, listener: &UnixListener, ops: &mut EventOps) {
        let now = Instant::now();
        self.drop_silent(now, ops);
        loop {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock {
                        log::error!("vsock: cannot accept at {}: {error}", self.path.display());
                    }
                    return;
                }
            };
            if self.len() >= MAX_CONNECTIONS || stream.set_nonblocking(true).is_err() {
                continue;
            }
            let port = self.new_port();
            let connection = Connection::from_host(stream, port, self.promise());
            let slot = self.insert(connection, ops);
            // Most clients have written their line by now.
            self.greet(slot);
            if self.is_greeting(slot, port) {
                self.silent.push_back((now, slot, port));
            }
            self.settle(slot, ops);
        }
    }

    /// Hangs up on clients that have had their time to greet.
    fn drop_silent(&mut self, now: Instant, ops: &mut EventOps) {
        let limit = self.greeting_limit;
        while let Some((_, slot, port)) =
            self.silent.pop_front_if(|(since, ..)| now.saturating_duration_since(*since) >= limit)
        {
            if self.is_greeting(slot, port) {
                self.detach(slot);
                self.settle(slot, ops);
            }
        }
    }

    /// Whether the connection in this slot is still the one with that port, and has not said what it wants.
    fn is_greeting(&self, slot: usize, port: u32) -> bool {
        let connection = self.slots.get(slot).and_then(Option::as_ref);
        connection.is_some_and(|it| it.state() == State::Greeting && it.ports().host == port)
    }

    /// Something happened at a connection's socket.
    pub fn socket_event(&mut self, events: Events, ops: &mut EventOps) {
        let slot = events.data().checked_sub(FIRST_CONNECTION).and_then(|slot| usize::try_from(slot).ok());
        let Some(slot) = slot else { return };
        let Some(connection) = self.connection(slot) else { return };
        // An event from before the slot's last connection was closed may come after it.
        if connection.stream().as_raw_fd() != events.fd() {
            return;
        }
        connection.socket_event(events.event_set());
        self.greet(slot);
        self.settle(slot, ops);
    }

    /// Takes a packet of the guest.
    ///
    /// # Errors
    /// The chain is too short for its packet.
    pub fn take(&mut self, memory: &Memory, chain: &Chain, ops: &mut EventOps) -> Result<(), RingError> {
        let mut bytes = [0; HEADER_BYTES as usize];
        chain.read(memory, 0, &mut bytes)?;
        let header = Header::parse(&bytes);
        // Section 5.10.6.4.2: the guest cannot speak for others. Nobody could get an answer to that.
        if header.source_cid != self.guest_cid {
            return Ok(());
        }
        let ports = Ports { host: header.destination_port, guest: header.source_port };
        let known = self.by_ports.get(&ports).copied();
        let (Some(op), true, HOST_CID) = (header.op, header.stream, header.destination_cid) else {
            self.refuse(&header);
            return Ok(());
        };
        let Some(slot) = known else {
            if op == Op::Request {
                self.connect(ports, &header, ops);
            } else {
                self.refuse(&header);
            }
            return Ok(());
        };
        if let Some(connection) = self.connection(slot) {
            connection.take_credit(&header);
        }
        self.take_for(slot, op, &header, memory, chain)?;
        self.settle(slot, ops);
        Ok(())
    }

    /// Takes a packet for a connection that exists.
    fn take_for(
        &mut self,
        slot: usize,
        op: Op,
        header: &Header,
        memory: &Memory,
        chain: &Chain,
    ) -> Result<(), RingError> {
        let Some(Some(connection)) = self.slots.get_mut(slot) else { return Ok(()) };
        let state = connection.state();
        let good = match (state, op) {
            (_, Op::Reset) => {
                self.detach(slot);
                return Ok(());
            }
            (State::Requested, Op::Response) => {
                connection.accepted();
                true
            }
            (State::Established, Op::ReadWrite) => {
                connection.take_data(&mut self.transfer, memory, chain, header.length)?
            }
            (State::Established, Op::Shutdown) => {
                connection.take_shutdown(header.flags);
                !connection.shut_by_guest()
            }
            (State::Established, Op::CreditUpdate) => true,
            (State::Established, Op::CreditRequest) => {
                connection.owe_credit_update();
                true
            }
            // A second request, or an answer nobody asked for.
            _ => false,
        };
        if !good {
            self.refuse(header);
            self.detach(slot);
        }
        Ok(())
    }

    /// Whether there is something for the guest.
    pub fn has_packet(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// Writes the next packet for the guest into `chain`; returns its length, or `None` when there is none after all.
    ///
    /// # Errors
    /// The chain has no room for a header.
    pub fn give(
        &mut self,
        memory: &Memory,
        chain: &Chain,
        ops: &mut EventOps,
    ) -> Result<Option<u32>, RingError> {
        if let Some(reset) = self.resets.pop_front() {
            chain.write(memory, 0, &reset.to_bytes())?;
            return Ok(Some(HEADER_BYTES as u32));
        }
        while let Some(slot) = self.ready.pop_front() {
            let Some(Some(connection)) = self.slots.get_mut(slot) else { continue };
            connection.queued = false;
            let Some(packet) = connection.next_packet(&mut self.transfer, memory, chain)? else {
                // Its socket turned out to be empty. A packet it has nevertheless must not bring it back at once, as the
                // chain may be too small for it.
                continue;
            };
            let ports = connection.ports();
            let header = Header {
                source_cid: HOST_CID,
                destination_cid: self.guest_cid,
                source_port: ports.host,
                destination_port: ports.guest,
                length: packet.length,
                stream: true,
                op: Some(packet.op),
                flags: packet.flags,
                buffer_allocation: packet.buffer_allocation,
                forward_count: packet.forward_count,
            };
            chain.write(memory, 0, &header.to_bytes())?;
            self.settle(slot, ops);
            return Ok(Some(HEADER_BYTES as u32 + packet.length));
        }
        Ok(None)
    }

    fn connection(&mut self, slot: usize) -> Option<&mut Connection> {
        self.slots.get_mut(slot)?.as_mut()
    }

    /// Answers a packet with a reset, except another reset.
    fn refuse(&mut self, header: &Header) {
        if header.op != Some(Op::Reset) && self.resets.len() < MAX_RESETS {
            self.resets.push_back(header.reset());
        }
    }

    /// Serves the guest's request for a connection.
    fn connect(&mut self, ports: Ports, request: &Header, ops: &mut EventOps) {
        if self.len() >= MAX_CONNECTIONS {
            return self.refuse(request);
        }
        match connect(&self.path, ports.host) {
            Ok(stream) => {
                let connection = Connection::from_guest(stream, ports, self.promise(), request);
                let slot = self.insert(connection, ops);
                self.by_ports.insert(ports, slot);
                self.settle(slot, ops);
            }
            Err(error) => {
                log::debug!(
                    "vsock: guest port {} to {}_{}: {error}",
                    ports.guest,
                    self.path.display(),
                    ports.host
                );
                self.refuse(request);
            }
        }
    }

    /// Reads the greeting of a host's connection, and asks the guest when it has all come.
    fn greet(&mut self, slot: usize) {
        let Some(Some(connection)) = self.slots.get_mut(slot) else { return };
        if connection.state() != State::Greeting {
            return;
        }
        match connection.read_greeting() {
            Greeting::Incomplete => {}
            Greeting::Bad => connection.detach(),
            Greeting::Port(port) => {
                connection.request(port);
                // The guest may have a connection from that port to this one, if a service listens so high.
                match self.by_ports.entry(connection.ports()) {
                    Entry::Vacant(entry) => {
                        entry.insert(slot);
                    }
                    Entry::Occupied(_) => connection.detach(),
                }
            }
        }
    }

    /// Ends a connection for the guest.
    fn detach(&mut self, slot: usize) {
        let Some(Some(connection)) = self.slots.get_mut(slot) else { return };
        connection.detach();
        let ports = connection.ports();
        self.forget_ports(ports, slot);
    }

    fn forget_ports(&mut self, ports: Ports, slot: usize) {
        if self.by_ports.get(&ports) == Some(&slot) {
            self.by_ports.remove(&ports);
        }
    }

    /// To be called after everything that may have changed a connection: watches for the right events, queues it for the
    /// guest, and closes it when it is over.
    fn settle(&mut self, slot: usize, ops: &mut EventOps) {
        let Some(Some(connection)) = self.slots.get_mut(slot) else { return };
        if connection.is_over() {
            return self.remove(slot, ops);
        }
        let wanted = connection.interest();
        if wanted != connection.watched {
            connection.watched = wanted;
            if let Err(error) = ops.modify(events(connection, slot, wanted)) {
                log::error!("vsock: cannot watch a socket: {error}");
            }
        }
        if !connection.queued && connection.has_packet() {
            connection.queued = true;
            self.ready.push_back(slot);
        }
    }

    fn insert(&mut self, mut connection: Connection, ops: &mut EventOps) -> usize {
        let slot = self.free.pop().unwrap_or(self.slots.len());
        let wanted = connection.interest();
        connection.watched = wanted;
        if let Err(error) = ops.add(events(&connection, slot, wanted)) {
            // Unwatched it would hang; ended it is gone at the next settle.
            log::error!("vsock: cannot watch a socket: {error}");
            connection.detach();
        }
        self.promised += connection.allocation();
        match self.slots.get_mut(slot) {
            Some(place) => *place = Some(connection),
            None => self.slots.push(Some(connection)),
        }
        slot
    }

    fn remove(&mut self, slot: usize, ops: &mut EventOps) {
        let Some(connection) = self.slots.get_mut(slot).and_then(Option::take) else { return };
        // The event loop must forget the descriptor's number before another socket gets it.
        let _ = ops.remove(events(&connection, slot, EventSet::empty()));
        if connection.queued {
            self.ready.retain(|ready| *ready != slot);
        }
        self.forget_ports(connection.ports(), slot);
        self.promised -= connection.allocation();
        self.free.push(slot);
        connection.close();
    }

    /// The port that the host's next connection gets.
    pub fn next_port(&self) -> u32 {
        self.next_port
    }

    /// Goes on with this port, if the host's connections may have it.
    pub fn set_next_port(&mut self, port: u32) {
        if (FIRST_HOST_PORT..u32::MAX).contains(&port) {
            self.next_port = port;
        }
    }

    fn promise(&self) -> u32 {
        if self.promised + ALLOCATION <= SHARED_BYTES { ALLOCATION } else { SMALL_ALLOCATION }
    }

    /// A port that no connection of the host uses: ports come again only after 2^30 connections.
    fn new_port(&mut self) -> u32 {
        let port = self.next_port;
        self.next_port = if port == u32::MAX - 1 { FIRST_HOST_PORT } else { port + 1 };
        port
    }
}

fn events(connection: &Connection, slot: usize, set: EventSet) -> Events {
    Events::with_data(connection.stream(), FIRST_CONNECTION + slot as u32, set)
}

/// Connects to the socket of a port without waiting: where the listener's backlog is full, that is a refusal.
fn connect(path: &Path, port: u32) -> io::Result<UnixStream> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!("_{port}"));
    let address = SocketAddrUnix::new(PathBuf::from(name))?;
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket: OwnedFd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &address)?;
    Ok(socket.into())
}
