//! What the one processor has done: the time it was not idle, and the VM exits.
//!
//! In virtual time a nanosecond is an instruction, so the processor's busy time is the number of instructions of all that
//! ran: the guest, the VMM, and the host's kernel. The clock's jumps over idle time are not in it.

use std::{fs, path::Path};

use anyhow::{Context, Result};

use crate::exits::Exits;

const SCHEDULER: &str = "/proc/schedstat";
/// KVM's last resort before it lets a halted vCPU go: to look again and again whether there is an interrupt. Nothing comes
/// of it where one processor does everything, and it would be counted.
const HALT_POLL: &str = "/sys/module/kvm/parameters/halt_poll_ns";

/// Counters at one moment, or their difference between two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Busy {
    /// Time in which some task ran, in ns.
    pub ns: u64,
    /// Exits of all VMs that live.
    pub exits: u64,
}

impl Busy {
    /// The counters now.
    pub fn now() -> Result<Self> {
        let text = fs::read_to_string(SCHEDULER).with_context(|| format!("cannot read {SCHEDULER}"))?;
        Ok(Self { ns: running_ns(&text)?, exits: Exits::now()?.all() })
    }

    /// What was added since `earlier`.
    pub fn since(self, earlier: Self) -> Self {
        Self { ns: self.ns.saturating_sub(earlier.ns), exits: self.exits.saturating_sub(earlier.exits) }
    }
}

/// Has halted vCPUs let go at once.
pub fn without_halt_polling() -> Result<()> {
    match Path::new(HALT_POLL).exists() {
        true => fs::write(HALT_POLL, "0").with_context(|| format!("cannot write {HALT_POLL}")),
        false => Ok(()),
    }
}

/// The seventh number of each processor's line (Documentation/scheduler/sched-stats.rst).
fn running_ns(schedstat: &str) -> Result<u64> {
    let mut sum = 0;
    let mut lines = 0;
    for line in schedstat.lines().filter(|line| line.starts_with("cpu")) {
        let field = line.split_ascii_whitespace().nth(7).with_context(|| format!("too short: {line}"))?;
        sum += field.parse::<u64>().with_context(|| format!("not a number: {field}"))?;
        lines += 1;
    }
    anyhow::ensure!(lines > 0, "{SCHEDULER} tells of no processor");
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_all_processors_is_added_and_that_of_domains_is_not() {
        let text = "version 16\ntimestamp 4294937\ncpu0 0 0 0 0 0 0 100 5 7\ndomain0 3 1 2 3 4 5 6 7\ncpu1 0 0 0 0 0 0 23 5 7\n";
        assert_eq!(running_ns(text).unwrap(), 123);
    }

    #[test]
    fn another_format_is_an_error() {
        assert!(running_ns("version 99\n").is_err());
        assert!(running_ns("cpu0 1 2\n").is_err());
        assert!(running_ns("cpu0 0 0 0 0 0 0 x 5 7\n").is_err());
    }
}
