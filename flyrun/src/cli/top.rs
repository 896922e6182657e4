//! `flyrun top`: the processes of a running machine.

use clap::Args;
use protocol::session::{FromSession, ProcessInfo, Request};

use super::{Context, print_json, print_line, table};
use crate::error::{Error, Result};
use crate::exit_code::ExitCode;
use crate::session;

/// More processes than a machine can have.
const MAX_PROCESSES: usize = 1 << 20;

/// List the processes of a running machine
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun top web
  flyrun top --json web | jq '.[].command'

STARTED is in seconds since the machine's start, TIME the CPU time used. Process ids are the machine's own.

Exit codes: 0; 125 when there is no such machine or it does not run.")]
pub struct Arguments {
    /// Print all that is known as JSON
    #[arg(long)]
    json: bool,
    /// The machine's name, id, or beginning of its id
    machine: String,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    let machine = session::find_running(&context.machines(), &arguments.machine)?;
    let mut processes: Vec<ProcessInfo> = Vec::new();
    let mut is_whole = false;
    session::ask(&context.paths, &machine, &Request::Processes, |frame| match frame {
        FromSession::Processes(some) if processes.len() < MAX_PROCESSES => {
            is_whole = some.is_empty();
            processes.extend(some);
            Ok(())
        }
        _ => Err(session::unasked()),
    })?;
    if !is_whole {
        return Err(Error::new("the machine ended before it had told its processes"));
    }
    processes.sort_by_key(|process| process.pid);
    if arguments.json {
        return print_json(&processes);
    }
    let mut rows = table::new(&["UID", "PID", "PPID", "STARTED", "TIME", "COMMAND"]);
    for process in &processes {
        rows.add_row([
            process.uid.to_string(),
            process.pid.to_string(),
            process.ppid.to_string(),
            process.started.to_string(),
            time(process.cpu_ms),
            session::printable(&process.command),
        ]);
    }
    print_line(&table::text(&rows))?;
    Ok(ExitCode::Success)
}

/// Minutes, seconds and hundredths.
fn time(ms: u64) -> String {
    format!("{}:{:02}.{:02}", ms / 60_000, ms / 1000 % 60, ms / 10 % 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_shown_as_ps_does() {
        assert_eq!(time(0), "0:00.00");
        assert_eq!(time(3_723_450), "62:03.45");
    }
}
