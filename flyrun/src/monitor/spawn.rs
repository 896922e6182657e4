//! A monitor in the background: the command that starts a machine hands it over and waits only for its start.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};
use crate::exit_code::ExitCode;
use crate::machine::Owned;
use crate::paths::{LIBRARY, Library, Part, Paths};
use crate::trace;

/// glibc's own: by default each thread has its own heap, which takes longer to make than all that a thread of a monitor ever puts
/// there.
pub const ONE_ARENA: (&str, &str) = ("MALLOC_ARENA_MAX", "1");

/// What a new monitor says on its standard output, as one line of JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    Started,
    Failed { message: String, exit_code: u8 },
}

impl Report {
    /// Tells the command that waits; it may have been interrupted.
    pub fn send(&self) {
        let mut stdout = std::io::stdout().lock();
        let _ = serde_json::to_writer(&mut stdout, self);
        let _ = stdout.write_all(b"\n").and_then(|()| stdout.flush());
    }
}

/// Starts a monitor for a machine and returns when the machine's process runs.
///
/// Whoever lives on must ask the child for its exit status some day, or it stays after its end.
///
/// The lock of the machine is the monitor's standard input: the machine is owned by one or the other without a gap.
///
/// # Errors
/// The machine did not start; the error is its monitor's.
pub fn spawn(paths: &Paths, machine: Owned) -> Result<Child> {
    let library = Library::find()?;
    let program = library.path(Part::Monitor);
    let id = machine.record().id.clone();
    let log = machine.directory().join("monitor.log");
    let log = File::create(&log).context(format!("cannot write {}", log.display()))?;
    let mut child = Command::new(&program)
        .env(ONE_ARENA.0, ONE_ARENA.1)
        // It has the parts that this command has found, and need not look for them.
        .env(LIBRARY, library.directory())
        .arg("--root")
        .arg(&paths.root)
        .arg("--run-dir")
        .arg(&paths.run)
        .args(["monitor", &id])
        .stdin(machine.share_lock()?)
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .context(format!("cannot start {}", program.display()))?;
    trace::step("monitor spawned");
    drop(machine);
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut line).context("cannot read from the machine's monitor")?;
    }
    match serde_json::from_str(&line) {
        Ok(Report::Started) => Ok(child),
        Ok(Report::Failed { message, exit_code }) => {
            // It removes what is to go before it ends.
            let _ = child.wait();
            Err(Error::new(message).code(ExitCode::Workload(exit_code)))
        }
        Err(_) => {
            let status = child.wait().context("cannot wait for the machine's monitor")?;
            Err(Error::new(format!("the monitor of machine {id} ended without a word ({status})"))
                .advice("`flyrun ps -a` finds out what is left of the machine."))
        }
    }
}
