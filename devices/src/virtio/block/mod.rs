//! The block device (virtio 1.2, section 5.2): raw files as a disk.
//!
//! I/O is done on the thread of the event loop that the device is added to, and waits for the host's disk. Nothing is
//! faster for what is in the page cache: a ring of requests to the host would add a wake-up to each. But a flush or a cold
//! read holds up all that shares the loop, so disks deserve a loop of their own, away from the sockets.

mod backend;
mod request;

use std::{io, sync::Arc};

use event_manager::{EventOps, Events, MutEventSubscriber};

pub use backend::{Backend, BackendFault, OpenError, SECTOR_BYTES};
use request::{
    ID_BYTES, MAX_DISCARD_SECTORS, MAX_RANGES, MAX_SEGMENT_BYTES, MAX_SEGMENTS, MAX_ZERO_SECTORS, Server,
};

use super::{
    ActivateError, Activation, Interrupt, InterruptReason, Memory, VirtioDevice,
    events::QueueEvents,
    ring::{Chain, Ring, RingError},
    state::{DeviceState, SaveError},
    throttle::Throttle,
    transfer::Transfer,
};

const DEVICE_TYPE: u32 = 2;
const QUEUE_SIZES: [u16; 1] = [256];
const QUEUE: usize = 0;
/// Data of the rate limit's events; the queue's is its index.
const ALARM: u32 = 1;

const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Length of the configuration space in bytes, up to and with write_zeroes_may_unmap and its padding.
const CONFIG_BYTES: usize = 60;

/// After so many requests the driver is told of them, though more are waiting: the first should not wait for the last.
const REQUESTS_PER_INTERRUPT: u16 = 16;

/// After so many bytes other devices, and whoever asks the machine to end, have their turn: a queue full of the largest
/// requests is 16 GiB.
const BYTES_PER_ROUND: u64 = 64 << 20;

/// What is told of a host that fails the disk. Called on the event loop's thread.
pub type FaultHandler = Box<dyn FnMut(BackendFault) + Send>;

/// A disk for the guest.
pub struct Block {
    disk: Disk,
    config: [u8; CONFIG_BYTES],
    features: u64,
    events: QueueEvents,
    active: Option<Active>,
}

/// What outlives the driver.
struct Disk {
    backend: Backend,
    id: [u8; ID_BYTES],
    transfer: Transfer,
    throttle: Throttle,
    on_fault: FaultHandler,
}

struct Active {
    memory: Memory,
    interrupt: Arc<dyn Interrupt>,
    ring: Ring,
}

impl Block {
    /// Makes a disk of `backend`. The guest finds `id` (cut off after 20 bytes) in `/sys/block/*/serial`.
    ///
    /// # Errors
    /// When the host grants no more eventfds.
    pub fn new(backend: Backend, id: &str, on_fault: FaultHandler) -> io::Result<Self> {
        let mut name = [0; ID_BYTES];
        for (place, byte) in name.iter_mut().zip(id.bytes()) {
            *place = byte;
        }
        let mut features = F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH;
        features |= if backend.read_only() { F_RO } else { F_DISCARD | F_WRITE_ZEROES };
        Ok(Block {
            config: config_space(&backend),
            disk: Disk {
                backend,
                id: name,
                transfer: Transfer::default(),
                throttle: Throttle::default(),
                on_fault,
            },
            features,
            events: QueueEvents::new()?,
            active: None,
        })
    }

    /// Has all requests wait for `throttle`. Before the device is added to an event loop.
    #[must_use]
    pub fn with_throttle(mut self, throttle: Throttle) -> Self {
        self.disk.throttle = throttle;
        self
    }

    fn process_queue(&mut self) {
        let Some(active) = &mut self.active else { return };
        match active.process(&mut self.disk) {
            Ok(false) => {}
            // More is left than one round may take; let other devices have the thread first.
            Ok(true) => self.events.fire(),
            Err(error) => {
                log::warn!("block: {error}");
                let interrupt = Arc::clone(&active.interrupt);
                self.reset();
                interrupt.raise(InterruptReason::DeviceFailed);
            }
        }
    }
}

