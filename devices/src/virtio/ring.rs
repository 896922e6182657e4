//! A queue as a device wants it: whole descriptor chains, checked before the device sees them.
//!
//! virtio-queue walks chains safely but ends a broken one silently, as if it were complete, and knows no bound for an
//! indirect table but 65535. So a chain is collected and checked here in one go: it ends where it says it ends, is not
//! longer than the queue, has its writable part behind the readable one, and all of it lies in guest memory.

use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use super::{Memory, state::RingState};

/// How a driver has broken its ring. The device that meets one stops and needs a reset.
#[derive(Debug, Error)]
pub enum RingError {
    /// The ring itself cannot be used, or its available index is more than the queue's size ahead.
    #[error("ring: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// The chain ends in a bad index, address or indirect table, runs in a circle, or is longer than the queue.
    #[error("the descriptor chain at {head} is broken after {length} descriptors")]
    BrokenChain {
        /// Index of the first descriptor.
        head: u16,
        /// Number of good descriptors before the fault.
        length: usize,
    },
    /// Section 2.7.4.2: a readable descriptor lies behind a writable one.
    #[error("the descriptor chain at {head} has a readable buffer behind a writable one")]
    ReadableBehindWritable {
        /// Index of the first descriptor.
        head: u16,
    },
    /// A buffer is not, or not wholly, in guest memory.
    #[error("a buffer of {length} bytes at {address:#x} is not in guest memory")]
    NotInMemory {
        /// Guest-physical address of the buffer.
        address: u64,
        /// Its length in bytes.
        length: u32,
    },
    /// The chain is too short for what its request needs.
    #[error("the request needs {needed} more bytes than its buffers have")]
    TooShort {
        /// Missing bytes.
        needed: u64,
    },
}

/// One buffer of a chain; it lies in guest memory and is not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address.
    pub address: GuestAddress,
    /// Length in bytes.
    pub length: u32,
}

/// A checked descriptor chain. Reused from request to request for its allocation.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    readable: Vec<Buffer>,
    writable: Vec<Buffer>,
}

impl Chain {
    /// Index of the first descriptor, which names the chain in the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// The buffers that the device reads.
    pub fn readable(&self) -> &[Buffer] {
        &self.readable
    }

    /// The buffers that the device writes.
    pub fn writable(&self) -> &[Buffer] {
        &self.writable
    }

    /// Copies bytes out of the readable part, from `offset` on.
    ///
    /// # Errors
    /// [`RingError::TooShort`] when the part has fewer bytes; nothing useful is in `out` then.
    pub fn read(&self, memory: &Memory, offset: u64, out: &mut [u8]) -> Result<(), RingError> {
        let mut rest = out;
        for buffer in section(&self.readable, offset, rest.len() as u64) {
            let (now, later) =
                std::mem::take(&mut rest).split_at_mut_checked(buffer.length as usize).unwrap_or_default();
            memory.read_slice(now, buffer.address).map_err(|_| buffer.outside())?;
            rest = later;
        }
        if rest.is_empty() { Ok(()) } else { Err(RingError::TooShort { needed: rest.len() as u64 }) }
    }

    /// Copies `data` into the writable part, from `offset` on.
    ///
    /// # Errors
    /// [`RingError::TooShort`] when the part has fewer bytes; what fits has been written.
    pub fn write(&self, memory: &Memory, offset: u64, data: &[u8]) -> Result<(), RingError> {
        let mut rest = data;
        for buffer in section(&self.writable, offset, rest.len() as u64) {
            let (now, later) = rest.split_at_checked(buffer.length as usize).unwrap_or_default();
            memory.write_slice(now, buffer.address).map_err(|_| buffer.outside())?;
            rest = later;
        }
        if rest.is_empty() { Ok(()) } else { Err(RingError::TooShort { needed: rest.len() as u64 }) }
    }
}

impl Buffer {
    fn outside(&self) -> RingError {
        RingError::NotInMemory { address: self.address.0, length: self.length }
    }
}

/// Bytes in `buffers` altogether.
pub fn total(buffers: &[Buffer]) -> u64 {
    buffers.iter().map(|buffer| u64::from(buffer.length)).sum()
}

/// The parts of `buffers` that hold the bytes from `offset` to `offset + length`, as far as there are so many.
/// None of them is empty.
pub fn section(buffers: &[Buffer], offset: u64, length: u64) -> impl Iterator<Item = Buffer> {
    let end = offset.saturating_add(length);
    let mut position = 0u64;
    buffers.iter().filter_map(move |buffer| {
        let start = position;
        position += u64::from(buffer.length);
        let from = offset.max(start);
        let to = end.min(position);
        if from >= to {
            return None;
        }
        // Both are inside the buffer, whose length is a u32 and whose end is in guest memory.
        let address = GuestAddress(buffer.address.0 + (from - start));
        Some(Buffer { address, length: u32::try_from(to - from).ok()? })
    })
}

/// A queue and what its device needs to know of it.
#[derive(Debug)]
pub struct Ring {
    queue: Queue,
    /// How many chains were pushed since the driver was last considered for an interrupt.
    pushed: u16,
}

