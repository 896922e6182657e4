//! The balloon device (virtio 1.2, section 5.5), for one purpose: pages that the guest does not need go back to the host.
//!
//! Offered are free page reporting and page poison. The balloon itself stays empty: the device never asks for pages, so
//! what a driver puts into the inflate queue or takes out by the deflate queue is acknowledged, and its pages stay as they
//! are, which section 5.5.6 allows. Without an inflated balloon there is nothing that VIRTIO_BALLOON_F_DEFLATE_ON_OOM
//! could give back, so it is not offered.
//!
//! The queues are numbered as Linux, QEMU and others do: one that no offered feature needs does not exist, and has no number.
//! So the reporting queue is the third.

use std::{io, sync::Arc};

use event_manager::{EventOps, Events, MutEventSubscriber};
use vm_memory::GuestAddress;

use super::{
    ActivateError, Activation, Interrupt, InterruptReason, Memory, VirtioDevice,
    events::QueueEvents,
    ring::{Chain, Ring, RingError},
    state::{Detail, DeviceState, SaveError},
};

/// VIRTIO_BALLOON_F_PAGE_POISON: the driver tells what it fills free pages with.
pub const F_PAGE_POISON: u64 = 1 << 4;
/// VIRTIO_BALLOON_F_REPORTING: the driver tells which pages are free.
pub const F_REPORTING: u64 = 1 << 5;

const DEVICE_TYPE: u32 = 5;
/// Linux reports 32 blocks at a time, and gives up on a smaller queue.
const QUEUE_SIZES: [u16; 3] = [8, 8, 32];
/// The reporting queue.
pub const REPORTING: usize = 2;

/// Offsets in the configuration space (section 5.5.4): num_pages, actual, free_page_hint_cmd_id, poison_val.
const CONFIG_BYTES: usize = 16;
const ACTUAL: usize = 4;
const POISON: usize = 12;

/// Where free memory goes.
pub trait Reclaim: Send {
    /// Gives these bytes of guest memory back to the host, or leaves them as they are. What is given back reads as zeros,
    /// until somebody writes to it. The range lies in guest memory, aligned to nothing.
    ///
    /// # Errors
    /// The host's; the bytes are then as they were.
    fn reclaim(&mut self, address: GuestAddress, length: u32) -> io::Result<()>;
}

/// A balloon that is never inflated, and reports.
pub struct Balloon {
    events: QueueEvents,
    reclaim: Box<dyn Reclaim>,
    config: Config,
    active: Option<Active>,
}

/// What the driver has told.
#[derive(Clone, Copy, Debug, Default)]
struct Config {
    /// Pages that it says are in the balloon.
    actual: u32,
    /// What it fills free pages with, if it has told.
    poison: Option<u32>,
}

struct Active {
    memory: Memory,
    interrupt: Arc<dyn Interrupt>,
    /// Those of [`QUEUE_SIZES`].
    rings: Vec<Option<Ring>>,
    features: u64,
}

impl Balloon {
    /// Creates the device.
    ///
    /// # Errors
    /// When the host grants no more eventfds.
    pub fn new(reclaim: Box<dyn Reclaim>) -> io::Result<Self> {
        Ok(Self { events: QueueEvents::new()?, reclaim, config: Config::default(), active: None })
    }

    /// Serves what is available in all queues.
    fn process_queues(&mut self) {
        let Some(active) = &mut self.active else { return };
        // Section 5.5.6.7: free pages keep what the driver fills them with. Memory that was given back is zero.
        let poisoned = active.features & F_PAGE_POISON != 0 && self.config.poison != Some(0);
        let reclaim = (active.features & F_REPORTING != 0 && !poisoned).then_some(&mut self.reclaim);
        match active.process(reclaim) {
            Ok(false) => {}
            // More is left than one round may take; let other devices have the thread first.
            Ok(true) => self.events.fire(),
            Err(error) => {
                log::warn!("balloon: {error}");
                let interrupt = Arc::clone(&active.interrupt);
                self.reset();
                interrupt.raise(InterruptReason::DeviceFailed);
            }
        }
    }
}

