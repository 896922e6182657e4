//! The entropy device (virtio 1.2, section 5.4): random bytes of the host's kernel.

use std::{io, sync::Arc};

use event_manager::{EventOps, Events, MutEventSubscriber};

use super::{
    ActivateError, Activation, Interrupt, InterruptReason, Memory, VirtioDevice,
    events::QueueEvents,
    ring::{Chain, Ring, RingError, total},
    state::{DeviceState, SaveError},
};

const DEVICE_TYPE: u32 = 4;
const QUEUE_SIZES: [u16; 1] = [64];
const QUEUE: usize = 0;

/// The most bytes that one request gets. A driver asks again for more; Linux wants 32 to 64 at a time.
const MAX_REQUEST_BYTES: usize = 256;

/// A source of random bytes for the guest.
pub struct Rng {
    events: QueueEvents,
    active: Option<Active>,
}

struct Active {
    memory: Memory,
    interrupt: Arc<dyn Interrupt>,
    ring: Ring,
}

impl Rng {
    /// Creates the device.
    ///
    /// # Errors
    /// When the host grants no more eventfds.
    pub fn new() -> io::Result<Self> {
        Ok(Rng { events: QueueEvents::new()?, active: None })
    }

    /// Serves what is available in the queue.
    fn process_queue(&mut self) {
        let Some(active) = &mut self.active else { return };
        match active.process() {
            Ok(false) => {}
            // More is left than one round may take; let other devices have the thread first.
            Ok(true) => self.events.fire(),
            Err(error) => {
                log::warn!("rng: {error}");
                let interrupt = Arc::clone(&active.interrupt);
                self.reset();
                interrupt.raise(InterruptReason::DeviceFailed);
            }
        }
    }
}

impl Active {
    /// Serves at most a queue's size of requests; true when there may be more.
    fn process(&mut self) -> Result<bool, RingError> {
        let mut chain = Chain::default();
        let (mut served, mut rounds) = (0, 0);
        let more = loop {
            // Rounds, not requests: the driver can make the ring look empty and full in turns for ever.
            if rounds == self.ring.size() {
                break true;
            }
            rounds += 1;
            if !self.ring.pop(&self.memory, &mut chain)? {
                if self.ring.enable_notification(&self.memory)? {
                    continue;
                }
                break false;
            }
            let written = fill(&self.memory, &chain)?;
            self.ring.push(&self.memory, chain.head(), written)?;
            served += 1;
        };
        if served > 0 && self.ring.needs_interrupt(&self.memory)? {
            self.interrupt.raise(InterruptReason::UsedRing);
        }
        Ok(more)
    }
}

/// Fills the beginning of the chain's writable part; returns the number of bytes.
fn fill(memory: &Memory, chain: &Chain) -> Result<u32, RingError> {
    let wanted = usize::try_from(total(chain.writable())).unwrap_or(usize::MAX).min(MAX_REQUEST_BYTES);
    let mut bytes = [0; MAX_REQUEST_BYTES];
    let Some(bytes) = bytes.get_mut(..wanted) else { return Ok(0) };
    if let Err(error) = random(bytes) {
        // The driver gets its buffer back empty and asks again.
        log::error!("rng: the host has no random bytes: {error}");
        return Ok(0);
    }
    chain.write(memory, 0, bytes)?;
    Ok(wanted as u32)
}

/// getrandom(2) gives up to 256 bytes whole and without being interrupted.
fn random(bytes: &mut [u8]) -> io::Result<()> {
    rustix::rand::getrandom(&mut *bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(())
}

impl MutEventSubscriber for Rng {
    fn init(&mut self, ops: &mut EventOps) {
        self.events.init(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if self.events.control(events, ops) || self.events.acknowledge(events) {
            self.process_queue();
        }
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
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
        Ok(DeviceState::of(self.active.iter().map(|active| Some(active.ring.state(0)))))
    }
}

#[cfg(test)]
mod tests;
