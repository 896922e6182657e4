//! When each step of a start happened, for the benches: one line a step, CLOCK_MONOTONIC in µs.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    path::Path,
    sync::Mutex,
};

/// Writes steps and their times to a file, or nothing at all.
#[derive(Debug, Default)]
pub struct Trace {
    steps: Option<Mutex<Steps>>,
}

#[derive(Debug)]
struct Steps {
    file: File,
    /// Lines that wait for [`Trace::flush`]: writing a file costs more than many of the steps do.
    lines: String,
}

impl Trace {
    /// A trace that keeps nothing.
    pub fn off() -> Self {
        Self::default()
    }

    /// A trace at the end of the file.
    ///
    /// # Errors
    /// The file cannot be opened for writing.
    pub fn to(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        Ok(Self { steps: Some(Mutex::new(Steps { file, lines: String::new() })) })
    }

    /// Notes that the step is done now.
    pub fn step(&self, name: &str) {
        if self.steps.is_some() {
            self.step_at(name, now_us());
        }
    }

    /// Notes that the step was done at that time in µs.
    pub fn step_at(&self, name: &str, at_us: u64) {
        if let Some(steps) = &self.steps
            && let Ok(mut steps) = steps.lock()
        {
            steps.lines.push_str(&format!("{at_us} {name}\n"));
        }
    }

    /// Writes what was noted. A trace that cannot be written is lost: it never stops a machine.
    pub fn flush(&self) {
        if let Some(steps) = &self.steps
            && let Ok(mut steps) = steps.lock()
        {
            let lines = std::mem::take(&mut steps.lines);
            let _lost = steps.file.write_all(lines.as_bytes());
        }
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        self.flush();
    }
}

/// CLOCK_MONOTONIC in µs.
pub fn now_us() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec of our own, and CLOCK_MONOTONIC always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec.unsigned_abs() * 1_000_000 + now.tv_nsec.unsigned_abs() / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_lines_in_order_with_times_that_do_not_go_back() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let trace = Trace::to(file.path()).unwrap();
        trace.step("one");
        trace.step("two");
        trace.flush();
        let text = std::fs::read_to_string(file.path()).unwrap();
        let lines: Vec<(u64, &str)> =
            text.lines().filter_map(|l| l.split_once(' ')).map(|(t, n)| (t.parse().unwrap(), n)).collect();
        assert_eq!(lines.iter().map(|l| l.1).collect::<Vec<_>>(), ["one", "two"]);
        assert!(lines[0].0 <= lines[1].0);
    }
}
