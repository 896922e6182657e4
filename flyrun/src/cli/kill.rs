//! `flyrun kill`.

use clap::Args;

use super::{Context, each::each, lifecycle};
use crate::error::Result;
use crate::exit_code::ExitCode;
use crate::machine::{Action, decide};
use crate::monitor::Request;
use crate::signal::Signal;

/// Send a signal to the process of machines
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun kill web                 SIGKILL
  flyrun kill -s HUP web          have it read its configuration again")]
pub struct Arguments {
    /// The signal, by name or number
    #[arg(short, long, value_name = "SIGNAL", default_value = "KILL")]
    signal: Signal,
    /// Names, ids, or beginnings of ids
    #[arg(required = true, value_name = "MACHINE")]
    machines: Vec<String>,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    let signal = arguments.signal.0;
    each(context, &arguments.machines, |context, record| {
        decide(record, Action::Signal)?;
        lifecycle::ask(context, record, &Request::Signal { signal }).map(drop)
    })
}
