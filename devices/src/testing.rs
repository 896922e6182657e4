//! A guest's side of a device, for tests and fuzzers: memory, a driver for the MMIO transport, and split rings.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "only tests and fuzzers run this")]

use std::{
    collections::VecDeque,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use event_manager::{EventManager, SubscriberOps};
use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::virtio::{
    Memory, VirtioDevice,
    mmio::{F_VERSION_1, MmioTransport},
    state::{RestoreError, TransportState},
    throttle::Alarm,
};

/// Size of the guest's memory in bytes. It is two regions that touch in the middle, so that buffers can cross.
pub const MEMORY_SIZE: u64 = 8 << 20;
/// Where the rings are, 64 KiB for each queue; buffers begin behind eight of them.
const RINGS: u64 = 0x1_0000;
const RING_STRIDE: u64 = 0x1_0000;
const HEAP: u64 = 0x10_0000;

/// VIRTQ_DESC_F_NEXT.
pub const NEXT: u16 = 1;
/// VIRTQ_DESC_F_WRITE.
pub const WRITE: u16 = 2;
/// VIRTQ_DESC_F_INDIRECT.
pub const INDIRECT: u16 = 4;

/// One entry of a descriptor table.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    /// Guest-physical address.
    pub address: u64,
    /// Length in bytes.
    pub length: u32,
    /// `NEXT`, `WRITE`, `INDIRECT`.
    pub flags: u16,
    /// Index of the next one.
    pub next: u16,
}

/// The driver's view of one queue.
#[derive(Clone, Debug)]
pub struct DriverQueue {
    /// Number of descriptors.
    pub size: u16,
    base: u64,
    avail_idx: u16,
    used_idx: u16,
    free: VecDeque<u16>,
    lengths: Vec<u16>,
}

/// A guest with one device.
pub struct Guest {
    /// Guest memory.
    pub memory: Memory,
    /// The device's registers.
    pub transport: MmioTransport,
    /// The device's interrupt line.
    pub irq: EventFd,
    /// The rings, as set up by [`Guest::start`].
    pub queues: Vec<DriverQueue>,
    heap: u64,
    manager: EventManager<Arc<Mutex<dyn VirtioDevice>>>,
}

impl Guest {
    /// A guest whose driver has not looked at the device yet.
    pub fn new(device: impl VirtioDevice + 'static) -> Self {
        Self::with_shared(Arc::new(Mutex::new(device)))
    }

