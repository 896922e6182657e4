//! What runs as PID 1 inside a flyrun machine.
//!
//! Two programs share this library: `guest-init` ([`run`]) sets a machine up, runs the workload and reports its end;
//! `guest-unpack` ([`unpack`]) applies an image's layers to an empty filesystem. Both start in [`pid1`], talk over
//! [`control`], and end the machine by a reset: nothing here ever returns from PID 1.
#![deny(missing_docs)]

pub mod busy;
pub mod control;
pub mod failure;
pub mod pid1;
pub mod run;
pub mod session;
pub mod step_log;
pub mod sys;
pub mod unpack;
