//! `flyrun rename`.

use clap::Args;

use super::{Context, lifecycle, new_machine};
use crate::error::{Error, Result};
use crate::exit_code::ExitCode;
use crate::machine::Patience;
use crate::monitor::Request;

/// Give a machine another name
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun rename 1a2b web")]
pub struct Arguments {
    /// Name, id, or beginning of the id
    machine: String,
    /// The new name
    name: String,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    new_machine::check_name(&arguments.name)?;
    let machines = context.machines();
    let record = machines.find(&arguments.machine)?;
    let name = &arguments.name;
    match machines.acquire(&record.id, Patience::Glance)? {
        Some(mut machine) => machine.rename(&machines, name)?,
        None => {
            lifecycle::ask(context, &record, &Request::Rename { name: name.clone() })?;
            if machines.find(&record.id)?.name != *name {
                return Err(Error::new("the machine has ended meanwhile").advice("Try again."));
            }
        }
    }
    Ok(ExitCode::Success)
}
