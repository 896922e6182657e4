//! `flyrun restart`.

use clap::Args;

use super::{Context, each::each, lifecycle};
use crate::error::Result;
use crate::exit_code::ExitCode;

/// Stop machines and start them again
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun restart web")]
pub struct Arguments {
    /// Seconds to wait before killing [default: the machine's own]
    #[arg(short, long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(..=3600))]
    time: Option<u32>,
    /// Names, ids, or beginnings of ids
    #[arg(required = true, value_name = "MACHINE")]
    machines: Vec<String>,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    each(context, &arguments.machines, |context, record| {
        lifecycle::stop(context, record, arguments.time)?;
        lifecycle::start(context, &context.machines().find(&record.id)?)
    })
}
