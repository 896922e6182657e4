//! What the fuzz targets share: input bytes as numbers, and a guest that does what they say.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "only fuzzers run this")]

use std::path::PathBuf;

use devices::testing::{Descriptor, Guest, MEMORY_SIZE};
use vm_memory::{Bytes, GuestAddress};

/// The fuzzer's bytes, taken from the front; zeros when they are used up.
pub struct Input<'a> {
    rest: &'a [u8],
}

impl<'a> Input<'a> {
    /// Begins at the front.
    pub fn new(bytes: &'a [u8]) -> Self {
        Input { rest: bytes }
    }

    /// Whether all bytes are used up.
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// Up to `most` bytes.
    pub fn bytes(&mut self, most: usize) -> &'a [u8] {
        let (now, rest) = self.rest.split_at(most.min(self.rest.len()));
        self.rest = rest;
        now
    }

    fn number<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let taken = self.bytes(N);
        bytes[..taken.len()].copy_from_slice(taken);
        bytes
    }

    /// One byte.
    pub fn u8(&mut self) -> u8 {
        self.number::<1>()[0]
    }

    /// Two bytes.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.number())
    }

    /// Four bytes.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.number())
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.number())
    }

    /// An address that has a chance to mean something: rings, buffers, the seam and the end of memory, or anything.
    pub fn address(&mut self) -> u64 {
        let near = u64::from(self.u16());
        match self.u8() % 8 {
            0 => self.u64(),
            1 => MEMORY_SIZE / 2 - 0x8000 + near,
            2 => MEMORY_SIZE - 0x8000 + near,
            3 => 0x1_0000 + near,
            4 => near,
            _ => 0x10_0000 + near * 16,
        }
    }

    /// A length that has a chance to fit.
    pub fn length(&mut self) -> u32 {
        match self.u8() % 4 {
            0 => self.u8().into(),
            1 => u32::from(self.u8()) * 512 + 1,
            2 => self.u16().into(),
            _ => self.u32(),
        }
    }
}

/// One thing that a driver, good or bad, may do with any device.
pub fn driver_step(guest: &mut Guest, input: &mut Input) {
    let queues = guest.queues.len().max(1);
    let queue = usize::from(input.u8()) % queues;
    match input.u8() % 12 {
        0 | 1 => {
            let index = input.u16() % 300;
            let (address, length) = (input.address(), input.length());
            let descriptor = Descriptor { address, length, flags: input.u16() % 8, next: input.u16() % 300 };
            let Guest { queues, memory, .. } = guest;
            if let Some(ring) = queues.get(queue) {
                ring.set_descriptor(memory, index, descriptor);
            }
        }
        2 | 3 => {
            let head = input.u16() % 300;
            let Guest { queues, memory, .. } = guest;
            if let Some(ring) = queues.get_mut(queue) {
                ring.make_available(memory, head);
            }
        }
        4 => {
            let idx = input.u16();
            let Guest { queues, memory, .. } = guest;
            if let Some(ring) = queues.get_mut(queue) {
                ring.set_avail_idx(memory, idx);
            }
        }
        5 => {
            let (address, bytes) = (input.address(), input.bytes(64));
            let _ = guest.memory.write_slice(bytes, GuestAddress(address));
        }
        6 => {
            let (offset, value) = (u64::from(input.u8()), input.u32());
            guest.write(offset, value);
        }
        7 => {
            let (offset, width) = (u64::from(input.u16()) % 0x200, usize::from(input.u8() % 9));
            let mut data = [0; 8];
            guest.transport.read(offset, &mut data[..width]);
            guest.transport.write(0x100 + offset, &data[..width]);
        }
        8 => start(guest, input),
        9 => while guest.used(queue).is_some() {},
        _ => guest.kick(queue),
    }
}

/// Starts the device with the features of the ring that the input chooses.
pub fn start(guest: &mut Guest, input: &mut Input) {
    let (features, size) = (u64::from(input.u8() % 4) << 28, 1 << (input.u8() % 9));
    guest.start(features, size);
}

/// A directory for this fuzzer's files.
pub fn directory(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("devices-fuzz-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&path).expect("a directory for the fuzzer");
    path
}
