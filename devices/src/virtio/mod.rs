//! What a virtio device must do, and what it is given for it.
//!
//! The life of a device, as the driver sees it through the transport (virtio 1.2, section 3.1):
//!
//! ```text
//! created ──features, queues──▶ activate() ──guest kicks──▶ activated ──reset()──▶ created
//!                                   │                          │
//!                                   └──────────▶ failed ◀──────┘   (NEEDS_RESET; only reset() leads out)
//! ```
//!
//! Guest memory is out of a device's reach before `activate` and after `reset`.
//!
//! A snapshot is taken of a device that stands still: `save()` makes it so and `go_on()` ends it. Restoring needs nothing
//! of its own: the transport activates the device with queues that begin where the saved ones stood.
//!
//! Threads: [`VirtioDevice`] methods are called by the transport, which holds the device's lock, on the vCPU thread
//! whose register access caused it. Queue events arrive on the thread of the event loop, through the device's own
//! [`event_manager::MutEventSubscriber`] implementation, which takes the same lock.

pub mod balloon;
pub mod block;
pub mod events;
pub mod fs;
pub mod irq;
pub mod mmio;
pub mod net;
pub mod rate;
pub mod ring;
pub mod rng;
pub mod state;
pub mod throttle;
#[allow(unsafe_code, reason = "vectored I/O on guest memory")]
pub mod transfer;
pub mod vsock;

use std::sync::Arc;

use event_manager::MutEventSubscriber;
use thiserror::Error;
use virtio_queue::Queue;
use vm_memory::{GuestMemoryMmap, bitmap::AtomicBitmap};
use vmm_sys_util::eventfd::EventFd;

use state::{DeviceState, SaveError};

/// Guest memory, with the bitmap of pages that devices have dirtied (read by snapshots).
pub type Memory = GuestMemoryMmap<AtomicBitmap>;

/// Why the guest is to be interrupted (virtio 1.2, section 4.2.2, InterruptStatus).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InterruptReason {
    /// A queue has used buffers.
    UsedRing,
    /// The device's configuration changed.
    Configuration,
    /// The device found its driver's rings broken and has stopped: the transport sets DEVICE_NEEDS_RESET, which is a
    /// configuration change (section 2.1.2). The device itself stays silent until `reset`.
    DeviceFailed,
}

/// How a device gets the guest's attention.
pub trait Interrupt: Send + Sync {
    /// Sets the reason in the interrupt status and raises the device's line. May be called on any thread.
    fn raise(&self, reason: InterruptReason);

    /// An event that raises the line for [`InterruptReason::UsedRing`] without a thread of this process, for queues that
    /// the host's kernel serves. As nobody can then set the reason, the status says "used ring" at every read, until the
    /// device is reset; a driver that looks into its queues in vain is not harmed.
    ///
    /// # Errors
    /// When the host grants no more descriptors.
    fn used_ring_event(&self) -> std::io::Result<EventFd>;
}

/// One activated queue: the ring in guest memory and the event that the guest's notification fires.
#[derive(Debug)]
pub struct ActiveQueue {
    /// The validated ring.
    pub queue: Queue,
    /// Written by the transport (or by KVM's ioeventfd) when the driver notifies this queue.
    pub notify: EventFd,
}

/// All that a device needs in order to serve its driver.
pub struct Activation {
    /// Guest memory.
    pub memory: Memory,
    /// The device's interrupt.
    pub interrupt: Arc<dyn Interrupt>,
    /// One entry for each queue the device has; those that the driver did not enable are `None`.
    pub queues: Vec<Option<ActiveQueue>>,
    /// The feature bits that device and driver agreed on.
    pub features: u64,
}

/// Why a device could not be activated. The transport then sets NEEDS_RESET.
#[derive(Debug, Error)]
pub enum ActivateError {
    /// The driver did not enable a queue that the device cannot do without.
    #[error("queue {0} is needed and was not enabled by the driver")]
    QueueMissing(usize),
    /// The host refused something that the device needs.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

/// A virtio device behind a transport.
pub trait VirtioDevice: MutEventSubscriber + Send {
    /// The device's number in virtio 1.2, section 5.
    fn device_type(&self) -> u32;

    /// The feature bits on offer, without those of the transport and of the ring, which the transport adds.
    fn features(&self) -> u64;

    /// The largest size of each queue; its length is the number of queues.
    fn queue_max_sizes(&self) -> &[u16];

    /// Reads the configuration space. Bytes beyond its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the configuration space. What the device does not allow to be written is ignored, as real devices do.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// Starts the device. Called once, after the driver set DRIVER_OK and all enabled queues were found valid.
    ///
    /// # Errors
    /// [`ActivateError`]; the device is then as it was before the call.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops the device and gives up guest memory and queues, whatever state it is in. The driver may then start anew.
    fn reset(&mut self);

    /// Stops touching guest memory and tells where its queues stand, until `go_on`, an activation or `reset`. Called on the
    /// thread of the event loop, while no vCPU runs. What the guest was promised to be durable is durable then.
    ///
    /// # Errors
    /// The device cannot be saved, as it is said for one that does not implement this, or not now.
    fn save(&mut self) -> Result<DeviceState, SaveError> {
        Err(SaveError::Unsupported)
    }

    /// Ends what `save` began. Called on the thread of the event loop.
    fn go_on(&mut self) {}

    /// Takes over what the saved device knew beside its queues. Called once, behind the activation that continues a
    /// snapshot. The state may be anybody's.
    fn restored(&mut self, _state: &DeviceState) {}

    /// Tells the driver of a restored device what it is to learn at once. Called on a vCPU's thread, before the guest runs.
    fn begin(&mut self) {}
}
