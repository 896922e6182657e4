//! Time stamps of a start, for the benches: `FLYRUN_TRACE=DIR` collects them in `DIR/cli.trace`, `DIR/monitor.trace` of a
//! monitor in the background, and `DIR/vmm.trace`. And places
//! where a test stops the program to kill something there ([`vmm::hold`]).

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock};

use rustix::time::{ClockId, clock_gettime};

static STEPS: OnceLock<Option<Mutex<String>>> = OnceLock::new();
static IS_MONITOR: OnceLock<()> = OnceLock::new();

fn directory() -> Option<PathBuf> {
    std::env::var_os("FLYRUN_TRACE").map(PathBuf::from)
}

/// Where the VMM is to write its own steps, if anybody wants them.
pub fn vmm_file() -> Option<PathBuf> {
    directory().map(|directory| directory.join("vmm.trace"))
}

/// From now on the steps are those of a monitor in the background.
pub fn be_monitor() {
    let _ = IS_MONITOR.set(());
}

/// Notes that a step has been reached, in microseconds of CLOCK_MONOTONIC.
pub fn step(name: &str) {
    vmm::hold::at(name);
    let steps = STEPS.get_or_init(|| directory().map(|_| Mutex::new(String::new())));
    if let Some(Ok(mut text)) = steps.as_ref().map(Mutex::lock) {
        let now = clock_gettime(ClockId::Monotonic);
        let _ = writeln!(text, "{} {name}", now.tv_sec * 1_000_000 + now.tv_nsec / 1000);
    }
}

/// Writes the steps out. A trace that cannot be written is not worth failing a machine for.
pub fn finish() {
    if let (Some(directory), Some(Some(steps))) = (directory(), STEPS.get())
        && let Ok(text) = steps.lock()
    {
        let name = if IS_MONITOR.get().is_some() { "monitor.trace" } else { "cli.trace" };
        let _ = std::fs::write(directory.join(name), text.as_bytes());
    }
}
