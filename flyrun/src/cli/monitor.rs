//! `flyrun-monitor monitor`: the process behind a machine in the background. Started by flyrun, not by users.

use std::io;
use std::time::Duration;

use clap::Args;

use super::Context;
use crate::error::{Context as _, Result};
use crate::exit_code::ExitCode;
use crate::monitor::{self, Host, Report, View};
use crate::paths::Library;
use crate::trace;

/// Own a machine in the background
#[derive(Debug, Args)]
pub struct Arguments {
    /// The machine's id
    id: String,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    trace::be_monitor();
    // A terminal's Ctrl-C and hang-up are not for this process.
    let _ = rustix::process::setsid();
    let mut reported = false;
    let result = own(context, &arguments.id, &mut || {
        if !std::mem::replace(&mut reported, true) {
            Report::Started.send();
        }
    });
    let failed = match result {
        Ok(end) => end.report().err(),
        Err(error) => Some(error),
    };
    match failed {
        Some(error) if !reported => {
            let exit_code = error.exit_code().number();
            Report::Failed { message: error.to_string(), exit_code }.send();
            Err(error)
        }
        Some(error) => Err(error),
        None => Ok(ExitCode::Success),
    }
}

fn own(context: &Context, id: &str, started: &mut dyn FnMut()) -> Result<monitor::End> {
    let lock = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3).context("no lock was handed over")?;
    let machine = context.machines().adopt(id, lock)?;
    let library = Library::find()?;
    let store = context.store()?;
    let config = &machine.record().config;
    let view = View::of_nobody(config.stop_signal, Duration::from_secs(config.stop_timeout_s.into()));
    monitor::run(&Host { paths: &context.paths, library: &library, store: &store }, machine, view, started)
}
