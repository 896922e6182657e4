//! The file system device (virtio 1.2, section 5.11): a directory of the host, served by another process, virtiofsd.
//!
//! That process gets guest memory, the rings, the event that the guest's notification fires and the one that interrupts
//! the guest ([`backend`]), so that requests pass without this one. One connection serves the device for all its life: a
//! virtiofsd ends with it. When it ends first, this process takes the rings back and answers each request with an error
//! ([`abandoned`]): a guest that is left without answers has processes that nothing can kill, and Linux does not look at
//! DEVICE_NEEDS_RESET. A driver that then starts anew finds a device that needs a reset.

mod abandoned;
mod backend;

use std::{io, os::unix::net::UnixStream, sync::Arc, time::Duration};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;

use abandoned::Abandoned;
use backend::Backend;

use super::{
    ActivateError, Activation, ActiveQueue, Interrupt, InterruptReason, Memory, VirtioDevice,
    events::QueueEvents,
};

const DEVICE_TYPE: u32 = 26;
/// Bytes of a tag in the configuration space, padded with zeros.
pub const TAG_BYTES: usize = 36;
/// The tag, then num_request_queues.
const CONFIG_BYTES: usize = TAG_BYTES + 4;
/// hiprio and one request queue. Linux puts at most as many pages into a request as a ring has descriptors.
const QUEUES: usize = 2;
const QUEUE_SIZES: [u16; QUEUES] = [1024; QUEUES];
/// How long a virtiofsd may take for one step: to answer the first message, to start the queues, to stop them.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Data of the connection's events; the queues' are their indexes.
const BACKEND: u32 = QUEUES as u32;

/// A directory of the host for the guest.
pub struct Fs {
    config: [u8; CONFIG_BYTES],
    backend: Backend,
    /// Whether virtiofsd has ended, or was given up.
    is_lost: bool,
    events: QueueEvents,
    active: Option<Active>,
}

struct Active {
    memory: Memory,
    interrupt: Arc<dyn Interrupt>,
    queues: [ActiveQueue; QUEUES],
    abandoned: Option<Abandoned>,
}

impl Fs {
    /// Makes a device that the virtiofsd at the other end of `stream` serves, which answers each step within `limit`. `begin` is
    /// the first that the thread does which minds the limit.
    ///
    /// # Errors
    /// It does not answer or do what is needed, or the host grants no more descriptors.
    pub fn new(tag: &str, stream: UnixStream, limit: Duration, begin: fn()) -> io::Result<Self> {
        let mut config = [0; CONFIG_BYTES];
        let (name, queues) = config.split_at_mut(TAG_BYTES);
        for (place, byte) in name.iter_mut().zip(tag.bytes()) {
            *place = byte;
        }
        queues.copy_from_slice(&(QUEUES as u32 - 1).to_le_bytes());
        let backend = Backend::greet(stream, QUEUES, limit, begin)?;
        Ok(Fs { config, backend, is_lost: false, events: QueueEvents::new()?, active: None })
    }

    /// Takes over the rings of a virtiofsd that is gone.
    fn lose(&mut self) {
        self.backend.hang_up();
        if std::mem::replace(&mut self.is_lost, true) {
            return;
        }
        log::warn!("fs: virtiofsd has ended");
        let Some(active) = &mut self.active else { return };
        let queues = active.queues.iter().map(|queue| &queue.queue);
        match (Abandoned::take_over(&active.memory, queues), watched(&active.queues)) {
            (Ok(abandoned), Ok(notifications)) => {
                active.abandoned = Some(abandoned);
                // For what was finished and not told any more.
                active.interrupt.raise(InterruptReason::UsedRing);
                self.events.watch(notifications);
                self.answer();
            }
            (Err(error), _) => self.fail(&error.to_string()),
            (_, Err(error)) => self.fail(&error.to_string()),
        }
    }

    /// Answers what the guest has asked of a virtiofsd that is gone.
    fn answer(&mut self) {
        let Some(active) = &mut self.active else { return };
        let Some(abandoned) = &mut active.abandoned else { return };
        match abandoned.answer(&active.memory) {
            Ok(done) => {
                if done.interrupt {
                    active.interrupt.raise(InterruptReason::UsedRing);
                }
                // More is left than one round may take; let other devices have the thread first.
                if done.more {
                    self.events.fire();
                }
            }
            Err(error) => self.fail(&error.to_string()),
        }
    }

    fn fail(&mut self, reason: &str) {
        log::warn!("fs: {reason}");
        let Some(active) = self.active.take() else { return };
        self.events.forget();
        active.interrupt.raise(InterruptReason::DeviceFailed);
    }
}

/// The queues' notifications, for the event loop.
fn watched(queues: &[ActiveQueue]) -> io::Result<Vec<(u32, EventFd)>> {
    (0..).zip(queues).map(|(index, queue)| Ok((index, queue.notify.try_clone()?))).collect()
}

impl MutEventSubscriber for Fs {
    fn init(&mut self, ops: &mut EventOps) {
        self.events.init(ops);
        // Its answers are read where they are asked for; here only its end matters.
        let hang_up = EventSet::READ_HANG_UP | EventSet::HANG_UP;
        if let Err(error) = ops.add(Events::with_data(self.backend.stream(), BACKEND, hang_up)) {
            log::error!("cannot watch a virtiofsd: {error}");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.data() == BACKEND {
            let _ = ops.remove(Events::empty(self.backend.stream()));
            self.lose();
        } else if self.events.control(events, ops) || self.events.acknowledge(events) {
            self.answer();
        }
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        0
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
        if self.is_lost {
            return Err(io::Error::other("its virtiofsd has ended").into());
        }
        let queues = both_queues(activation.queues)?;
        let call = activation.interrupt.used_ring_event()?;
        if let Err(error) = self.backend.start(&activation.memory, &queues, activation.features, &call) {
            // Half started, it may still write to guest memory: it is given up.
            self.is_lost = true;
            self.backend.hang_up();
            return Err(error.into());
        }
        let (memory, interrupt) = (activation.memory, activation.interrupt);
        self.active = Some(Active { memory, interrupt, queues, abandoned: None });
        Ok(())
    }

    fn reset(&mut self) {
        let Some(active) = self.active.take() else { return };
        self.events.forget();
        // The queues are the driver's again, so virtiofsd must have let go of them, or never touch them again.
        if active.abandoned.is_none() && !self.is_lost && self.backend.stop(active.queues.len()).is_err() {
            self.is_lost = true;
            self.backend.hang_up();
        }
    }
}

fn both_queues(queues: Vec<Option<ActiveQueue>>) -> Result<[ActiveQueue; QUEUES], ActivateError> {
    let mut queues = queues.into_iter();
    let mut next = |index| queues.next().flatten().ok_or(ActivateError::QueueMissing(index));
    Ok([next(0)?, next(1)?])
}

#[cfg(test)]
mod tests;
