//! `flyrun stop`.

use clap::Args;

use super::{Context, each::each, lifecycle};
use crate::error::Result;
use crate::exit_code::ExitCode;

/// Ask machines to end, and kill those that do not
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun stop web
  flyrun stop -t 0 web            kill it at once
  flyrun ps -q | xargs -r flyrun stop

The process gets its stop signal, and SIGKILL when the time is over. A machine that does not run is left as it is.")]
pub struct Arguments {
    /// Seconds to wait before killing [default: the machine's own]
    #[arg(short, long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(..=3600))]
    time: Option<u32>,
    /// Names, ids, or beginnings of ids
    #[arg(required = true, value_name = "MACHINE")]
    machines: Vec<String>,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    each(context, &arguments.machines, |context, record| lifecycle::stop(context, record, arguments.time))
}
