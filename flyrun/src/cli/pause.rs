//! `flyrun pause` and `flyrun unpause`.

use clap::Args;

use super::{Context, each::each, lifecycle};
use crate::error::Result;
use crate::exit_code::ExitCode;
use crate::machine::{Action, Record, Verdict, decide};
use crate::monitor::Request;

/// Let machines stand still, with all they have in memory
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun pause web
  flyrun ps --filter status=paused -q | xargs -r flyrun unpause

A paused machine takes no CPU, keeps its memory, and answers nobody. `flyrun unpause` lets it run on; the time that went by
is told to its kernel, so that no watchdog complains. `flyrun stop` and `flyrun rm -f` let it run on too, to its end.")]
pub struct Pause {
    /// Names, ids, or beginnings of ids
    #[arg(required = true, value_name = "MACHINE")]
    machines: Vec<String>,
}

/// Let paused machines run on
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun unpause web")]
pub struct Unpause {
    /// Names, ids, or beginnings of ids
    #[arg(required = true, value_name = "MACHINE")]
    machines: Vec<String>,
}

pub fn pause(context: &Context, arguments: &Pause) -> Result<ExitCode> {
    each(context, &arguments.machines, |context, record| ask(context, record, Action::Pause, &Request::Pause))
}

pub fn unpause(context: &Context, arguments: &Unpause) -> Result<ExitCode> {
    each(context, &arguments.machines, |context, record| {
        ask(context, record, Action::Unpause, &Request::Unpause)
    })
}

fn ask(context: &Context, record: &Record, action: Action, request: &Request) -> Result<()> {
    if decide(record, action)? == Verdict::Already {
        return Ok(());
    }
    lifecycle::ask(context, record, request).map(drop)
}
