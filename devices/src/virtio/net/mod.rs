//! The network device (virtio 1.2, section 5.1): packets between the guest and a TAP of the host.
//!
//! Two devices share the configuration space and the features: [`Net`] moves packets on the thread of the event loop,
//! and [`VhostNet`] leaves that to the host's kernel and only starts and stops it.

mod config;
mod receive;
mod state;
#[allow(unsafe_code, reason = "ioctls of /dev/net/tun")]
mod tap;
mod transmit;
mod vhost;

use std::{io, os::fd::BorrowedFd, sync::Arc};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

pub use config::{Mac, NetConfig};
pub use tap::{PersistentTap, Tap};
pub use vhost::VhostNet;

use config::{DEVICE_TYPE, QUEUE_SIZES, RX, TX, USER_FEATURES};
use receive::Receiver;
use transmit::Transmitter;

use super::{
    ActivateError, Activation, ActiveQueue, Interrupt, InterruptReason, Memory, VirtioDevice,
    events::QueueEvents,
    ring::{Ring, RingError},
    state::{DeviceState, SaveError},
    transfer::Transfer,
};

/// Length of virtio_net_hdr (section 5.1.6); with VERSION_1 it has num_buffers always.
pub const HEADER_BYTES: u32 = 12;
/// Data of the backend's events; the queues' are their indexes.
const BACKEND: u32 = 2;

/// What the guest can take unfinished from the host: checksums, and segments larger than the wire's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// Packets may lack their checksum.
    pub checksum: bool,
    /// TCP segments over IPv4 may be larger than the MTU.
    pub tso4: bool,
    /// TCP segments over IPv6 may be.
    pub tso6: bool,
    /// Such segments may carry congestion notification.
    pub ecn: bool,
}

/// Where packets go to and come from: each read and each write is one packet behind its virtio_net_hdr.
pub trait Backend: Send {
    /// A file that does not block and can be polled.
    fn file(&self) -> BorrowedFd<'_>;

    /// Says what the packets that are read from now on may be.
    ///
    /// # Errors
    /// The host's.
    fn set_offload(&mut self, offload: Offload) -> io::Result<()>;
}

/// A network card for the guest, served by this process.
pub struct Net {
    backend: Box<dyn Backend>,
    config: NetConfig,
    transfer: Transfer,
    events: QueueEvents,
    active: Option<Active>,
}

struct Active {
    memory: Memory,
    interrupt: Arc<dyn Interrupt>,
    receiver: Receiver,
    transmitter: Transmitter,
}

impl Net {
    /// Makes a card whose cable is `backend`.
    ///
    /// # Errors
    /// When the host grants no more eventfds.
    pub fn new(backend: Box<dyn Backend>, config: NetConfig) -> io::Result<Self> {
        Ok(Net { backend, config, transfer: Transfer::default(), events: QueueEvents::new()?, active: None })
    }

    fn process_queues(&mut self, receive: bool, transmit: bool) {
        let Some(active) = &mut self.active else { return };
        match active.process(self.backend.file(), &mut self.transfer, receive, transmit) {
            Ok(false) => {}
            // More is left than one round may take; let other devices have the thread first.
            Ok(true) => self.events.fire(),
            Err(error) => {
                log::warn!("net: {error}");
                let interrupt = Arc::clone(&active.interrupt);
                self.reset();
                interrupt.raise(InterruptReason::DeviceFailed);
            }
        }
    }
}

impl Active {
    /// Moves at most a queue's size of packets each way; true when there may be more.
    fn process(
        &mut self,
        file: BorrowedFd<'_>,
        transfer: &mut Transfer,
        receive: bool,
        transmit: bool,
    ) -> Result<bool, RingError> {
        let mut more = false;
        if transmit {
            more |= self.transmitter.process(&self.memory, file, transfer)?;
        }
        if receive {
            more |= self.receiver.process(&self.memory, file, transfer)?;
        }
        let transmitted = self.transmitter.needs_interrupt(&self.memory)?;
        if self.receiver.needs_interrupt(&self.memory)? || transmitted {
            self.interrupt.raise(InterruptReason::UsedRing);
        }
        Ok(more)
    }
}

impl MutEventSubscriber for Net {
    fn init(&mut self, ops: &mut EventOps) {
        self.events.init(ops);
        // By edges: while the guest has no room, a waiting packet must not keep the loop busy.
        let events =
            Events::with_data(&self.backend.file(), BACKEND, EventSet::IN | EventSet::EDGE_TRIGGERED);
        if let Err(error) = ops.add(events) {
            log::error!("cannot watch a network device's TAP: {error}");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.data() == BACKEND {
            self.process_queues(true, false);
        } else if self.events.control(events, ops) {
            self.process_queues(true, true);
        } else if self.events.acknowledge(events) {
            let receive = events.data() == RX as u32;
            self.process_queues(receive, !receive);
        }
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        USER_FEATURES
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let [rx, tx] = both_queues(activation.queues)?;
        self.backend.set_offload(config::offload(activation.features))?;
        self.active = Some(Active {
            memory: activation.memory,
            interrupt: activation.interrupt,
            receiver: Receiver::new(Ring::new(rx.queue), config::merges(activation.features)),
            transmitter: Transmitter::new(Ring::new(tx.queue)),
        });
        self.events.watch(vec![(RX as u32, rx.notify), (TX as u32, tx.notify)]);
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.events.forget();
    }

    fn save(&mut self) -> Result<DeviceState, SaveError> {
        Ok(self.saved())
    }
}

fn both_queues(queues: Vec<Option<ActiveQueue>>) -> Result<[ActiveQueue; 2], ActivateError> {
    let mut queues = queues.into_iter();
    let mut next = |index| queues.next().flatten().ok_or(ActivateError::QueueMissing(index));
    Ok([next(RX)?, next(TX)?])
}

#[cfg(test)]
mod tests;
