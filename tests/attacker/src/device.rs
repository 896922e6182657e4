//! A driver's side of virtio over MMIO (virtio 1.2, section 4.2) that keeps the rules. The attacks break them themselves.

use crate::{
    cpu,
    memory::{self, RINGS},
};

pub const NET: u32 = 1;
pub const BLOCK: u32 = 2;
pub const RNG: u32 = 4;
pub const BALLOON: u32 = 5;
pub const VSOCK: u32 = 19;
pub const FS: u32 = 26;

pub const STATUS_READY: u32 = 15;
pub const STATUS_NEEDS_RESET: u32 = 64;
pub const F_INDIRECT: u64 = 1 << 28;
pub const F_EVENT_IDX: u64 = 1 << 29;
pub const F_VERSION_1: u64 = 1 << 32;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// The most queues of a device that are tried.
pub const MAX_QUEUES: u32 = 8;

#[derive(Clone, Copy, Default)]
pub struct Device {
    pub base: u64,
    pub kind: u32,
    pub index: u64,
}

impl Device {
    pub fn at(base: u64, index: u64) -> Self {
        Self { base, kind: cpu::read32(base + 8), index }
    }

    pub fn name(&self) -> &'static str {
        match self.kind {
            NET => "net",
            BLOCK => "block",
            RNG => "rng",
            BALLOON => "balloon",
            VSOCK => "vsock",
            FS => "fs",
            _ => "unknown",
        }
    }

    pub fn set(&self, register: u64, value: u32) {
        cpu::write32(self.base + register, value);
    }

    pub fn get(&self, register: u64) -> u32 {
        cpu::read32(self.base + register)
    }

    pub fn reset(&self) {
        self.set(0x70, 0);
    }

    pub fn status(&self) -> u32 {
        self.get(0x70)
    }

    pub fn failed(&self) -> bool {
        self.status() & STATUS_NEEDS_RESET != 0
    }

    pub fn features(&self) -> u64 {
        self.set(0x14, 1);
        let high = u64::from(self.get(0x10));
        self.set(0x14, 0);
        high << 32 | u64::from(self.get(0x10))
    }

    /// From reset to FEATURES_OK. The transport's version is always taken.
    pub fn negotiate(&self, wanted: u64) {
        self.reset();
        self.set(0x70, 1);
        self.set(0x70, 3);
        let features = (self.features() & wanted) | F_VERSION_1;
        self.set(0x24, 0);
        self.set(0x20, features as u32);
        self.set(0x24, 1);
        self.set(0x20, (features >> 32) as u32);
        self.set(0x70, 11);
    }

    pub fn queue_max(&self, queue: u32) -> u16 {
        self.set(0x30, queue);
        self.get(0x34) as u16
    }

    /// Tells the device where a queue lies.
    pub fn place(&self, queue: u32, size: u32, descriptors: u64, driver: u64, device: u64) {
        self.set(0x30, queue);
        self.set(0x38, size);
        for (register, address) in [(0x80, descriptors), (0x90, driver), (0xa0, device)] {
            self.set(register, address as u32);
            self.set(register + 4, (address >> 32) as u32);
        }
        self.set(0x44, 1);
    }

    pub fn go(&self) {
        self.set(0x70, STATUS_READY);
    }

    pub fn kick(&self, queue: u32) {
        cpu::fence();
        self.set(0x50, queue);
    }

    /// A queue in this device's part of [`RINGS`], empty. With at most 32 descriptors all of them fit.
    pub fn queue(&self, number: u32) -> Queue {
        let size = self.queue_max(number).min(32);
        let at = RINGS + self.index * 0x1_0000 + u64::from(number) * 0x2000;
        memory::fill(at, 0x1800, 0);
        let queue = Queue {
            number,
            size,
            descriptors: at,
            driver: at + 0x800,
            device: at + 0x1000,
            given: 0,
            taken: 0,
        };
        if size > 0 {
            self.place(number, size.into(), queue.descriptors, queue.driver, queue.device);
        }
        queue
    }

    /// All queues that there are, and the device live.
    pub fn start(&self, features: u64) -> [Queue; MAX_QUEUES as usize] {
        self.negotiate(features);
        let queues = core::array::from_fn(|n| self.queue(n as u32));
        self.go();
        queues
    }
}

/// A part of a chain: address, bytes, whether the device writes it.
pub type Part = (u64, u32, bool);

#[derive(Clone, Copy, Default)]
pub struct Queue {
    pub number: u32,
    pub size: u16,
    pub descriptors: u64,
    pub driver: u64,
    pub device: u64,
    /// As many chains were made available.
    pub given: u16,
    /// As many were seen used.
    pub taken: u16,
}

impl Queue {
    pub fn describe(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        descriptor(self.descriptors + 16 * u64::from(index), address, length, flags, next);
    }

    /// Makes the chain that begins at `head` available, without notice.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.given % self.size.max(1));
        cpu::write16(self.driver + 4 + 2 * slot, head);
        self.given = self.given.wrapping_add(1);
        cpu::fence();
        cpu::write16(self.driver + 2, self.given);
    }

    /// Makes a chain of these parts available, in descriptors from `first` on.
    pub fn give(&mut self, first: u16, parts: &[Part]) {
        for (n, (address, length, writes)) in (first..).zip(parts) {
            let last = usize::from(n - first) + 1 == parts.len();
            let flags = if *writes { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.describe(n, *address, *length, flags, n + 1);
        }
        self.offer(first);
    }

    /// The next used chain: its head, and the bytes written.
    pub fn take(&mut self) -> Option<(u32, u32)> {
        if self.size == 0 || cpu::read16(self.device + 2) == self.taken {
            return None;
        }
        cpu::fence();
        let slot = self.device + 4 + 8 * u64::from(self.taken % self.size);
        self.taken = self.taken.wrapping_add(1);
        Some((cpu::read32(slot), cpu::read32(slot + 4)))
    }

    /// Waits for a used chain: for long, as the device has to answer.
    pub fn wait(&mut self, device: &Device) -> Option<(u32, u32)> {
        for _ in 0..200_000 {
            if let Some(used) = self.take() {
                return Some(used);
            }
            if device.failed() {
                return None;
            }
            cpu::rest(200);
        }
        None
    }

    /// Gives the device some time, as nothing says whether it answers.
    pub fn wait_a_little(&mut self, device: &Device) {
        for _ in 0..20 {
            while self.take().is_some() {}
            if self.taken == self.given || device.failed() {
                return;
            }
            cpu::rest(100);
        }
    }
}

/// struct virtq_desc (section 2.7.5).
pub fn descriptor(at: u64, address: u64, length: u32, flags: u16, next: u16) {
    cpu::write64(at, address);
    cpu::write32(at + 8, length);
    cpu::write16(at + 12, flags);
    cpu::write16(at + 14, next);
}
