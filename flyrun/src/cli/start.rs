//! `flyrun start`.

use clap::Args;

use super::{Context, each::each, lifecycle};
use crate::error::Result;
use crate::exit_code::ExitCode;

/// Start machines that have ended or were never started
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun start web db

The machine's own disk is as it was when it ended. Exit code: 125 if one could not be started, 126 or 127 if its command
cannot be executed.")]
pub struct Arguments {
    /// Names, ids, or beginnings of ids
    #[arg(required = true, value_name = "MACHINE")]
    machines: Vec<String>,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    each(context, &arguments.machines, lifecycle::start)
}
