//! What a snapshot keeps of a network card: where its queues stand. Packets that were on their way are lost, as on any
//! wire.

use ::vhost::{VhostBackend, net::VhostNet as _};
use virtio_queue::QueueT;

use super::{Net, VhostNet};
use crate::virtio::state::{DeviceState, RingState, SaveError};

impl Net {
    pub(super) fn saved(&self) -> DeviceState {
        let rings =
            self.active.iter().flat_map(|active| [active.receiver.state(), active.transmitter.state()]);
        DeviceState::of(rings.map(Some))
    }
}

impl VhostNet {
    /// Takes the TAP away from vhost, which then has finished with guest memory, and asks where it was.
    pub(super) fn stop_and_save(&mut self) -> Result<DeviceState, SaveError> {
        let Some(active) = &self.active else { return Ok(DeviceState::default()) };
        let failed = |error: ::vhost::Error| SaveError::Host(format!("vhost-net: {error}"));
        let mut rings = Vec::with_capacity(active.queues.len());
        for index in 0..active.queues.len() {
            active.handle.set_backend(index, None).map_err(failed)?;
        }
        for (index, _) in active.queues.iter().enumerate() {
            // For a split ring the base is the index in the available ring; that in the used ring is read from memory.
            let next_avail = active.handle.get_vring_base(index).map_err(failed)? as u16;
            rings.push(Some(RingState { next_avail, next_used: next_avail }));
        }
        Ok(DeviceState::of(rings))
    }

    /// vhost goes on where it was.
    pub(super) fn start_again(&mut self) {
        let Some(active) = &self.active else { return };
        for (index, queue) in active.queues.iter().enumerate() {
            if let Err(error) = active.handle.set_backend(index, Some(self.tap.as_file())) {
                log::error!("net: vhost-net does not take the TAP of queue {index} back: {error}");
            }
            // Whatever the guest has told meanwhile was told to nobody; the one error is a full counter.
            let _ = queue.notify.write(1);
            debug_assert!(queue.queue.ready());
        }
    }
}
