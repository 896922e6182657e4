//! Which machine the user means, and whether it can be talked to.

use crate::error::Result;
use crate::machine::{Action, Machines, Record};

/// The running machine with this name, id, or beginning of an id.
///
/// # Errors
/// There is none, there are several, or it does not run.
pub fn find_running(machines: &Machines, wanted: &str) -> Result<Record> {
    let record = machines.find(wanted)?;
    crate::machine::decide(&record, Action::Exec)?;
    Ok(record)
}
