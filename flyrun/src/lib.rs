//! Everything that `flyrun` and `flyrun-monitor` do.
//!
//! Each command is a file of `cli/`. From `flyrun run IMAGE` on, read [`cli::run`] (the steps), [`launch`] (what the guest is told),
//! [`monitor`] (who owns the machine: this process in the foreground, else `flyrun-monitor`), [`monitor::life`] (what happens until
//! its end) and [`vm`] (the process that is the machine).
#![forbid(unsafe_code)]

mod apps;
mod base;
mod cgroup;
mod cli;
mod cpio;
mod cpus;
mod delivery;
mod error;
mod exit_code;
mod files;
#[cfg(any(test, feature = "fuzzing"))]
#[allow(missing_docs)]
pub mod fuzzing;
mod guest_files;
mod host;
mod http_status;
mod image_limits;
mod interrupt;
mod kernel_text;
mod launch;
mod machine;
mod moment;
mod monitor;
mod mounts;
mod network;
mod pace;
mod paths;
mod production;
mod progress;
mod random;
mod rootfs;
mod secrets;
mod serve;
mod session;
mod share;
mod signal;
mod size;
mod snapshot;
mod terminal;
mod trace;
mod usage;
mod vm;
mod vm_usage;
mod volume;

use clap::error::ErrorKind;

use crate::cli::{Background, Cli};
use crate::exit_code::ExitCode;

/// What a user asks for.
pub fn command() -> u8 {
    conclude(|| Ok(Cli::read()?.execute()))
}

/// What flyrun starts by itself, and no user: a machine's monitor, or the process that becomes a virtiofsd.
pub fn background() -> u8 {
    conclude(|| Ok(Background::read()?.execute()))
}

/// Does what a command line says, and tells how that ended. Not one enum of all commands: the small program has no code of
/// those that it does not know.
fn conclude(command: impl FnOnce() -> Result<error::Result<ExitCode>, clap::Error>) -> u8 {
    trace::step("main");
    let code = match command() {
        Ok(Ok(code)) => code,
        Ok(Err(error)) => {
            anstream::eprintln!("flyrun: {error}");
            error.exit_code()
        }
        Err(error) => {
            let _ = error.print();
            match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::Success,
                _ => ExitCode::Flyrun,
            }
        }
    };
    trace::finish();
    code.number()
}