impl Active {
    /// Serves at most a queue's size of chains of each queue; true when there may be more.
    fn process(&mut self, mut reclaim: Option<&mut Box<dyn Reclaim>>) -> Result<bool, RingError> {
        let mut more = false;
        let mut interrupt = false;
        for (index, ring) in self.rings.iter_mut().enumerate() {
            let Some(ring) = ring else { continue };
            let reclaim = reclaim.as_deref_mut().filter(|_| index == REPORTING);
            more |= serve(&self.memory, ring, reclaim)?;
            interrupt |= ring.needs_interrupt(&self.memory)?;
        }
        if interrupt {
            self.interrupt.raise(InterruptReason::UsedRing);
        }
        Ok(more)
    }
}

fn serve(
    memory: &Memory,
    ring: &mut Ring,
    mut reclaim: Option<&mut Box<dyn Reclaim>>,
) -> Result<bool, RingError> {
    let mut chain = Chain::default();
    // Rounds, not chains: the driver can make the ring look empty and full in turns for ever.
    for _ in 0..ring.size() {
        if !ring.pop(memory, &mut chain)? {
            if ring.enable_notification(memory)? {
                continue;
            }
            return Ok(false);
        }
        if let Some(reclaim) = &mut reclaim {
            for buffer in chain.writable() {
                if let Err(error) = reclaim.reclaim(buffer.address, buffer.length) {
                    // The guest does without nothing; the host does without some memory.
                    log::warn!("balloon: {} bytes are not given back: {error}", buffer.length);
                }
            }
        }
        ring.push(memory, chain.head(), 0)?;
    }
    Ok(true)
}

impl MutEventSubscriber for Balloon {
    fn init(&mut self, ops: &mut EventOps) {
        self.events.init(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if self.events.control(events, ops) || self.events.acknowledge(events) {
            self.process_queues();
        }
    }
}

impl Config {
    fn bytes(self) -> [u8; CONFIG_BYTES] {
        let mut bytes = [0; CONFIG_BYTES];
        let fields = bytes.iter_mut().skip(ACTUAL).zip(self.actual.to_le_bytes());
        fields.for_each(|(place, byte)| *place = byte);
        let fields = bytes.iter_mut().skip(POISON).zip(self.poison.unwrap_or(0).to_le_bytes());
        fields.for_each(|(place, byte)| *place = byte);
        bytes
    }
}

/// The field at that offset after a write of `data` to `at`, if any of it is the field's.
fn written(field: u32, offset: usize, at: u64, data: &[u8]) -> Option<u32> {
    let mut bytes = field.to_le_bytes();
    let mut touched = false;
    for (place, number) in bytes.iter_mut().zip(offset as u64..) {
        let index = number.checked_sub(at).and_then(|index| usize::try_from(index).ok());
        if let Some(byte) = index.and_then(|index| data.get(index)) {
            *place = *byte;
            touched = true;
        }
    }
    touched.then(|| u32::from_le_bytes(bytes))
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        F_PAGE_POISON | F_REPORTING
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let bytes = self.config.bytes();
        let from = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..)).unwrap_or_default();
        data.iter_mut().zip(from).for_each(|(place, byte)| *place = *byte);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let Some(actual) = written(self.config.actual, ACTUAL, offset, data) {
            self.config.actual = actual;
        }
        if let Some(poison) = written(self.config.poison.unwrap_or(0), POISON, offset, data) {
            self.config.poison = Some(poison);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let needed = if activation.features & F_REPORTING == 0 { 0..0 } else { REPORTING..REPORTING + 1 };
        for index in needed {
            if !matches!(activation.queues.get(index), Some(Some(_))) {
                return Err(ActivateError::QueueMissing(index));
            }
        }
        let (mut rings, mut notifications) = (Vec::new(), Vec::new());
        for (index, queue) in (0u32..).zip(activation.queues) {
            rings.push(queue.map(|queue| {
                notifications.push((index, queue.notify));
                Ring::new(queue.queue)
            }));
        }
        self.events.watch(notifications);
        self.active = Some(Active {
            memory: activation.memory,
            interrupt: activation.interrupt,
            rings,
            features: activation.features,
        });
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.config = Config::default();
        self.events.forget();
    }

    fn save(&mut self) -> Result<DeviceState, SaveError> {
        let rings = self.active.iter().flat_map(|active| &active.rings);
        let rings = rings.map(|ring| ring.as_ref().map(|ring| ring.state(0))).collect();
        let Config { actual, poison } = self.config;
        Ok(DeviceState { rings, detail: Detail::Balloon { actual, poison } })
    }

    fn restored(&mut self, state: &DeviceState) {
        if let Detail::Balloon { actual, poison } = state.detail {
            self.config = Config { actual, poison };
        }
    }
}

#[cfg(test)]
mod tests;
