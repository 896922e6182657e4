//! A machine is a directory, and the directory says what it is.

mod id;
mod record;
pub mod restart;
mod state;
mod store;

pub use id::{is_name, new_id};
pub use record::{Config, LogLimits, Outcome, Record, VERSION};
pub use state::{Action, State, Verdict};
pub use store::{Ended, Machines, Owned, Patience};

/// Seconds since the epoch.
pub fn now() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |time| time.as_secs())
}
