//! One virtual machine, seen from the process that owns it.

mod events;
mod process;
mod streams;

pub use events::{Control, Event};
pub use process::{Vm, VmPlan};
pub use streams::{Input, Output, Streams};
