//! A machine is a directory, and the directory says what it is.

mod id;
mod record;
mod store;

pub use id::{is_name, new_id};
pub use record::{Outcome, Record, State, VERSION};
pub use store::{Ended, Machines, Owned};
