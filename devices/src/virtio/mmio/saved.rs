//! The transport's way into a snapshot and out of it.
//!
//! Out of it goes through the same checks as a driver's own start: the rings are built from the saved registers, must lie
//! in guest memory, and the device is activated with them.

use virtio_queue::QueueT;

use super::{ActiveQueue, MmioTransport, ORDER, Registers, in_order, lock, status};
use crate::virtio::{
    Activation, Interrupt, InterruptReason,
    state::{DeviceState, RestoreError, RingState, SaveError, TransportState},
};

use std::sync::Arc;

impl MmioTransport {
    /// Has the device stand still until [`MmioTransport::go_on`], and tells all that must be known to continue it. On the
    /// thread of the event loop, while no vCPU runs.
    ///
    /// # Errors
    /// The device cannot be saved.
    pub fn save(&self) -> Result<TransportState, SaveError> {
        // A device that does not run is asked too: it may be one that cannot be saved at all.
        let device = lock(&self.device).save()?;
        let Registers { device_features_select, driver_features_select, driver_features, .. } =
            self.registers;
        Ok(TransportState {
            device_type: self.device_type,
            device_features_select,
            driver_features_select,
            driver_features,
            queue_select: self.registers.queue_select,
            status: self.registers.status,
            queues: self.registers.queues.clone(),
            irq: self.irq.save(),
            active: self.is_active().then_some(device),
        })
    }

    /// Has the device go on after a [`MmioTransport::save`].
    pub fn go_on(&self) {
        lock(&self.device).go_on();
    }

    /// Has a restored device tell its driver what it is to learn at once. On a vCPU's thread, before the guest runs.
    pub fn begin(&self) {
        if self.is_active() {
            lock(&self.device).begin();
        }
    }

    /// Continues a saved device in this new one. Guest memory is the saved machine's already, and so are the vCPUs and
    /// the interrupt controllers: the device may use them at once.
    ///
    /// # Errors
    /// The device here is another one, or the state is none. The device is then not to be used.
    pub fn restore(&mut self, state: &TransportState) -> Result<(), RestoreError> {
        self.check(state)?;
        self.registers = Registers {
            device_features_select: state.device_features_select,
            driver_features_select: state.driver_features_select,
            driver_features: state.driver_features,
            queue_select: state.queue_select,
            status: state.status,
            queues: state.queues.clone(),
        };
        self.irq.restore(&state.irq);
        if let Some(device) = &state.active {
            self.continue_device(device)?;
        }
        // Interrupts and notifications that were under way: one too many does no harm, one too few stops the guest.
        self.irq.remind();
        Ok(())
    }

    /// Tells a driver that runs that the device's configuration is another than it has read (section 2.5).
    pub fn announce_configuration(&self) {
        if self.is_active() {
            self.irq.raise(InterruptReason::Configuration);
        }
    }

    fn check(&self, state: &TransportState) -> Result<(), RestoreError> {
        if state.device_type != self.device_type {
            return Err(RestoreError::DeviceType { saved: state.device_type, here: self.device_type });
        }
        if state.queues.len() != self.queue_max_sizes.len() {
            let (saved, here) = (state.queues.len(), self.queue_max_sizes.len());
            return Err(RestoreError::Invalid(format!("{saved} queues were saved and {here} are there")));
        }
        if !in_order(state.status & !status::FAILED) {
            return Err(RestoreError::Invalid(format!("the status {:#x} is none", state.status)));
        }
        let missing = state.driver_features & !self.device_features;
        if state.status & status::FEATURES_OK != 0 && missing != 0 {
            return Err(RestoreError::Features { missing });
        }
        let live = ORDER.iter().fold(0, |bits, bit| bits | bit);
        if state.active.is_some() && (state.status != live || state.irq.failed) {
            return Err(RestoreError::Invalid(format!(
                "the device runs with the status {:#x}{}",
                state.status,
                if state.irq.failed { " and has failed" } else { "" }
            )));
        }
        Ok(())
    }

    fn continue_device(&mut self, device: &DeviceState) -> Result<(), RestoreError> {
        let mut queues = self.build_queues().map_err(RestoreError::Invalid)?;
        if queues.len() != device.rings.len() {
            let told = format!("{} rings were saved of {} queues", device.rings.len(), queues.len());
            return Err(RestoreError::Invalid(told));
        }
        for (index, (queue, ring)) in queues.iter_mut().zip(&device.rings).enumerate() {
            match (queue, ring) {
                (Some(queue), Some(ring)) => {
                    advance(queue, *ring)
                        .map_err(|told| RestoreError::Invalid(format!("queue {index}: {told}")))?;
                }
                // One that the driver has set up and the device makes nothing of.
                (_, None) => {}
                (None, Some(_)) => {
                    return Err(RestoreError::Invalid(format!("queue {index} is not enabled")));
                }
            }
        }
        let notify: Vec<_> =
            queues.iter().zip(&self.notify).map(|(queue, event)| (queue.is_some(), event)).collect();
        for (enabled, event) in notify {
            if enabled {
                // The only error is a full counter, and then the notification is pending already.
                let _ = event.write(1);
            }
        }
        let activation = Activation {
            memory: self.memory.clone(),
            interrupt: Arc::clone(&self.irq) as Arc<dyn Interrupt>,
            queues,
            features: self.registers.driver_features,
        };
        let mut live = lock(&self.device);
        live.activate(activation).map_err(|error| RestoreError::Activate(error.to_string()))?;
        live.restored(device);
        drop(live);
        self.active = true;
        Ok(())
    }
}

/// Sets the queue's own indexes. No more chains can be with the device than the ring has.
fn advance(queue: &mut ActiveQueue, ring: RingState) -> Result<(), String> {
    let taken = ring.next_avail.wrapping_sub(ring.next_used);
    if taken > queue.queue.size() {
        return Err(format!("{taken} chains are with the device, of a ring of {}", queue.queue.size()));
    }
    queue.queue.set_next_avail(ring.next_avail);
    queue.queue.set_next_used(ring.next_used);
    Ok(())
}
