//! `flyrun start`.

use clap::Args;

use super::{Context, each::each, lifecycle};
use crate::error::{Error, Result};
use crate::exit_code::ExitCode;
use crate::machine::{Action, Patience, Verdict, decide};
use crate::monitor::{self, Host, View};
use crate::paths::Library;

/// Start machines that have ended or were never started
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun start web db
  flyrun start -ai shell          in the foreground, with its streams

The machine's own disk is as it was when it ended. Exit code: 125 if one could not be started, 126 or 127 if its command
cannot be executed; with -a the process's own.")]
pub struct Arguments {
    /// Stay in the foreground with the machine's output and signals
    #[arg(short, long)]
    attach: bool,
    /// Stay in the foreground, and pass input on
    #[arg(short, long)]
    interactive: bool,
    /// Names, ids, or beginnings of ids
    #[arg(required = true, value_name = "MACHINE")]
    machines: Vec<String>,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    let result = start(context, arguments);
    context.keep_house()?;
    result
}

fn start(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    match arguments.machines.as_slice() {
        [name] if arguments.attach || arguments.interactive => {
            start_in_foreground(context, name, arguments.interactive)
        }
        _ if arguments.attach || arguments.interactive => {
            Err(Error::new("several machines cannot have the foreground")
                .advice("Name one, or leave -a and -i away."))
        }
        names => each(context, names, lifecycle::start),
    }
}

fn start_in_foreground(context: &Context, name: &str, input: bool) -> Result<ExitCode> {
    let record = context.machines().find(name)?;
    let runs = || Error::new(format!("{name} runs already")).advice("Follow it with `flyrun attach`.");
    if decide(&record, Action::Start)? == Verdict::Already {
        return Err(runs());
    }
    context.make_way(&record)?;
    let Some(machine) = context.machines().acquire(&record.id, Patience::Glance)? else {
        return Err(runs());
    };
    let (library, store) = (Library::find()?, context.store()?);
    let host = Host { paths: &context.paths, library: &library, store: &store };
    monitor::run(&host, machine, View::of_user(input), &mut || {})?.report()
}
