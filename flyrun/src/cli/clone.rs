//! `flyrun clone`.

use clap::Args;

use super::{Context, lifecycle, new_machine, print_line};
use crate::error::{Error, Result};
use crate::exit_code::ExitCode;
use crate::machine::{Action, Owned, Patience, Record, State, decide, new_id};
use crate::monitor::{self, Request};
use crate::snapshot;

/// The most clones of one command.
const MAX_CLONES: u32 = 1000;

/// Start copies of a machine, each from where it is
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun clone web
  flyrun clone -n 20 --name worker python     worker-1 to worker-20

Each clone is a machine of its own: its id, name, address, randomness and disk. Their memory is one file on the host as far as none
has written to it. A machine that runs is suspended for the moment it takes, and its connections with it; one that is
suspended stays so. A clone's published ports are chosen by the host: `flyrun port` tells. A machine that writes to a volume
cannot be cloned.")]
pub struct Arguments {
    /// How many
    #[arg(short = 'n', long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=MAX_CLONES as i64))]
    number: u32,
    /// Name of the clone; of several, the beginning of their names [default: their ids]
    #[arg(long)]
    name: Option<String>,
    /// Leave the clones suspended
    #[arg(long)]
    suspended: bool,
    /// Name, id, or beginning of an id
    #[arg(value_name = "MACHINE")]
    machine: String,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    context.keep_house()?;
    let record = context.machines().find(&arguments.machine)?;
    check(&record)?;
    let names = names(arguments)?;
    let runs = record.state != State::Suspended;
    if runs {
        lifecycle::ask(context, &record, &Request::Suspend { force: false })?;
    }
    let source = context.machines().acquire(&record.id, Patience::Glance)?;
    let source = source.filter(|source| source.record().state == State::Suspended).ok_or_else(|| {
        Error::new(format!("{}: somebody else has resumed it", record.name)).advice("Try again.")
    })?;
    // All are made before the first goes on, as the machine's own snapshot ends with its next life.
    let clones = clone_all(context, &source, &names);
    drop(source);
    let mut code = ExitCode::Success;
    let mut tell = |id: &str, error: Error| {
        anstream::eprintln!("flyrun: {id}: {error}");
        code = error.exit_code();
    };
    if runs && let Err(error) = lifecycle::start(context, &context.machines().find(&record.id)?) {
        tell(&record.name, error);
    }
    for clone in clones? {
        let id = clone.record().id.clone();
        // One that does not go on is there all the same, suspended.
        if !arguments.suspended
            && let Err(error) = monitor::spawn(&context.paths, clone)
        {
            tell(&id, error);
        }
        print_line(&id)?;
    }
    Ok(code)
}

/// All of them, or none.
fn clone_all(context: &Context, source: &Owned, names: &[Option<String>]) -> Result<Vec<Owned>> {
    let mut clones = Vec::with_capacity(names.len());
    for name in names {
        match clone(context, source, name.as_deref()) {
            Ok(clone) => clones.push(clone),
            Err(error) => {
                clones.into_iter().try_for_each(Owned::remove)?;
                return Err(error);
            }
        }
    }
    Ok(clones)
}

fn check(record: &Record) -> Result<()> {
    if record.state != State::Suspended {
        decide(record, Action::Suspend)?;
    }
    snapshot::check(record)
}

/// The names that the clones are to have; `None` for their ids.
fn names(arguments: &Arguments) -> Result<Vec<Option<String>>> {
    let Some(name) = &arguments.name else { return Ok(vec![None; arguments.number as usize]) };
    let names: Vec<_> = match arguments.number {
        1 => vec![name.clone()],
        number => (1..=number).map(|index| format!("{name}-{index}")).collect(),
    };
    names.iter().try_for_each(|name| new_machine::check_name(name))?;
    Ok(names.into_iter().map(Some).collect())
}

/// Makes one clone of a suspended machine, suspended too.
fn clone(context: &Context, source: &Owned, name: Option<&str>) -> Result<Owned> {
    let id = new_id()?;
    let record = snapshot::offspring(source.record(), &id, name);
    context.machines().create_filled(record, |directory| snapshot::copy(source.directory(), directory))
}