impl Active {
    /// Serves at most a queue's size of requests; true when there may be more at once.
    fn process(&mut self, disk: &mut Disk) -> Result<bool, RingError> {
        let mut chain = Chain::default();
        let mut unannounced = 0;
        let mut more = true;
        let mut moved = 0u64;
        self.ring.disable_notification(&self.memory)?;
        for _ in 0..self.ring.size() {
            if moved >= BYTES_PER_ROUND {
                break;
            }
            // Without notifications until the alarm: what the driver adds must wait too.
            if !disk.throttle.admits() {
                more = false;
                break;
            }
            if !self.ring.pop(&self.memory, &mut chain)? {
                if self.ring.enable_notification(&self.memory)? {
                    continue;
                }
                more = false;
                break;
            }
            let Disk { backend, id, transfer, throttle, on_fault } = disk;
            let served = Server { backend, id, memory: &self.memory, transfer }.serve(&chain)?;
            throttle.charge(served.moved);
            moved = moved.saturating_add(served.moved);
            if let Some(fault) = served.fault {
                log::error!("block: {fault}");
                on_fault(fault);
            }
            self.ring.push(&self.memory, chain.head(), served.written)?;
            unannounced += 1;
            if unannounced == REQUESTS_PER_INTERRUPT {
                unannounced = 0;
                self.announce()?;
            }
        }
        if unannounced > 0 {
            self.announce()?;
        }
        Ok(more)
    }

    fn announce(&mut self) -> Result<(), RingError> {
        if self.ring.needs_interrupt(&self.memory)? {
            self.interrupt.raise(InterruptReason::UsedRing);
        }
        Ok(())
    }
}

/// struct virtio_blk_config (section 5.2.4).
fn config_space(backend: &Backend) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = config.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    put(0, &(backend.size() / SECTOR_BYTES).to_le_bytes());
    put(8, &MAX_SEGMENT_BYTES.to_le_bytes());
    put(12, &MAX_SEGMENTS.to_le_bytes());
    put(20, &(SECTOR_BYTES as u32).to_le_bytes());
    if !backend.read_only() {
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        // discard_sector_alignment: 4 KiB, below which the host's filesystems give nothing back.
        put(44, &8u32.to_le_bytes());
        put(48, &MAX_ZERO_SECTORS.to_le_bytes());
        put(52, &MAX_RANGES.to_le_bytes());
        put(56, &[1]);
    }
    config
}

impl MutEventSubscriber for Block {
    fn init(&mut self, ops: &mut EventOps) {
        self.events.init(ops);
        self.disk.throttle.init(ALARM, ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.data() == ALARM {
            self.disk.throttle.acknowledge();
            self.process_queue();
        } else if self.events.control(events, ops) || self.events.acknowledge(events) {
            self.process_queue();
        }
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let rest = usize::try_from(offset).ok().and_then(|at| self.config.get(at..)).unwrap_or_default();
        for (place, byte) in data.iter_mut().zip(rest) {
            *place = *byte;
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Some(Some(queue)) = activation.queues.into_iter().next() else {
            return Err(ActivateError::QueueMissing(QUEUE));
        };
        self.events.watch(vec![(QUEUE as u32, queue.notify)]);
        let ring = Ring::new(queue.queue);
        self.active = Some(Active { memory: activation.memory, interrupt: activation.interrupt, ring });
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.events.forget();
    }

    fn save(&mut self) -> Result<DeviceState, SaveError> {
        // The restored guest trusts its disk to hold what it has written, also after a power cut in between.
        self.disk.backend.flush().map_err(|fault| SaveError::Host(fault.to_string()))?;
        Ok(DeviceState::of(self.active.iter().map(|active| Some(active.ring.state(0)))))
    }
}

#[cfg(test)]
mod tests;
