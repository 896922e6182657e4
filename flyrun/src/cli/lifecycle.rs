//! What several commands do to a machine: starting it in the background, stopping it, removing it.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::Context;
use crate::error::{Error, Result};
use crate::machine::{Action, Outcome, Owned, Patience, Record, State, Verdict, decide, now};
use crate::monitor::suspend::discard;
use crate::monitor::{self, KILLED, Reply, Request};
use crate::usage::Ledger;

/// How long a monitor that owns its machine may take to answer: it is just starting, or just ending.
const MONITOR_PATIENCE: Duration = Duration::from_secs(10);
const MONITOR_POLL: Duration = Duration::from_millis(10);

/// Starts a machine, unless it runs. One that was suspended goes on where it was.
pub fn start(context: &Context, record: &Record) -> Result<()> {
    if decide(record, Action::Start)? == Verdict::Already {
        return Ok(());
    }
    if record.state == State::Suspending {
        ask(context, record, &Request::Resume)?;
        // It may have been on disk already.
        let now = context.machines().find(&record.id)?;
        return if now.state == State::Suspended { start(context, &now) } else { Ok(()) };
    }
    context.make_way(record)?;
    let Some(machine) = context.machines().acquire(&record.id, Patience::Glance)? else {
        // Somebody else has started it in this moment.
        return Ok(());
    };
    if decide(machine.record(), Action::Start)? == Verdict::Already {
        return Ok(());
    }
    monitor::spawn(&context.paths, machine).map(drop)
}

/// Brings a machine to disk and returns when it is there. `force` cuts off copies that do not end in time.
///
/// # Errors
/// It runs on, or has ended.
pub fn suspend(context: &Context, record: &Record, force: bool) -> Result<()> {
    if decide(record, Action::Suspend)? == Verdict::Already {
        return Ok(());
    }
    let reply = ask(context, record, &Request::Suspend { force })?;
    match (reply, context.machines().find(&record.id)?.state) {
        (Reply::Ended { .. }, state) if state != State::Suspended => {
            Err(Error::new(format!("it ended before it was on disk ({state})"))
                .advice("`flyrun inspect` tells why."))
        }
        _ => Ok(()),
    }
}

/// Stops a machine and returns when it has ended.
pub fn stop(context: &Context, record: &Record, timeout_s: Option<u32>) -> Result<()> {
    if decide(record, Action::Stop)? == Verdict::Already {
        return Ok(());
    }
    if record.state == State::Suspended && give_up_snapshot(context, record)? {
        return Ok(());
    }
    ask(context, record, &Request::Stop { timeout_s }).map(drop)
}

/// Gives up what a suspended machine has in memory. `false` if somebody has resumed it meanwhile.
fn give_up_snapshot(context: &Context, record: &Record) -> Result<bool> {
    let Some(mut machine) = context.machines().acquire(&record.id, Patience::Glance)? else {
        return Ok(false);
    };
    if machine.record().state != State::Suspended {
        return Ok(!machine.record().state.needs_monitor());
    }
    Ledger::new(context.paths.usage()).end_suspension(machine.record());
    let outcome = Outcome { exit_code: KILLED, oom_killed: false, error: None, finished_at: now() };
    machine.become_state(State::Stopped, |record| {
        record.snapshot = None;
        record.outcome = Some(outcome);
    })?;
    discard(machine.directory())?;
    if machine.record().config.auto_remove { machine.remove().map(|()| true) } else { Ok(true) }
}

/// Removes a machine; one that runs only by force.
pub fn remove(context: &Context, record: &Record, force: bool) -> Result<()> {
    decide(record, if force { Action::RemoveByForce } else { Action::Remove })?;
    let id = &record.id;
    if record.state.needs_monitor() {
        // Whether it ended by this or by itself is all the same.
        let _ = ask(context, record, &Request::Stop { timeout_s: Some(0) });
    }
    if context.machines().find(id).is_err() {
        return Ok(());
    }
    match context.machines().acquire(id, Patience::Wait)? {
        Some(machine) => remove_owned(context, machine, force),
        None => Err(Error::new("its monitor does not let go of it")
            .advice("Try again, or end the process: `flyrun inspect` tells its id.")),
    }
}

fn remove_owned(context: &Context, machine: Owned, force: bool) -> Result<()> {
    if machine.record().state == State::Suspended {
        Ledger::new(context.paths.usage()).end_suspension(machine.record());
    }
    decide(machine.record(), if force { Action::RemoveByForce } else { Action::Remove })?;
    machine.remove()
}

/// Asks the monitor of a machine that runs. If it ends meanwhile, what was asked for is moot: then its end is the answer.
///
/// # Errors
/// The monitor refuses or does not answer.
pub fn ask(context: &Context, record: &Record, request: &Request) -> Result<Reply> {
    converse(context, record, request).map(|(reply, _)| reply)
}

/// As [`ask`], with the connection for what follows the answer.
pub fn converse(
    context: &Context,
    record: &Record,
    request: &Request,
) -> Result<(Reply, Option<UnixStream>)> {
    let run_dir = context.paths.run_dir(&record.id);
    let deadline = Instant::now() + MONITOR_PATIENCE;
    loop {
        let error = match monitor::ask(&run_dir, request) {
            Ok((Reply::Failed { message }, _)) => return Err(Error::new(message)),
            Ok((reply, stream)) => return Ok((reply, Some(stream))),
            Err(error) => error,
        };
        let ended = |exit_code| Ok((Reply::Ended { exit_code }, None));
        let Ok(now) = context.machines().find(&record.id) else {
            return ended(0);
        };
        if !now.state.needs_monitor() {
            return ended(now.outcome.map_or(0, |outcome| outcome.exit_code));
        }
        if Instant::now() >= deadline {
            return Err(error);
        }
        std::thread::sleep(MONITOR_POLL);
    }
}
