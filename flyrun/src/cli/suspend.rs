//! `flyrun suspend` and `flyrun resume`.

use clap::Args;

use super::{Context, each::each, lifecycle};
use crate::error::Result;
use crate::exit_code::ExitCode;
use crate::machine::{Action, Record, State, Verdict, decide};
use crate::monitor::Request;
use crate::trace;

/// Bring machines to disk, with all they have in memory
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun suspend web
  flyrun resume web
  flyrun suspend --force web      although somebody copies with cp

A suspended machine takes neither CPU nor memory of the host, only its disk. Its network connections end (their other ends are
reset; the machine hears of it when it goes on), its published ports are free. Whoever is in it with exec or attach waits, and
goes on with it. `flyrun resume` goes on where it was, with the right time and fresh randomness; `flyrun start` does the same,
and `flyrun stop` gives up what it had in memory. A machine with directories of the host cannot be suspended.")]
pub struct Suspend {
    /// Also when copies (cp, top, stats) do not end within 5 seconds; they are cut off then
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

Standard error tells of each whether it was `resumed`, or a `cold_boot` was done instead and why: where its snapshot cannot
be used on this host, or any more. `flyrun inspect` tells the same (last_start). If a suspend is under way, it is given up.")]
pub struct Resume {
    /// Names, ids, or beginnings of ids
    #[arg(required = true, value_name = "MACHINE")]
    machines: Vec<String>,
}

pub fn suspend(context: &Context, arguments: &Suspend) -> Result<ExitCode> {
    each(context, &arguments.machines, |context, record| lifecycle::suspend(context, record, arguments.force))
}

pub fn resume(context: &Context, arguments: &Resume) -> Result<ExitCode> {
    let code = each(context, &arguments.machines, resume_one)?;
    context.keep_house()?;
    Ok(code)
}

fn resume_one(context: &Context, record: &Record) -> Result<()> {
    trace::step("machine found");
    if decide(record, Action::Resume)? == Verdict::Already {
        return Ok(());
    }
    if record.state == State::Paused {
        return lifecycle::ask(context, record, &Request::Resume).map(drop);
    }
    lifecycle::start(context, record)?;
    // Where it stood still only for a moment, or has ended since, there is nothing to tell.
    if let Ok(Record { last_start: Some(how), state: State::Started, .. }) =
        context.machines().find(&record.id)
        && record.state == State::Suspended
    {
        anstream::eprintln!("flyrun: {}: {how}", record.name);
    }
    Ok(())
}
