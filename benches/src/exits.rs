//! VM exits by kind, from the counters of the kernel's KVM.

use std::{collections::BTreeMap, path::Path, process::Command, time::Duration};

use anyhow::{Context, Result};

use crate::{report::Report, run::Started};

const COUNTERS: &str = "/sys/kernel/debug/kvm";

/// The kinds that are told. `exits` counts all of them; the others are reasons, which overlap in part.
const KINDS: [&str; 10] = [
    "exits",
    "io_exits",
    "mmio_exits",
    "halt_exits",
    "irq_exits",
    "irq_window_exits",
    "signal_exits",
    "request_irq_exits",
    "hypercalls",
    "insn_emulation",
];
/// Not an exit by name, but most of a short machine's exits are these.
const FAULTS: &str = "pf_taken";

/// Counts the exits of a VM from its start to the sign, as `name` and, by kind, `name.kind`.
///
/// The command must keep its VM after the sign: the counters are those of VMs that live. It is killed then, unless it
/// `ends` by itself.
pub fn measure(
    command: &mut Command,
    sign: &str,
    runs: u32,
    name: &str,
    ends: bool,
    report: &mut Report,
) -> Result<()> {
    let mut counts: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for _ in 0..runs {
        wait_for_none()?;
        let started = Started::new(command, sign)?;
        for (kind, count) in Exits::now()?.0 {
            counts.entry(kind).or_default().push(count as f64);
        }
        if ends {
            started.finish()?;
        }
    }
    report.add(name, "count", &counts.remove("exits").unwrap_or_default());
    for (kind, values) in counts.iter().filter(|(_, values)| values.iter().any(|value| *value > 0.0)) {
        report.add(format!("{name}.{kind}"), "count", values);
    }
    Ok(())
}

/// The counters at one moment, over all VMs that live.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exits(BTreeMap<&'static str, u64>);

impl Exits {
    /// Reads the counters. Debugfs must be mounted.
    pub fn now() -> Result<Self> {
        Self::read(Path::new(COUNTERS))
    }

    fn read(directory: &Path) -> Result<Self> {
        let mut counters = BTreeMap::new();
        for kind in KINDS.into_iter().chain([FAULTS]) {
            let path = directory.join(kind);
            // Kernels differ in what they count.
            if let Ok(text) = std::fs::read_to_string(&path) {
                let count =
                    text.trim().parse().with_context(|| format!("{} is not a number", path.display()))?;
                counters.insert(kind, count);
            }
        }
        anyhow::ensure!(
            counters.contains_key("exits"),
            "there are no KVM counters in {}",
            directory.display()
        );
        Ok(Self(counters))
    }

    /// All exits.
    pub fn all(&self) -> u64 {
        self.0.get("exits").copied().unwrap_or_default()
    }
}

/// Waits until no VM lives. One that has just ended is counted until the kernel has taken it apart.
pub fn wait_for_none() -> Result<()> {
    for _ in 0..500 {
        if Exits::now()?.0.get("exits") == Some(&0) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    anyhow::bail!("another VM runs on this machine, and its exits would be counted as well");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_that_this_kernel_does_not_have_are_left_out() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("exits"), "100\n").unwrap();
        std::fs::write(directory.path().join("io_exits"), "7\n").unwrap();
        let exits = Exits::read(directory.path()).unwrap();
        assert_eq!(exits.0, BTreeMap::from([("exits", 100), ("io_exits", 7)]));
    }

    #[test]
    fn without_counters_there_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        assert!(Exits::read(directory.path()).is_err());
    }
}
