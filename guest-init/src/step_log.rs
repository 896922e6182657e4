//! The steps of the boot with the time each was reached, for `--init-log` and the benchmark.

use std::fmt::Write as _;

use rustix::time::{ClockId, clock_gettime};

/// Collects steps in memory and writes them at once: a serial console costs a VM exit per byte, which would
/// otherwise be most of what it measures.
#[derive(Debug, Default)]
pub struct StepLog {
    enabled: bool,
    lines: String,
}

impl StepLog {
    /// A log that records nothing unless `enabled`.
    pub fn new(enabled: bool) -> Self {
        Self { enabled, lines: String::new() }
    }

    /// Records that a step has been reached, in microseconds since the kernel's start.
    pub fn step(&mut self, what: &str) {
        if !self.enabled {
            return;
        }
        let now = clock_gettime(ClockId::Monotonic);
        let micros = now.tv_sec.saturating_mul(1_000_000).saturating_add(now.tv_nsec / 1000);
        let _ = writeln!(self.lines, "guest-init {micros} {what}");
    }

    /// Writes what was recorded to the console and forgets it.
    pub fn flush(&mut self) {
        if !self.lines.is_empty() {
            crate::pid1::console(&std::mem::take(&mut self.lines));
        }
    }
}
