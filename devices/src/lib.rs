//! Devices of a microVM: virtio over MMIO, and the two legacy devices that Linux wants for its console and its reset.
//!
//! A device knows guest memory, its queues and an interrupt with one method. It does not know KVM, threads or files
//! beyond its own backend, so that a unit test or a fuzzer can drive it as a guest would.
#![deny(missing_docs)]
// Only virtio::transfer needs any.
#![deny(unsafe_code)]

pub mod legacy;
pub mod virtio;

#[cfg(any(test, feature = "testing"))]
pub mod testing;