    /// The same, with a device that the test keeps a hand on.
    pub fn with_shared(device: Arc<Mutex<dyn VirtioDevice>>) -> Self {
        let half = (MEMORY_SIZE / 2) as usize;
        let memory =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), half), (GuestAddress(half as u64), half)])
                .unwrap();
        Self::with_memory(memory, device)
    }

    /// The same, with memory of the test's own, as large and in as many regions.
    pub fn with_memory(memory: Memory, device: Arc<Mutex<dyn VirtioDevice>>) -> Self {
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let transport =
            MmioTransport::new(Memory::clone(&memory), device.clone(), irq.try_clone().unwrap()).unwrap();
        let mut manager = EventManager::new().unwrap();
        manager.add_subscriber(device);
        Guest { memory, transport, irq, queues: Vec::new(), heap: HEAP, manager }
    }

    /// This guest with another device, which continues the saved one. The memory is the same.
    ///
    /// # Errors
    /// The device does not take the state.
    pub fn continued(
        &self,
        device: Arc<Mutex<dyn VirtioDevice>>,
        state: &TransportState,
    ) -> Result<Self, RestoreError> {
        let mut guest = Self::with_memory(self.memory.clone(), device);
        guest.transport.restore(state)?;
        guest.queues = self.queues.clone();
        guest.heap = self.heap;
        Ok(guest)
    }

    /// Reads a register.
    pub fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a register.
    pub fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    /// The device status.
    pub fn status(&self) -> u32 {
        self.read(0x70)
    }

    /// The feature bits on offer.
    pub fn offered_features(&mut self) -> u64 {
        self.write(0x14, 0);
        let low = u64::from(self.read(0x10));
        self.write(0x14, 1);
        low | u64::from(self.read(0x10)) << 32
    }

    /// Resets the device and negotiates `features` with VERSION_1; true when the device takes them.
    pub fn negotiate(&mut self, features: u64) -> bool {
        let features = features | F_VERSION_1;
        self.write(0x70, 0);
        self.write(0x70, 1);
        self.write(0x70, 3);
        self.write(0x24, 0);
        self.write(0x20, features as u32);
        self.write(0x24, 1);
        self.write(0x20, (features >> 32) as u32);
        self.write(0x70, 11);
        self.status() & 8 != 0
    }

    /// Clears and announces a ring of `size` descriptors for queue `index`.
    pub fn set_up_queue(&mut self, index: u32, size: u16) -> DriverQueue {
        let base = RINGS + u64::from(index) * RING_STRIDE;
        self.memory.write_slice(&[0; RING_STRIDE as usize], GuestAddress(base)).unwrap();
        let queue = DriverQueue {
            size,
            base,
            avail_idx: 0,
            used_idx: 0,
            free: (0..size).collect(),
            lengths: vec![0; size.into()],
        };
        self.write(0x30, index);
        self.write(0x38, size.into());
        for (register, address) in [(0x80, queue.table()), (0x90, queue.avail()), (0xa0, queue.used())] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(0x44, 1);
        queue
    }

    /// Resets, negotiates `features`, sets up all queues at `size` (or their maximum if that is less), and goes live.
    pub fn start(&mut self, features: u64, size: u16) {
        assert!(self.negotiate(features), "the device refused features {features:#x}");
        self.queues = Vec::new();
        for index in 0.. {
            self.write(0x30, index);
            let max = self.read(0x34) as u16;
            if max == 0 {
                break;
            }
            let queue = self.set_up_queue(index, size.min(max));
            self.queues.push(queue);
        }
        self.write(0x70, 15);
        self.run();
    }

    /// Runs the event loop until it has nothing more to do at once.
    pub fn run(&mut self) {
        for _ in 0..10_000 {
            if self.manager.run_with_timeout(0).unwrap() == 0 {
                return;
            }
        }
        panic!("the event loop does not come to rest");
    }

    /// Runs the event loop until `done`, or fails the test after many rounds without it.
    pub fn run_until(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        for _ in 0..10_000 {
            if done(self) {
                return;
            }
            self.manager.run_with_timeout(10).unwrap();
        }
        panic!("what was waited for does not happen");
    }

    /// Takes `length` bytes of guest memory that nothing else uses, until [`Guest::free_memory`].
    pub fn allocate(&mut self, length: u64) -> u64 {
        let address = self.heap;
        self.heap += length.next_multiple_of(16);
        assert!(self.heap <= MEMORY_SIZE, "the test uses too much guest memory");
        address
    }

    /// Gives back all that was allocated.
    pub fn free_memory(&mut self) {
        self.heap = HEAP;
    }

    /// Copies bytes to a new place in guest memory.
    pub fn place(&mut self, bytes: &[u8]) -> u64 {
        let address = self.allocate(bytes.len() as u64);
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
        address
    }

    /// Reads guest memory.
    pub fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Makes a chain of (address, length, writable) buffers available, without notifying. Returns its head, or `None`
    /// when the queue is full.
    pub fn add(&mut self, queue: usize, buffers: &[(u64, u32, bool)]) -> Option<u16> {
        let ring = self.queues.get_mut(queue)?;
        if ring.free.len() < buffers.len() || buffers.is_empty() {
            return None;
        }
        let indexes: Vec<u16> = ring.free.drain(..buffers.len()).collect();
        for (n, (address, length, writable)) in buffers.iter().enumerate() {
            let next = indexes.get(n + 1).copied();
            let flags = if next.is_some() { NEXT } else { 0 } | if *writable { WRITE } else { 0 };
            let next = next.unwrap_or(0);
            ring.set_descriptor(
                &self.memory,
                indexes[n],
                Descriptor { address: *address, length: *length, flags, next },
            );
        }
        let head = indexes[0];
        ring.lengths[usize::from(head)] = buffers.len() as u16;
        ring.make_available(&self.memory, head);
        Some(head)
    }

    /// Notifies the device of a queue and runs the event loop.
    pub fn kick(&mut self, queue: usize) {
        self.write(0x50, queue as u32);
        self.run();
    }

    /// Takes the next used chain: its head and the number of bytes written.
    pub fn used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let ring = self.queues.get_mut(queue)?;
        let idx: u16 = self.memory.read_obj(GuestAddress(ring.used() + 2)).unwrap();
        if idx == ring.used_idx {
            return None;
        }
        let slot = ring.used() + 4 + 8 * u64::from(ring.used_idx % ring.size);
        let head: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
        let written: u32 = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
        ring.used_idx = ring.used_idx.wrapping_add(1);
        let head = head as u16;
        // A fuzzer's chains have no length here; those are not tracked.
        if let Some(length) = ring.lengths.get(usize::from(head)).copied().filter(|n| *n > 0) {
            let mut index = head;
            for _ in 0..length {
                // A fuzzer may have written over the table.
                if index < ring.size {
                    ring.free.push_back(index);
                }
                index = ring.descriptor(&self.memory, index).next;
            }
        }
        Some((head, written))
    }

    /// Reads and acknowledges the interrupt status.
    pub fn take_interrupt(&mut self) -> u32 {
        let status = self.read(0x60);
        self.write(0x64, status);
        let _ = self.irq.read();
        status
    }
}

