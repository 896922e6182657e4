//! Places where a test stops this program, to kill it or another one there: `FLYRUN_HOLD=STEP` and `FLYRUN_HOLD_FIFO=PATH`.
//!
//! Who reaches the step first writes its process id into the FIFO, which waits for somebody who reads it, and then waits until
//! somebody has opened `PATH.go` for writing and closed it. Without both variables nothing is done.

use std::{
    fs::{self, File},
    io::{Read, Write},
    path::PathBuf,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

static ORDER: OnceLock<Option<(String, PathBuf)>> = OnceLock::new();
static DONE: AtomicBool = AtomicBool::new(false);

/// Waits here, once, if this is the step that is asked for.
pub fn at(step: &str) {
    let order = ORDER.get_or_init(|| {
        let fifo = std::env::var_os("FLYRUN_HOLD_FIFO").map(PathBuf::from)?;
        Some((std::env::var("FLYRUN_HOLD").ok()?, fifo))
    });
    let Some((_, fifo)) = order.as_ref().filter(|(wanted, _)| wanted == step) else { return };
    if !DONE.swap(true, Ordering::Relaxed) {
        let told = File::options()
            .write(true)
            .open(fifo)
            .and_then(|mut fifo| writeln!(fifo, "{}", std::process::id()));
        let mut go = fifo.clone().into_os_string();
        go.push(".go");
        // A test that has made no FIFOs waits for nobody.
        if told.is_ok()
            && let Ok(mut go) = fs::File::open(go)
        {
            let _ = go.read_to_end(&mut Vec::new());
        }
    }
}