impl Ring {
    /// Takes over a queue that was found valid.
    pub fn new(queue: Queue) -> Self {
        Ring { queue, pushed: 0 }
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The queue's fields.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Where the queue stands, as a snapshot wants it: after `unused` of the chains taken have been put back.
    pub fn state(&self, unused: u16) -> RingState {
        RingState {
            next_avail: self.queue.next_avail().wrapping_sub(unused),
            next_used: self.queue.next_used(),
        }
    }

    /// How many chains the driver has ever made available, modulo 2^16.
    ///
    /// # Errors
    /// The driver has broken the ring.
    pub fn available_index(&self, memory: &Memory) -> Result<u16, RingError> {
        Ok(self.queue.avail_idx(memory, Ordering::Acquire)?.0)
    }

    /// Asks the driver to notify when it makes one more chain available than now, though none of those there is taken.
    /// Returns [`Ring::available_index`] of now.
    ///
    /// # Errors
    /// The driver has broken the ring.
    pub fn notify_at_next(&mut self, memory: &Memory) -> Result<u16, RingError> {
        self.queue.enable_notification(memory)?;
        let available = self.available_index(memory)?;
        if self.queue.event_idx_enabled() {
            // Section 2.7.10: avail_event, behind the used ring's elements.
            let at = self.queue.used_ring() + 4 + 8 * u64::from(self.queue.size());
            memory
                .store(available.to_le(), GuestAddress(at), Ordering::SeqCst)
                .map_err(virtio_queue::Error::GuestMemory)?;
        }
        Ok(available)
    }

    /// Takes the next available chain into `chain`; false when there is none.
    ///
    /// # Errors
    /// The driver has broken the ring.
    pub fn pop(&mut self, memory: &Memory, chain: &mut Chain) -> Result<bool, RingError> {
        let size = usize::from(self.queue.size());
        let Some(descriptors) = self.queue.iter(memory)?.next() else { return Ok(false) };
        let head = descriptors.head_index();
        chain.head = head;
        chain.readable.clear();
        chain.writable.clear();
        let mut length = 0;
        let mut complete = false;
        for descriptor in descriptors {
            // One more than the queue's size breaks the chain, whatever the descriptors say.
            if length == size {
                complete = false;
                break;
            }
            length += 1;
            complete = !descriptor.has_next();
            let buffer = Buffer { address: descriptor.addr(), length: descriptor.len() };
            let (access, part) = if descriptor.is_write_only() {
                (Permissions::Write, &mut chain.writable)
            } else if chain.writable.is_empty() {
                (Permissions::Read, &mut chain.readable)
            } else {
                return Err(RingError::ReadableBehindWritable { head });
            };
            // A buffer of no bytes may point anywhere, so nobody shall see where it points.
            if buffer.length == 0 {
                continue;
            }
            if !memory.check_range(buffer.address, buffer.length as usize, access) {
                return Err(buffer.outside());
            }
            part.push(buffer);
        }
        if complete { Ok(true) } else { Err(RingError::BrokenChain { head, length }) }
    }

    /// Undoes the last [`Ring::pop`]: the chain stays available.
    pub fn put_back(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns a chain to the driver with `written` bytes in its writable part.
    ///
    /// # Errors
    /// The driver has broken the ring.
    pub fn push(&mut self, memory: &Memory, head: u16, written: u32) -> Result<(), RingError> {
        self.pushed = self.pushed.wrapping_add(1);
        Ok(self.queue.add_used(memory, head, written)?)
    }

    /// Returns several chains that the driver is to see all at once, each a head and the bytes written to it.
    ///
    /// # Errors
    /// The driver has broken the ring.
    pub fn push_together(
        &mut self,
        memory: &Memory,
        chains: impl ExactSizeIterator<Item = (u16, u32)>,
    ) -> Result<(), RingError> {
        let Some(last) = chains.len().checked_sub(1) else { return Ok(()) };
        let first = self.queue.next_used();
        for (n, (head, written)) in chains.enumerate() {
            let position = first.wrapping_add(n as u16);
            if n == last {
                // Counting the index up is what shows all of them to the driver.
                self.queue.set_next_used(position);
                self.pushed = self.pushed.wrapping_add(n as u16);
                return self.push(memory, head, written);
            }
            let slot = self.queue.used_ring() + 4 + 8 * u64::from(position % self.queue.size());
            // struct virtq_used_elem: id, len.
            let element = u64::from(head) | u64::from(written) << 32;
            memory
                .write_obj(element.to_le(), GuestAddress(slot))
                .map_err(virtio_queue::Error::GuestMemory)?;
        }
        Ok(())
    }

    /// Asks the driver not to notify while the device is looking anyway.
    ///
    /// # Errors
    /// The driver has broken the ring.
    pub fn disable_notification(&mut self, memory: &Memory) -> Result<(), RingError> {
        Ok(self.queue.disable_notification(memory)?)
    }

    /// Asks the driver to notify again; true when chains became available in the meantime, which must be served now.
    ///
    /// # Errors
    /// The driver has broken the ring.
    pub fn enable_notification(&mut self, memory: &Memory) -> Result<bool, RingError> {
        Ok(self.queue.enable_notification(memory)?)
    }

    /// Whether the driver wants an interrupt for what was pushed since this was last asked.
    ///
    /// # Errors
    /// The driver has broken the ring.
    pub fn needs_interrupt(&mut self, memory: &Memory) -> Result<bool, RingError> {
        let pushed = std::mem::take(&mut self.pushed);
        if pushed == 0 {
            return Ok(false);
        }
        // What was pushed must be visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        let available = self.queue.avail_ring();
        let read = |at: u64| -> Result<u16, RingError> {
            let value = memory.load(GuestAddress(at), Ordering::Relaxed);
            Ok(u16::from_le(value.map_err(virtio_queue::Error::GuestMemory)?))
        };
        if !self.queue.event_idx_enabled() {
            return Ok(u32::from(read(available)?) & VRING_AVAIL_F_NO_INTERRUPT == 0);
        }
        // Section 2.7.7.2: when what was pushed passes the driver's used_event.
        let used_event = read(available + 4 + 2 * u64::from(self.queue.size()))?;
        Ok(self.queue.next_used().wrapping_sub(used_event).wrapping_sub(1) < pushed)
    }
}

#[cfg(test)]
mod tests;