impl DriverQueue {
    /// Guest-physical address of the descriptor table.
    pub fn table(&self) -> u64 {
        self.base
    }

    /// Guest-physical address of the available ring.
    pub fn avail(&self) -> u64 {
        self.base + 0x8000
    }

    /// Guest-physical address of the used ring.
    pub fn used(&self) -> u64 {
        self.base + 0xa000
    }

    /// Writes an entry of the table.
    pub fn set_descriptor(&self, memory: &Memory, index: u16, descriptor: Descriptor) {
        write_descriptor(memory, self.table() + 16 * u64::from(index), descriptor);
    }

    fn descriptor(&self, memory: &Memory, index: u16) -> Descriptor {
        let at = self.table() + 16 * u64::from(index);
        Descriptor {
            address: memory.read_obj(GuestAddress(at)).unwrap(),
            length: memory.read_obj(GuestAddress(at + 8)).unwrap(),
            flags: memory.read_obj(GuestAddress(at + 12)).unwrap(),
            next: memory.read_obj(GuestAddress(at + 14)).unwrap(),
        }
    }

    /// Puts `head` into the next entry of the available ring and counts the index up.
    pub fn make_available(&mut self, memory: &Memory, head: u16) {
        let slot = self.avail() + 4 + 2 * u64::from(self.avail_idx % self.size);
        memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.set_avail_idx(memory, self.avail_idx.wrapping_add(1));
    }

    /// Sets the available index.
    pub fn set_avail_idx(&mut self, memory: &Memory, idx: u16) {
        self.avail_idx = idx;
        memory.write_obj(idx, GuestAddress(self.avail() + 2)).unwrap();
    }

    /// Sets the flags of the available ring.
    pub fn set_avail_flags(&self, memory: &Memory, flags: u16) {
        memory.write_obj(flags, GuestAddress(self.avail())).unwrap();
    }

    /// Sets the `used_event` field (section 2.7.7).
    pub fn set_used_event(&self, memory: &Memory, idx: u16) {
        memory.write_obj(idx, GuestAddress(self.avail() + 4 + 2 * u64::from(self.size))).unwrap();
    }
}

/// The time as a test wants it, for the rate limits of the devices that share it.
#[derive(Clone, Debug)]
pub struct TestClock {
    now_ns: Arc<AtomicU64>,
    /// Readable when the time has come that was last waited for.
    event: Arc<OwnedFd>,
    due_ns: Arc<AtomicU64>,
}

impl TestClock {
    /// It stands at one second.
    pub fn new() -> Self {
        let event = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        let due_ns = Arc::new(AtomicU64::new(u64::MAX));
        TestClock { now_ns: Arc::new(AtomicU64::new(1_000_000_000)), event, due_ns }
    }

    /// Lets time pass, and calls whoever waits for it.
    pub fn advance(&self, ns: u64) {
        let now = self.now_ns.fetch_add(ns, Ordering::Relaxed).saturating_add(ns);
        if now >= self.due_ns.load(Ordering::Relaxed) {
            self.due_ns.store(u64::MAX, Ordering::Relaxed);
            rustix::io::write(&*self.event, &1u64.to_ne_bytes()).unwrap();
        }
    }

    /// Nanoseconds until the next call, if somebody waits for one.
    pub fn next_call_ns(&self) -> Option<u64> {
        let due = self.due_ns.load(Ordering::Relaxed);
        (due != u64::MAX).then(|| due.saturating_sub(self.now_ns()))
    }
}

impl Default for TestClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Alarm for TestClock {
    fn now_ns(&self) -> u64 {
        self.now_ns.load(Ordering::Relaxed)
    }

    fn set(&mut self, after_ns: u64) {
        self.due_ns.store(self.now_ns().saturating_add(after_ns), Ordering::Relaxed);
    }

    fn file(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn acknowledge(&mut self) {
        let _ = rustix::io::read(&*self.event, &mut [0; 8]);
    }
}

/// Writes a descriptor anywhere, such as in an indirect table.
pub fn write_descriptor(memory: &Memory, at: u64, descriptor: Descriptor) {
    memory.write_obj(descriptor.address, GuestAddress(at)).unwrap();
    memory.write_obj(descriptor.length, GuestAddress(at + 8)).unwrap();
    memory.write_obj(descriptor.flags, GuestAddress(at + 12)).unwrap();
    memory.write_obj(descriptor.next, GuestAddress(at + 14)).unwrap();
}
