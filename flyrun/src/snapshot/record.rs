//! snapshot.json: what a snapshot is of.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::machine::{self, LastStart, Outcome, State};
use crate::usage::now_ms;

/// The version of the file's format.
pub const VERSION: u32 = 1;

/// A snapshot as it is kept on disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    pub version: u32,
    pub id: String,
    /// The user's name for it, or its id.
    pub name: String,
    /// Milliseconds since the epoch.
    pub taken_at_ms: u64,
    /// The machine that it was taken of, as one that is suspended.
    pub machine: machine::Record,
}

impl Record {
    /// The record of a snapshot that is taken now of a machine, or was when that was suspended.
    pub fn of(machine: &machine::Record, id: &str, name: Option<&str>) -> Record {
        let taken_at_ms = machine.snapshot.as_ref().map_or_else(now_ms, |snapshot| snapshot.taken_at_ms);
        let snapshot = machine::Snapshot { taken_at_ms, network_number: None };
        Record {
            version: VERSION,
            id: id.to_string(),
            name: name.unwrap_or(id).to_string(),
            taken_at_ms,
            machine: machine::Record {
                state: State::Suspended,
                restarts: 0,
                outcome: None::<Outcome>,
                last_start: None::<LastStart>,
                snapshot: Some(snapshot),
                ..machine.clone()
            },
        }
    }
}

/// Whether this machine can be brought to disk.
///
/// # Errors
/// It has what cannot.
pub fn ensure_can_rest(record: &machine::Record) -> Result<()> {
    if record.config.shares.is_empty() {
        return Ok(());
    }
    let told = format!("{} has directories of the host, which cannot be brought to disk", record.name);
    Err(Error::new(told).advice("Give it volumes instead, or let it stand still with `flyrun pause`."))
}

/// Whether others can go on from where this machine is.
///
/// # Errors
/// It has what cannot be in two machines.
pub fn check(record: &machine::Record) -> Result<()> {
    ensure_can_rest(record)?;
    match record.config.volumes.iter().find(|used| !used.read_only) {
        Some(used) => Err(Error::new(format!(
            "{} writes to volume '{}', which cannot be in two machines",
            record.name, used.name
        ))
        .advice("Keep what machines share read-only, and the rest on their own disks.")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Snapshot;

    #[test]
    fn a_snapshot_is_of_a_machine_that_stands_still() {
        let mut machine =
            machine::Record { state: State::Started, restarts: 3, ..machine::Record::example("web") };
        machine.last_start = Some(LastStart::Resumed);
        let record = Record::of(&machine, "aa11", None);
        assert_eq!((record.name.as_str(), record.machine.state), ("aa11", State::Suspended));
        assert_eq!((record.machine.restarts, record.machine.last_start.is_none()), (0, true));
        machine.snapshot = Some(Snapshot { taken_at_ms: 7, network_number: Some(3) });
        let record = Record::of(&machine, "aa11", Some("warm"));
        assert_eq!((record.name.as_str(), record.taken_at_ms), ("warm", 7));
        assert_eq!(record.machine.snapshot.unwrap().network_number, None);
    }

    #[test]
    fn what_cannot_be_in_two_machines_is_refused_by_name() {
        let mut machine = machine::Record::example("web");
        let mut used = crate::volume::Use { name: "data".into(), path: "/d".into(), read_only: true };
        machine.config.volumes.push(used.clone());
        assert!(check(&machine).is_ok());
        used.read_only = false;
        machine.config.volumes.push(used);
        assert!(check(&machine).unwrap_err().to_string().contains("'data'"));
    }
}
