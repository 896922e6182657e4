//! What a snapshot keeps of a virtio device, apart from the live one: plain numbers, which anybody may have written.
//! [`super::mmio::MmioTransport::restore`] checks them as it checks a driver's.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Where a queue stands: the device's own two indexes (virtio 1.2, sections 2.7.6 and 2.7.8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingState {
    /// The next entry of the available ring that the device reads.
    pub next_avail: u16,
    /// The next entry of the used ring that the device writes.
    pub next_used: u16,
}

/// What a device knows beside its registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// One entry for each queue of an activated device, `None` for those that the driver did not enable.
    pub rings: Vec<Option<RingState>>,
    /// What only some devices have.
    pub detail: Detail,
}

/// What only some devices have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Detail {
    /// Nothing.
    #[default]
    None,
    /// A network card.
    Net {
        /// Pairs of queues that the driver uses.
        pairs: u16,
    },
    /// The socket device.
    Vsock {
        /// The port that the host's next connection gets.
        next_port: u32,
    },
    /// The balloon.
    Balloon {
        /// Pages that the driver says are in it.
        actual: u32,
        /// What the driver fills free pages with, if it has told.
        poison: Option<u32>,
    },
}

impl DeviceState {
    /// A device with nothing but these queues.
    pub fn of(rings: impl IntoIterator<Item = Option<RingState>>) -> Self {
        Self { rings: rings.into_iter().collect(), detail: Detail::None }
    }
}

/// A queue's registers, as the driver wrote them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// QueueNum.
    pub size: u32,
    /// QueueReady.
    pub ready: bool,
    /// QueueDesc.
    pub descriptors: u64,
    /// QueueDriver.
    pub driver_area: u64,
    /// QueueDevice.
    pub device_area: u64,
}

/// An interrupt line's registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IrqState {
    /// InterruptStatus, without what is always set.
    pub status: u32,
    /// ConfigGeneration.
    pub generation: u32,
    /// Whether the device waits for a reset.
    pub failed: bool,
}

/// A device behind the MMIO transport.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// DeviceID.
    pub device_type: u32,
    /// DeviceFeaturesSel.
    pub device_features_select: u32,
    /// DriverFeaturesSel.
    pub driver_features_select: u32,
    /// What the driver wrote to DriverFeatures.
    pub driver_features: u64,
    /// QueueSel.
    pub queue_select: u32,
    /// Status, without NEEDS_RESET.
    pub status: u32,
    /// The queues' registers.
    pub queues: Vec<QueueState>,
    /// The interrupt's registers.
    pub irq: IrqState,
    /// The device, if its driver has it running.
    pub active: Option<DeviceState>,
}

/// Why a device cannot be saved.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum SaveError {
    /// It has state that nobody can save.
    #[error("it has state outside of this machine that cannot be saved")]
    Unsupported,
    /// The host failed it.
    #[error("{0}")]
    Host(String),
}

/// Why a saved device cannot be continued.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum RestoreError {
    /// Another device is there.
    #[error("a device of type {saved} was saved and one of type {here} is there")]
    DeviceType {
        /// The saved one's DeviceID.
        saved: u32,
        /// That of the device here.
        here: u32,
    },
    /// The device here does not offer what the driver uses.
    #[error("the driver uses the features {missing:#x}, which the device here does not offer")]
    Features {
        /// The bits.
        missing: u64,
    },
    /// No transport writes such a state.
    #[error("{0}")]
    Invalid(String),
    /// The device here refuses.
    #[error("the device cannot be started: {0}")]
    Activate(String),
}

#[cfg(test)]
mod tests;
