//! `flyrun wait`.

use clap::Args;

use super::{Context, lifecycle, print_line};
use crate::error::{Error, Result};
use crate::exit_code::ExitCode;
use crate::machine::State;
use crate::monitor::{Reply, Request};

/// Wait until machines have ended, and print their exit codes
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  code=$(flyrun wait job)

A machine that has ended already is answered for at once, one that was never started with 0.")]
pub struct Arguments {
    /// Names, ids, or beginnings of ids
    #[arg(required = true, value_name = "MACHINE")]
    machines: Vec<String>,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    for name in &arguments.machines {
        let record = context.machines().find(name)?;
        if record.state == State::Suspended {
            return Err(Error::new(format!("{name}: it is suspended"))
                .advice("It ends no sooner than it is resumed, with `flyrun resume`."));
        }
        let ended = record.outcome.as_ref().map_or(0, |outcome| outcome.exit_code);
        let exit_code = match record.state.needs_monitor() {
            false => ended,
            true => match lifecycle::ask(context, &record, &Request::Wait)? {
                Reply::Ended { exit_code } => exit_code,
                _ => ended,
            },
        };
        print_line(&exit_code.to_string())?;
    }
    Ok(ExitCode::Success)
}
