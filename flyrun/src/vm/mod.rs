//! One virtual machine, seen from the process that owns it.

mod events;
pub mod jail;
mod process;
mod streams;

pub use events::{Control, Event, Mailbox, Post, spawn};
pub use jail::leave_spare;
pub use process::{Vm, VmPlan};
pub use streams::{Streams, listen};
