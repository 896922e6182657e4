//! `flyrun exec`: a command in a running machine, beside its workload.

use std::path::PathBuf;

use clap::Args;
use protocol::session::{ExecConfig, FromSession, Request};

use super::{Context, new_machine};
use crate::error::{Context as _, Error, Result};
use crate::exit_code::ExitCode;
use crate::launch::LaunchError;
use crate::session::{self, End, Rejoin, Wishes};
use crate::terminal;

/// Run a command in a running machine
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun exec web ps
  flyrun exec -it web sh
  flyrun exec -u www-data -w /srv -e DEBUG=1 web ./migrate
  flyrun exec -i db psql < dump.sql
  flyrun exec -d web logrotate /etc/logrotate.conf

MACHINE is a name, an id, or the beginning of an id. The command has the workload's environment, user and working
directory unless told otherwise. With -it, Ctrl-P Ctrl-Q leaves the command. While the machine is suspended this waits, and then
goes on where it was: what is typed meanwhile, and signals, reach the command then. Without its client a command goes on with its
streams closed, or is hung up on if it has a terminal; in a clone too, half a minute after the clone's start.

Exit codes: the command's own (128 + n when signal n ended it, 137 also when the machine ended); 125 flyrun failed, or the
machine could not be resumed and was booted; 126 the command cannot be executed, 127 it does not exist.")]
pub struct Arguments {
    /// Pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// Return when the command has started; its output is thrown away
    #[arg(short, long, conflicts_with_all = ["interactive", "tty"])]
    detach: bool,
    /// Set a variable, or pass one of your own on
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    env: Vec<String>,
    /// Read variables from a file, one on each line
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// Start in this directory, which must exist
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// Run as this user, by name or number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// The machine's name, id, or beginning of its id
    machine: String,
    /// Command and arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    check(arguments)?;
    let machine = session::find_running(&context.machines(), &arguments.machine)?;
    let mut config = config(arguments)?;
    let link = session::connect(&context.paths, &machine)?;
    if arguments.detach {
        link.request(&Request::Exec(Box::new(config)))?;
        return started(&link)?.report();
    }
    let mut rejoin = Rejoin::new(&context.paths, context.machines(), &machine, &link)?;
    config.ticket = Some(rejoin.ticket());
    link.request(&Request::Exec(Box::new(config)))?;
    session::drive(&link, Wishes { stdin: arguments.interactive, tty: arguments.tty }, &mut rejoin)?.report()
}

fn check(arguments: &Arguments) -> Result<()> {
    new_machine::check_terminal(arguments.interactive, arguments.tty)?;
    if let Some(workdir) = arguments.workdir.as_ref().filter(|path| !path.starts_with('/')) {
        return Err(Error::new(LaunchError::BadWorkingDir(workdir.clone()).to_string()));
    }
    Ok(())
}

fn config(arguments: &Arguments) -> Result<ExecConfig> {
    Ok(ExecConfig {
        argv: arguments.command.clone(),
        env: variables(arguments)?,
        user: arguments.user.clone(),
        workdir: arguments.workdir.clone(),
        tty: arguments.tty.then(terminal::size),
        stdin: arguments.interactive,
        detach: arguments.detach,
        ticket: None,
    })
}

/// One without a value is passed on if this process has it.
fn variables(arguments: &Arguments) -> Result<Vec<String>> {
    let wanted = new_machine::variables(&arguments.env_file, &arguments.env)?;
    let mut variables = Vec::new();
    for variable in wanted {
        match variable.split_once('=') {
            Some((key, _)) if !key.is_empty() => variables.push(variable),
            None if !variable.is_empty() => {
                variables.extend(std::env::var(&variable).ok().map(|value| format!("{variable}={value}")));
            }
            _ => return Err(Error::new(LaunchError::BadVariable(variable).to_string())),
        }
    }
    Ok(variables)
}

/// Waits until a detached command has started.
fn started(link: &session::Link) -> Result<End> {
    match link.frames().next().context("lost the machine")? {
        Some(FromSession::Started { .. }) => Ok(End::Detached),
        Some(FromSession::Failed { kind, message }) => Ok(End::Failed { kind, message }),
        Some(_) => Err(session::unasked()),
        None => Ok(End::Lost),
    }
}
