//! What machines have used, in a ledger that outlives them: intervals of their lives, each with the seconds it lasted,
//! what the machine had, and what it took.
//!
//! A machine that runs has one open interval, `open/ID`, which its monitor writes again every second; an interval that is
//! over is a line of `YYYY-MM.jsonl`. After a crash the open interval is still there, and the next command that looks
//! puts it with the others: at most the last second is lost, after a power cut the last ten.

mod ledger;
mod meter;
mod total;

pub use ledger::Ledger;
pub use meter::{Meter, Sources};
pub use total::{Total, totals};

use serde::{Deserialize, Serialize};

use crate::machine::Record;
use crate::size::Size;

/// A part of a machine's life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interval {
    /// The machine's id, and its name then.
    pub machine: String,
    pub name: String,
    pub phase: Phase,
    /// Milliseconds since the epoch. The end is the beginning and the time that went by: no clock that is set changes it.
    pub from_ms: u64,
    pub to_ms: u64,
    /// Thousandths of a CPU that it might use.
    pub cpu_milli: u32,
    pub memory: Size,
    pub taken: Counters,
}

/// What a machine does meanwhile, and so what it costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// It runs.
    Started,
    /// It is on disk. Written down when it is over.
    Suspended,
}

impl Interval {
    /// The time that a machine has been suspended for, until now; `None` for one that is not.
    pub fn suspended(record: &Record, now_ms: u64) -> Option<Interval> {
        let snapshot = record.snapshot.as_ref()?;
        Some(Interval {
            machine: record.id.clone(),
            name: record.name.clone(),
            phase: Phase::Suspended,
            from_ms: snapshot.taken_at_ms,
            to_ms: now_ms.max(snapshot.taken_at_ms),
            cpu_milli: 0,
            memory: record.config.memory,
            taken: Counters::default(),
        })
    }
}

/// Milliseconds since the epoch.
pub fn now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}

/// What only grows while a machine runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Microseconds of the host's CPU, the VMM's own included.
    pub cpu_usec: u64,
    /// Bytes that its network card received and sent.
    pub net_in: u64,
    pub net_out: u64,
}

impl Counters {
    /// Where a source has fallen silent, as a process that has ended, what it told before stays.
    fn max(self, other: Counters) -> Counters {
        Counters {
            cpu_usec: self.cpu_usec.max(other.cpu_usec),
            net_in: self.net_in.max(other.net_in),
            net_out: self.net_out.max(other.net_out),
        }
    }

    fn since(self, earlier: Counters) -> Counters {
        Counters {
            cpu_usec: self.cpu_usec.saturating_sub(earlier.cpu_usec),
            net_in: self.net_in.saturating_sub(earlier.net_in),
            net_out: self.net_out.saturating_sub(earlier.net_out),
        }
    }
}

#[cfg(test)]
impl Interval {
    /// An interval for tests, with a thousand of everything.
    fn example(machine: &str, from_ms: u64, to_ms: u64) -> Interval {
        let taken = Counters { cpu_usec: 1000, net_in: 1000, net_out: 1000 };
        let phase = Phase::Started;
        let (machine, name) = (machine.to_string(), "web".to_string());
        Interval { machine, name, phase, from_ms, to_ms, cpu_milli: 1500, memory: Size::mib(256), taken }
    }
}
