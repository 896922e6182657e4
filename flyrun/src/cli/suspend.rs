//! `flyrun suspend` and `flyrun resume`.

use clap::Args;

use super::{Context, each::each, lifecycle};
use crate::error::{Error, Result};
use crate::exit_code::ExitCode;
use crate::machine::{Action, Record, State, Verdict, decide};
use crate::monitor::{Reply, Request};

/// Bring machines to disk, with all they have in memory
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun suspend web
  flyrun resume web
  flyrun suspend --force web      although somebody is in it with exec

A suspended machine takes neither CPU nor memory of the host, only its disk. Its connections are ended, its published ports are
free. `flyrun resume` goes on where it was, with the right time and fresh randomness; `flyrun start` does the same, and
`flyrun stop` gives up what it had in memory. A machine with directories of the host cannot be suspended.")]
pub struct Suspend {
    /// Also when sessions (exec, cp) are open; they end
    #[arg(short, long)]
    force: bool,
    /// Names, ids, or beginnings of ids
    #[arg(required = true, value_name = "MACHINE")]
    machines: Vec<String>,
}

/// Let paused or suspended machines go on
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun resume web
  flyrun ps --filter status=suspended -q | xargs -r flyrun resume

A suspended machine whose snapshot cannot be used on this host, or any more, is booted instead; why is told, in `flyrun inspect`
too (last_start).")]
pub struct Resume {
    /// Names, ids, or beginnings of ids
    #[arg(required = true, value_name = "MACHINE")]
    machines: Vec<String>,
}

pub fn suspend(context: &Context, arguments: &Suspend) -> Result<ExitCode> {
    each(context, &arguments.machines, |context, record| {
        if decide(record, Action::Suspend)? == Verdict::Already {
            return Ok(());
        }
        let reply = lifecycle::ask(context, record, &Request::Suspend { force: arguments.force })?;
        let now = context.machines().find(&record.id)?.state;
        match (reply, now) {
            (Reply::Ended { .. }, state) if state != State::Suspended => {
                Err(Error::new(format!("it ended before it was on disk ({state})"))
                    .advice("`flyrun inspect` tells why."))
            }
            _ => Ok(()),
        }
    })
}

pub fn resume(context: &Context, arguments: &Resume) -> Result<ExitCode> {
    context.keep_house()?;
    each(context, &arguments.machines, resume_one)
}

fn resume_one(context: &Context, record: &Record) -> Result<()> {
    if decide(record, Action::Resume)? == Verdict::Already {
        return Ok(());
    }
    match record.state {
        State::Paused => lifecycle::ask(context, record, &Request::Resume).map(drop),
        _ => lifecycle::start(context, record),
    }
}
