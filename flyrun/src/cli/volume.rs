//! `flyrun volume`.

use clap::{Args, Subcommand};
use serde::Serialize;

use super::{Context, print_json, print_line, table};
use crate::error::{Error, Result};
use crate::exit_code::ExitCode;
use crate::machine::State;
use crate::size::Size;
use crate::volume::{self, Volume, Volumes};

/// What a volume has when nobody says otherwise; [`volume::DEFAULT_SIZE`].
const DEFAULT_SIZE: &str = "10g";

/// Manage filesystems that outlive machines
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun volume create data --size 20g
  flyrun run -d -v data:/var/lib/postgresql postgres
  flyrun volume extend data --size 40g
  flyrun volume rm data

A volume is an ext4 filesystem on a block device of its own. One machine at a time may write to it, or many read. A new
one begins with what the image has in its place.")]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a volume
    Create {
        /// Its size; it takes up only what is written
        #[arg(short, long, value_name = "SIZE", default_value = DEFAULT_SIZE)]
        size: Size,
        /// Its name
        name: String,
    },
    /// List volumes
    Ls {
        /// Print names only
        #[arg(short, long)]
        quiet: bool,
        /// Print as JSON
        #[arg(long, conflicts_with = "quiet")]
        json: bool,
    },
    /// Print all that is known of volumes, as JSON
    Inspect {
        /// Names
        #[arg(required = true, value_name = "VOLUME")]
        volumes: Vec<String>,
    },
    /// Remove volumes with all that is in them
    Rm {
        /// Names
        #[arg(required = true, value_name = "VOLUME")]
        volumes: Vec<String>,
    },
    /// Make a volume larger; its filesystem grows at the next start of a machine that has it
    Extend {
        /// Its new size
        #[arg(short, long, value_name = "SIZE")]
        size: Size,
        /// Its name
        name: String,
    },
}

/// The fields of `--json`; their names are stable.
#[derive(Serialize)]
struct Listed {
    #[serde(flatten)]
    volume: Volume,
    used_bytes: u64,
    machines: Vec<String>,
    directory: std::path::PathBuf,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    let volumes = context.volumes();
    match &arguments.command {
        Command::Create { size, name } => {
            volumes.create(&context.store()?, name, *size)?;
            print_line(name)?;
        }
        Command::Ls { quiet, json } => return list(context, &volumes, *quiet, *json),
        Command::Inspect { volumes: names } => {
            let found = names.iter().map(|name| volumes.find(name)).collect::<Result<Vec<_>>>()?;
            return print_json(&listed(context, &volumes, found)?);
        }
        Command::Rm { volumes: names } => {
            let mut code = ExitCode::Success;
            for name in names {
                match context.machines().list().and_then(|machines| volumes.remove(name, &machines)) {
                    Ok(()) => print_line(name)?,
                    Err(error) => {
                        anstream::eprintln!("flyrun: {error}");
                        code = error.exit_code();
                    }
                }
            }
            return Ok(code);
        }
        Command::Extend { size, name } => {
            // A suspended machine would find another disk than the one it has in memory.
            let machines = context.machines().list()?;
            let suspended = volume::users(&machines, name).find(|user| user.state == State::Suspended);
            if let Some(user) = suspended {
                return Err(Error::new(format!(
                    "volume '{name}' is in use by {}, which is suspended",
                    user.name
                ))
                .advice("Resume and stop that machine first."));
            }
            let volume = volumes.extend(name, *size)?;
            print_line(&format!("{name} has {} now", volume.size))?;
        }
    }
    Ok(ExitCode::Success)
}

fn listed(context: &Context, volumes: &Volumes, found: Vec<Volume>) -> Result<Vec<Listed>> {
    let machines = context.machines().list()?;
    Ok(found
        .into_iter()
        .map(|volume| Listed {
            used_bytes: volumes.used(&volume.name),
            machines: volume::users(&machines, &volume.name).map(|machine| machine.name.clone()).collect(),
            directory: volumes.directory_of(&volume.name),
            volume,
        })
        .collect())
}

fn list(context: &Context, volumes: &Volumes, quiet: bool, json: bool) -> Result<ExitCode> {
    let all = listed(context, volumes, volumes.list()?)?;
    if json {
        return print_json(&all);
    }
    if quiet {
        for listed in &all {
            print_line(&listed.volume.name)?;
        }
        return Ok(ExitCode::Success);
    }
    let mut rows = table::new(&["NAME", "SIZE", "USED", "CREATED", "MACHINES"]);
    for listed in &all {
        rows.add_row([
            listed.volume.name.clone(),
            listed.volume.size.to_string(),
            Size(listed.used_bytes).to_string(),
            table::ago(listed.volume.created_at),
            listed.machines.join(" "),
        ]);
    }
    print_line(&table::text(&rows))?;
    Ok(ExitCode::Success)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_size_is_the_one_that_is_shown() {
        assert_eq!(DEFAULT_SIZE.parse(), Ok(volume::DEFAULT_SIZE));
    }
}
