//! What a snapshot keeps of a network card: where its queues stand, and how many of them the driver uses. Packets that were
//! on their way are lost, as on any wire.

use ::vhost::{VhostBackend, net::VhostNet as _};

use super::{Backend, Net, NetConfig, VhostNet, switch_pairs};
use crate::virtio::state::{Detail, DeviceState, RingState, SaveError};

/// Puts the queues in their order: that of [`super::queues::Queues`].
fn state(
    config: NetConfig,
    pairs: impl Iterator<Item = [RingState; 2]>,
    control: Option<(RingState, usize)>,
    used: usize,
) -> DeviceState {
    let mut rings: Vec<_> = pairs.flatten().map(Some).collect();
    rings.resize(config.queue_max_sizes().len(), None);
    if let Some((ring, index)) = control
        && let Some(place) = rings.get_mut(index)
    {
        *place = Some(ring);
    }
    DeviceState { rings, detail: Detail::Net { pairs: used as u16 } }
}

/// Goes on with as many pairs as the driver of a saved card used; a number that cannot be is left out.
pub fn use_pairs(backend: &mut dyn Backend, used: &mut usize, available: usize, state: &DeviceState) {
    if let Detail::Net { pairs } = state.detail
        && !switch_pairs(backend, used, available, pairs)
    {
        log::error!("net: the driver used {pairs} pairs of queues and has {used}");
    }
}

impl Net {
    pub(super) fn saved(&self) -> DeviceState {
        let Some(active) = &self.active else { return DeviceState::default() };
        let pairs =
            active.pairs.iter().map(|(receiver, transmitter)| [receiver.state(), transmitter.state()]);
        let control = active.control.as_ref().map(|(control, index)| (control.state(), *index));
        state(self.config, pairs, control, active.used)
    }
}

impl VhostNet {
    /// Takes the TAP away from vhost, which then has finished with guest memory, and asks where it was.
    pub(super) fn stop_and_save(&mut self) -> Result<DeviceState, SaveError> {
        let Some(active) = &self.active else { return Ok(DeviceState::default()) };
        let failed = |error: ::vhost::Error| SaveError::Host(format!("vhost-net: {error}"));
        let mut pairs = Vec::with_capacity(active.handles.len());
        for (handle, _) in &active.handles {
            let mut rings = [RingState::default(); 2];
            for index in 0..rings.len() {
                handle.set_backend(index, None).map_err(failed)?;
            }
            for (index, ring) in rings.iter_mut().enumerate() {
                // For a split ring the base is the index in the available ring; that in the used ring is read from memory.
                let next_avail = handle.get_vring_base(index).map_err(failed)? as u16;
                *ring = RingState { next_avail, next_used: next_avail };
            }
            pairs.push(rings);
        }
        let control = active.control.as_ref().map(|(control, index)| (control.state(), *index));
        Ok(state(self.config, pairs.into_iter(), control, active.used))
    }

    /// vhost goes on where it was.
    pub(super) fn start_again(&mut self) {
        let Some(active) = &self.active else { return };
        for (number, (handle, pair)) in active.handles.iter().enumerate() {
            for (index, queue) in [&pair.receive, &pair.transmit].into_iter().enumerate() {
                if let Err(error) = handle.set_backend(index, self.tap.as_file(number)) {
                    log::error!("net: vhost-net does not take the TAP of pair {number} back: {error}");
                }
                // Whatever the guest has told meanwhile was told to nobody; the one error is a full counter.
                let _ = queue.notify.write(1);
            }
        }
    }
}
