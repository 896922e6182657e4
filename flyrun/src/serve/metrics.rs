//! Figures of starts and machines, as Prometheus reads them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::group::View;
use super::host::Kind;
use super::limits::HostLimits;

/// Upper bounds of the time until a machine is ready, in seconds.
const BOUNDS: [f64; 12] = [0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0];
const STATES: [&str; 8] =
    ["cold", "starting", "ready", "failing", "draining", "suspending", "stopping", "suspended"];

/// What is counted from the start of `flyrun serve`.
#[derive(Debug, Default)]
pub struct Counts(Mutex<Counted>);

#[derive(Clone, Debug, Default)]
struct Counted {
    starts: BTreeMap<Kind, Starts>,
    failed: u64,
    died: u64,
}

#[derive(Clone, Debug, Default)]
struct Starts {
    count: u64,
    seconds: f64,
    /// How many took no longer than each bound.
    within: [u64; BOUNDS.len()],
}

impl Counts {
    /// A machine was started, and ready after so long.
    pub fn started(&self, kind: Kind, took: Duration) {
        self.change(|counted| {
            let starts = counted.starts.entry(kind).or_default();
            starts.count += 1;
            starts.seconds += took.as_secs_f64();
            for (within, bound) in starts.within.iter_mut().zip(BOUNDS) {
                *within += u64::from(took.as_secs_f64() <= bound);
            }
        });
    }

    /// A machine could not be started.
    pub fn start_failed(&self) {
        self.change(|counted| counted.failed += 1);
    }

    /// A machine has ended by itself.
    pub fn died(&self) {
        self.change(|counted| counted.died += 1);
    }

    fn change(&self, change: impl FnOnce(&mut Counted)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// All families, with what there is now.
    pub fn render(&self, views: &[View], limits: &HostLimits) -> String {
        let counted = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut text = String::new();
        starts(&mut text, &counted);
        groups(&mut text, views);
        family(&mut text, "flyrun_memory_in_use_bytes", "gauge", "Memory of machines that run.");
        let _ = writeln!(text, "flyrun_memory_in_use_bytes {}", limits.memory_in_use_mib() << 20);
        text
    }
}

fn family(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
}

fn starts(text: &mut String, counted: &Counted) {
    let name = "flyrun_start_seconds";
    family(text, name, "histogram", "Time from the decision to start a machine until it is ready.");
    for kind in Kind::ALL {
        let starts = counted.starts.get(&kind).cloned().unwrap_or_default();
        let kind = kind.name();
        for (bound, within) in BOUNDS.iter().zip(starts.within) {
            let _ = writeln!(text, "{name}_bucket{{kind=\"{kind}\",le=\"{bound}\"}} {within}");
        }
        let _ = writeln!(text, "{name}_bucket{{kind=\"{kind}\",le=\"+Inf\"}} {}", starts.count);
        let _ = writeln!(text, "{name}_sum{{kind=\"{kind}\"}} {}", starts.seconds);
        let _ = writeln!(text, "{name}_count{{kind=\"{kind}\"}} {}", starts.count);
    }
    family(text, "flyrun_start_failures_total", "counter", "Machines that could not be started.");
    let _ = writeln!(text, "flyrun_start_failures_total {}", counted.failed);
    family(text, "flyrun_machine_deaths_total", "counter", "Machines that ended by themselves.");
    let _ = writeln!(text, "flyrun_machine_deaths_total {}", counted.died);
}

fn groups(text: &mut String, views: &[View]) {
    // Names of apps and groups have nothing in them that would have to be quoted.
    let labels = |view: &View| format!("app=\"{}\",group=\"{}\"", view.app, view.group);
    family(text, "flyrun_queue_requests", "gauge", "Requests that wait for a machine.");
    for view in views {
        let _ = writeln!(text, "flyrun_queue_requests{{{}}} {}", labels(view), view.waiting);
    }
    family(text, "flyrun_machines", "gauge", "Machines by state.");
    for view in views {
        for state in STATES {
            let count = view.machines.iter().filter(|machine| machine.state == state).count();
            let _ = writeln!(text, "flyrun_machines{{{},state=\"{state}\"}} {count}", labels(view));
        }
    }
    family(text, "flyrun_machine_load", "gauge", "Requests, or connections, of each machine.");
    for view in views {
        for machine in &view.machines {
            let _ = writeln!(
                text,
                "flyrun_machine_load{{{},slot=\"{}\"}} {}",
                labels(view),
                machine.slot,
                machine.load
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_are_counted_by_kind_and_time() {
        let counts = Counts::default();
        counts.started(Kind::Resumed, Duration::from_millis(12));
        counts.started(Kind::Resumed, Duration::from_millis(80));
        counts.start_failed();
        let text = counts.render(&[], &HostLimits::new(1, 512));
        for line in [
            "flyrun_start_seconds_bucket{kind=\"resumed\",le=\"0.01\"} 0",
            "flyrun_start_seconds_bucket{kind=\"resumed\",le=\"0.02\"} 1",
            "flyrun_start_seconds_bucket{kind=\"resumed\",le=\"+Inf\"} 2",
            "flyrun_start_seconds_count{kind=\"base\"} 0",
            "flyrun_start_failures_total 1",
            "flyrun_memory_in_use_bytes 0",
        ] {
            assert!(text.lines().any(|known| known == line), "{line} is not in\n{text}");
        }
    }
}
