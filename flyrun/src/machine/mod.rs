//! A machine is a directory, and the directory says what it is.

use crate::error::{Error, Result};

mod changes;
pub mod health;
mod id;
mod record;
pub mod restart;
mod state;
mod store;

pub use changes::{Changes, Rates};
pub use id::{is_name, new_id};
pub use record::{
    Config, LastStart, Limits, LogLimits, MAX_DISK, MAX_LOG_FILES, MAX_STOP_TIMEOUT_S, MIN_LOG, Outcome,
    Record, Snapshot, VERSION,
};
pub use state::{Action, State, Verdict};
pub use store::{DISK, Ended, Machines, Owned, Patience, SNAPSHOT, SNAPSHOT_STATE};

/// Whether an action makes sense now.
///
/// # Errors
/// It does not; the error says why, and what to do.
pub fn decide(record: &Record, action: Action) -> Result<Verdict> {
    record.state.decide(action).map_err(|refusal| {
        let error = Error::new(refusal.to_string());
        match refusal.advice() {
            Some(advice) => error.advice(advice),
            None => error,
        }
    })
}

/// Seconds since the epoch.
pub fn now() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |time| time.as_secs())
}

/// What tells this boot of the host from others.
pub fn boot_id() -> Option<String> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(text.trim().to_string())
}
