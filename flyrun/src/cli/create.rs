//! `flyrun create`.

use clap::Args;

use super::new_machine::{self, Flags};
use super::{Context, print_line};
use crate::error::Result;
use crate::exit_code::ExitCode;
use crate::machine::State;

/// Make a machine without starting it
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun create --name web nginx
  flyrun start web")]
pub struct Arguments {
    #[command(flatten)]
    flags: Flags,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    let made = new_machine::make(context, &arguments.flags, State::Created)?;
    print_line(&made.machine.record().id)?;
    Ok(ExitCode::Success)
}
