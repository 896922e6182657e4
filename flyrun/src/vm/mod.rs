//! One virtual machine, seen from the process that owns it.

mod events;
pub mod jail;
mod process;
mod streams;

#[cfg(any(test, feature = "fuzzing"))]
pub use events::pass_frames;
pub use events::{Control, Event, Mailbox, Post, spawn};
pub use jail::leave_spare;
#[cfg(any(test, feature = "fuzzing"))]
pub use process::read_answer;
pub use process::{NewDisk, Vm, VmPlan};
pub use streams::{Streams, listen};
