//! One KVM microVM.
#![deny(missing_docs)]

pub mod exit;
pub mod spec;
