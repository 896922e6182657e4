//! `flyrun attach`.

use std::io::IsTerminal;

use clap::Args;
use protocol::ExitStatus;
use protocol::session::ToSession;

use super::{Context, lifecycle};
use crate::error::{Error, Result};
use crate::exit_code::ExitCode;
use crate::machine::{Action, Record, decide};
use crate::monitor::{Reply, Request};
use crate::session::{self, End, Link, Reattach, Wishes};
use crate::terminal;

/// Follow a machine's process: its output, and input and signals to it
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun attach web
  flyrun attach --no-stdin web | grep error

What was written before is in `flyrun logs`. While the machine is suspended this waits, and then goes on. Ctrl-P Ctrl-Q leaves
a machine with a terminal running. Input reaches the process if the machine was made with -i.

Exit codes: the process's own (128 + n when signal n ended it); 125 flyrun failed.")]
pub struct Arguments {
    /// Pass no input on
    #[arg(long)]
    no_stdin: bool,
    /// Name, id, or beginning of the id
    machine: String,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    let record = context.machines().find(&arguments.machine)?;
    attach(context, &record, !arguments.no_stdin)
}

/// Joins the user to a machine's process until it ends.
pub fn attach(context: &Context, record: &Record, stdin: bool) -> Result<ExitCode> {
    decide(record, Action::Attach)?;
    let (reply, stream) = lifecycle::converse(context, record, &Request::Attach)?;
    let (Reply::Attached { terminal }, Some(stream)) = (reply, stream) else {
        return Err(
            Error::new("the machine has ended meanwhile").advice("`flyrun logs` shows what it wrote.")
        );
    };
    let stdin = stdin && record.config.run.stdin;
    let link = Link::new(stream);
    let mut reattach = Reattach::new(&context.paths, context.machines(), record, &link);
    if terminal && std::io::stdin().is_terminal() {
        // Should it have gone meanwhile, that is seen when it is listened to.
        let _ = link.send(&ToSession::Resize(terminal::size()));
    }
    match session::drive(&link, Wishes { stdin, tty: terminal }, &mut reattach)? {
        End::Lost if reattach.has_waited() => Err(Error::new("the machine ended while it was suspended")
            .code(ExitCode::Workload(ExitStatus::Signal(9).code()))),
        // The monitor sends the end of the process before it closes.
        End::Lost => Err(Error::new("the machine's monitor has closed the connection")
            .advice("Output was read too slowly, or the monitor was killed; `flyrun logs` has it all.")),
        end => end.report(),
    }
}
