//! The steps that flyrun and flyrun-vmm write down: a line each, `MICROSECONDS NAME`, of CLOCK_MONOTONIC.

use std::path::Path;

use anyhow::{Context, Result};

use crate::report::Report;

/// A step and when it was done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// CLOCK_MONOTONIC.
    pub at_us: u64,
    /// What was done.
    pub name: String,
}

/// The steps in the file, in the order of time.
pub fn read(path: &Path) -> Result<Vec<Step>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut steps = text.lines().map(parse).collect::<Result<Vec<_>>>()?;
    steps.sort_by_key(|step| step.at_us);
    Ok(steps)
}

fn parse(line: &str) -> Result<Step> {
    let (at_us, name) = line.split_once(' ').with_context(|| format!("not a step: {line}"))?;
    let at_us = at_us.parse().with_context(|| format!("not a time: {line}"))?;
    Ok(Step { at_us, name: name.to_owned() })
}

/// The steps that guest-init tells on the console, `guest-init MICROSECONDS NAME`, by the guest's own clock.
pub fn guest_init(console: &str) -> Result<Vec<Step>> {
    console
        .lines()
        .filter_map(|line| line.trim().strip_prefix("guest-init "))
        .filter(|line| line.starts_with(|c: char| c.is_ascii_digit()))
        .map(parse)
        .collect()
}

/// Adds each step with the time since the one before it, or since `began`.
pub fn add_steps(name: &str, began_us: u64, steps: &[Step], report: &mut Report) {
    let mut previous = began_us;
    for step in steps {
        report.add(
            format!("{name}: {}", step.name),
            "ms_virtual",
            &[step.at_us.saturating_sub(previous) as f64 / 1000.0],
        );
        previous = step.at_us;
    }
}

/// CLOCK_MONOTONIC now, in µs.
pub fn now_us() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000 + now.tv_nsec.unsigned_abs() / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_come_in_the_order_of_time() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "20 machine is set up\n10 kernel loaded\n").unwrap();
        let steps = read(file.path()).unwrap();
        assert_eq!(
            steps.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(),
            ["kernel loaded", "machine is set up"]
        );
    }

    #[test]
    fn guest_inits_steps_are_told_from_the_rest_of_the_console() {
        let steps =
            guest_init("booting\r\nguest-init 12000 config read\r\nguest-init: a complaint\n").unwrap();
        assert_eq!(steps, [Step { at_us: 12_000, name: "config read".to_owned() }]);
    }

    #[test]
    fn a_line_that_is_not_a_step_is_an_error() {
        assert!(parse("kernel loaded").is_err());
        assert!(parse("12").is_err());
    }
}
