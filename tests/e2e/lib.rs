//! What the end-to-end tests share: running flyrun, making images in controlled ways, a registry, a terminal.
//!
//! The tests run where /dev/kvm works: `make e2e` starts their binary in the test host (tests/host/run).
#![forbid(unsafe_code)]
// A harness fails by panicking: that is how a test tells.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod background;
pub mod bursts;
pub mod clones;
pub mod flyrun;
pub mod hold;
pub mod hostile;
pub mod http;
pub mod image;
pub mod lab;
pub mod registry;
pub mod resident;
pub mod serving;
pub mod suspended;
pub mod tar;
pub mod terminal;

pub use flyrun::{Flyrun, Outcome, program};
