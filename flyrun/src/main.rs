//! `flyrun`: boots any OCI image as a KVM microVM.
//!
//! `main` parses, runs one command and reports its end; each command is a file of `cli/`. From `flyrun run IMAGE` on,
//! read [`cli::run`] (the steps), [`launch`] (what the guest is told), [`monitor`] (who owns the machine, in the foreground
//! this process), [`monitor::life`] (what happens until its end) and [`vm`] (the process that is the machine).
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
mod guest_files;
mod host;
mod interrupt;
mod launch;
mod machine;
mod moment;
mod monitor;
mod mounts;
mod network;
mod paths;
mod progress;
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

use crate::cli::Cli;
use crate::exit_code::ExitCode;

fn main() -> std::process::ExitCode {
    trace::step("main");
    let code = run();
    trace::finish();
    std::process::ExitCode::from(code.number())
}

fn run() -> ExitCode {
    let cli = match Cli::read() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::Success,
                _ => ExitCode::Flyrun,
            };
        }
    };
    cli.execute().unwrap_or_else(|error| {
        anstream::eprintln!("flyrun: {error}");
        error.exit_code()
    })
}
