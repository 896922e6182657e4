//! `flyrun rm`.

use clap::Args;

use super::{Context, each::each, lifecycle};
use crate::error::Result;
use crate::exit_code::ExitCode;

/// Remove machines with their disks and logs
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun rm web
  flyrun rm -f web                also if it runs
  flyrun ps -aq | xargs -r flyrun rm -f")]
pub struct Arguments {
    /// Kill a machine that runs
    #[arg(short, long)]
    force: bool,
    /// Names, ids, or beginnings of ids
    #[arg(required = true, value_name = "MACHINE")]
    machines: Vec<String>,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    context.keep_house()?;
    let removed = each(context, &arguments.machines, |context, record| {
        lifecycle::remove(context, record, arguments.force)
    });
    let swept = context.sweep_rules();
    let code = removed?;
    swept.map(|()| code)
}
