//! From the host to the guest (virtio 1.2, section 5.1.6.3 and 5.1.6.4).
//!
//! A packet's length is known only when it has been read, and what does not fit is cut off. So room for the largest is
//! gathered first, and the packet read straight into it. Where a driver posts less than that, or may not be given one
//! packet in several chains, it is read aside and copied.

use std::{collections::VecDeque, io, os::fd::BorrowedFd};

use vm_memory::Bytes;

use super::{
    super::{
        Memory,
        ring::{Buffer, Chain, Ring, RingError, section, total},
        state::RingState,
        throttle::Throttle,
        transfer::{Span, Transfer},
    },
    HEADER_BYTES,
};

/// At least the longest packet with its headers: 64 KiB of IP, Ethernet with two VLAN tags, virtio's.
const MAX_BYTES: usize = 65_535 + 22 + HEADER_BYTES as usize;
/// Offset of num_buffers in virtio_net_hdr.
const NUM_BUFFERS: u64 = 10;

/// A chain that was taken from the ring and waits for its packet.
#[derive(Clone, Copy, Debug)]
struct Posted {
    head: u16,
    buffers: usize,
    bytes: u64,
}

/// The device's side of receiveq.
pub struct Receiver {
    ring: Ring,
    merges: bool,
    chain: Chain,
    posted: VecDeque<Posted>,
    /// The buffers of all of `posted`, in order, and their length together.
    buffers: VecDeque<Buffer>,
    room: u64,
    aside: Vec<u8>,
    /// Bytes in `aside` of a packet that has no room yet.
    waiting: usize,
}

/// What became of an attempt to receive.
enum Attempt {
    /// A packet of so many bytes with its header, or lost it for want of room.
    Received(u64),
    /// The host has no packet.
    Nothing,
    /// The guest has no room.
    NoRoom,
}

impl Receiver {
    pub fn new(ring: Ring, merges: bool) -> Self {
        Receiver {
            ring,
            merges,
            chain: Chain::default(),
            posted: VecDeque::new(),
            buffers: VecDeque::new(),
            room: 0,
            aside: Vec::new(),
            waiting: 0,
        }
    }

    /// Receives at most a queue's size of packets; true when there may be more at once.
    pub fn process(
        &mut self,
        memory: &Memory,
        file: BorrowedFd<'_>,
        transfer: &mut Transfer,
        throttle: &mut Throttle,
    ) -> Result<bool, RingError> {
        for _ in 0..self.ring.size() {
            // Packets wait in the host's queue, which drops what it has no room for.
            if !throttle.admits() {
                return Ok(false);
            }
            self.gather(memory)?;
            let Attempt::Received(bytes) = self.attempt(memory, file, transfer)? else { return Ok(false) };
            throttle.charge(bytes.saturating_sub(HEADER_BYTES.into()));
        }
        Ok(true)
    }

    pub fn needs_interrupt(&mut self, memory: &Memory) -> Result<bool, RingError> {
        self.ring.needs_interrupt(memory)
    }

    /// Where the queue stands without the chains that wait for a packet: they are still the driver's to offer.
    pub fn state(&self) -> RingState {
        // No more chains than the ring has can be out.
        self.ring.state(self.posted.len() as u16)
    }

    /// Takes chains from the ring until the largest packet has room, or there are no more.
    fn gather(&mut self, memory: &Memory) -> Result<(), RingError> {
        if self.has_enough() {
            return Ok(());
        }
        self.ring.disable_notification(memory)?;
        // No more chains than the ring has can be out, and each round takes one or is the last but one.
        for _ in 0..=self.ring.size() {
            if self.has_enough() || self.posted.len() == usize::from(self.ring.size()) {
                break;
            }
            if self.ring.pop(memory, &mut self.chain)? {
                let (buffers, bytes) = (self.chain.writable(), total(self.chain.writable()));
                self.posted.push_back(Posted { head: self.chain.head(), buffers: buffers.len(), bytes });
                self.buffers.extend(buffers);
                self.room += bytes;
            } else if !self.ring.enable_notification(memory)? {
                break;
            }
        }
        Ok(())
    }

