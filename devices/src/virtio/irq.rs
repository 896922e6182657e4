//! The interrupt of a device behind the MMIO transport: one eventfd, which KVM turns into an edge on the device's line,
//! and the status that the driver reads to learn the reason.

use std::{
    io,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
};

use vmm_sys_util::eventfd::EventFd;

use super::{Interrupt, InterruptReason, state::IrqState};

/// Bit of InterruptStatus: a queue has used buffers (virtio 1.2, section 4.2.2).
pub const INTERRUPT_USED_RING: u32 = 1;
/// Bit of InterruptStatus: the configuration or the device status changed.
pub const INTERRUPT_CONFIG: u32 = 2;

/// State that the device, on the event loop's thread, shares with its transport, on a vCPU's.
#[derive(Debug)]
pub struct IrqLine {
    line: EventFd,
    status: AtomicU32,
    generation: AtomicU32,
    failed: AtomicBool,
    /// Somebody outside raises the line for used rings, so each interrupt may be one for them.
    always_used: AtomicBool,
}

impl IrqLine {
    /// Wraps the event that KVM's irqfd has (or will have) bound to the device's line.
    pub fn new(line: EventFd) -> Self {
        IrqLine {
            line,
            status: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            failed: AtomicBool::new(false),
            always_used: AtomicBool::new(false),
        }
    }

    /// The event to register as an irqfd.
    pub fn event(&self) -> &EventFd {
        &self.line
    }

    /// InterruptStatus.
    pub fn status(&self) -> u32 {
        let always = if self.always_used.load(Ordering::Acquire) { INTERRUPT_USED_RING } else { 0 };
        self.status.load(Ordering::Acquire) | always
    }

    /// Handles a write to InterruptACK.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
    }

    /// ConfigGeneration: differs between two reads if the configuration may have changed in between.
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    /// Whether the device stopped because of its driver since the last [`IrqLine::reset`].
    pub fn failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Forgets reasons and failure. The caller has stopped the device, so that none can be added behind its back.
    pub fn reset(&self) {
        self.status.store(0, Ordering::Release);
        self.failed.store(false, Ordering::Release);
        self.always_used.store(false, Ordering::Release);
    }

    /// What a snapshot keeps of it. The saved line may have been on its way to the vCPU.
    pub fn save(&self) -> IrqState {
        IrqState {
            status: self.status.load(Ordering::Acquire),
            generation: self.generation(),
            failed: self.failed(),
        }
    }

    /// Takes over a saved line's registers. Before the device is activated.
    pub fn restore(&self, state: &IrqState) {
        self.status.store(state.status & (INTERRUPT_USED_RING | INTERRUPT_CONFIG), Ordering::Release);
        self.generation.store(state.generation, Ordering::Release);
        self.failed.store(state.failed, Ordering::Release);
    }

    /// Raises the line again if the driver has not acknowledged all reasons.
    pub fn remind(&self) {
        if self.status() != 0 {
            self.fire();
        }
    }

    fn set(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::AcqRel);
        self.fire();
    }

    fn fire(&self) {
        match self.line.write(1) {
            Ok(()) => {}
            // The counter is at its maximum, so an edge that nobody has taken yet is pending anyway.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => log::error!("cannot raise an interrupt: {error}"),
        }
    }
}

impl Interrupt for IrqLine {
    fn raise(&self, reason: InterruptReason) {
        match reason {
            InterruptReason::UsedRing => self.set(INTERRUPT_USED_RING),
            InterruptReason::Configuration => {
                self.generation.fetch_add(1, Ordering::AcqRel);
                self.set(INTERRUPT_CONFIG);
            }
            InterruptReason::DeviceFailed => {
                self.failed.store(true, Ordering::Release);
                self.set(INTERRUPT_CONFIG);
            }
        }
    }

    fn used_ring_event(&self) -> io::Result<EventFd> {
        let event = self.line.try_clone()?;
        self.always_used.store(true, Ordering::Release);
        Ok(event)
    }
}