    fn has_enough(&self) -> bool {
        if self.merges { self.room >= MAX_BYTES as u64 } else { !self.posted.is_empty() }
    }

    fn attempt(
        &mut self,
        memory: &Memory,
        file: BorrowedFd<'_>,
        transfer: &mut Transfer,
    ) -> Result<Attempt, RingError> {
        if self.posted.is_empty() {
            return Ok(Attempt::NoRoom);
        }
        if self.waiting == 0 && self.room >= MAX_BYTES as u64 {
            let span = Span { buffers: self.buffers.make_contiguous(), offset: 0, length: MAX_BYTES as u64 };
            return match transfer.read(file, memory, span) {
                Ok(length) => self.hand_over(memory, length).map(|()| Attempt::Received(length)),
                Err(error) => Ok(self.unread(&error)),
            };
        }
        if self.waiting == 0 {
            self.aside.resize(MAX_BYTES, 0);
            match rustix::io::read(file, &mut self.aside) {
                Ok(length) => self.waiting = length,
                Err(error) => return Ok(self.unread(&error.into())),
            }
        }
        self.copy(memory)
    }

    fn unread(&self, error: &io::Error) -> Attempt {
        if error.kind() != io::ErrorKind::WouldBlock {
            log::debug!("net: cannot receive: {error}");
        }
        Attempt::Nothing
    }

    /// Copies the packet that was read aside to its chains, drops it, or lets it wait for more of them.
    fn copy(&mut self, memory: &Memory) -> Result<Attempt, RingError> {
        let room = if self.merges { self.room } else { self.posted.front().map_or(0, |chain| chain.bytes) };
        let length = self.waiting as u64;
        if length > room {
            let all_posted = self.posted.len() == usize::from(self.ring.size());
            if self.merges && !all_posted {
                return Ok(Attempt::NoRoom);
            }
            log::debug!("net: a packet of {length} bytes is lost, the driver has room for {room}");
            self.waiting = 0;
            return Ok(Attempt::Received(length));
        }
        let packet = std::mem::take(&mut self.aside);
        let written = self.write(memory, 0, packet.get(..self.waiting).unwrap_or_default());
        self.aside = packet;
        self.waiting = 0;
        written?;
        self.hand_over(memory, length).map(|()| Attempt::Received(length))
    }

    /// Returns the chains that hold the first `length` bytes, as one packet.
    fn hand_over(&mut self, memory: &Memory, length: u64) -> Result<(), RingError> {
        if length < u64::from(HEADER_BYTES) {
            // No backend does this. What was read lies in chains that stay posted.
            return Ok(());
        }
        let (mut count, mut bytes) = (0u16, 0);
        for chain in &self.posted {
            if bytes >= length {
                break;
            }
            bytes += chain.bytes;
            count += 1;
        }
        self.write(memory, NUM_BUFFERS, &count.to_le_bytes())?;
        let mut rest = length;
        let used = self.posted.iter().take(count.into()).map(|chain| {
            let written = rest.min(chain.bytes);
            rest -= written;
            (chain.head, written as u32)
        });
        self.ring.push_together(memory, used)?;
        for chain in self.posted.drain(..usize::from(count)) {
            self.room -= chain.bytes;
            self.buffers.drain(..chain.buffers);
        }
        Ok(())
    }

    /// Writes to the posted buffers, which are long enough.
    fn write(&mut self, memory: &Memory, offset: u64, data: &[u8]) -> Result<(), RingError> {
        let mut rest = data;
        for buffer in section(self.buffers.make_contiguous(), offset, data.len() as u64) {
            let (now, later) = rest.split_at_checked(buffer.length as usize).unwrap_or_default();
            let outside = |_| RingError::NotInMemory { address: buffer.address.0, length: buffer.length };
            memory.write_slice(now, buffer.address).map_err(outside)?;
            rest = later;
        }
        Ok(())
    }
}
