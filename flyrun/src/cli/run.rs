//! `flyrun run`: from an image's name to the exit code of its process.

use clap::Args;

use super::new_machine::{self, Flags, Made};
use super::{Context, print_line};
use crate::error::Result;
use crate::exit_code::ExitCode;
use crate::machine::State;
use crate::monitor::{self, Host, View};
use crate::trace;

/// Run an image's process in a new machine
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun run --rm alpine echo hello
  flyrun run -it debian bash
  echo hi | flyrun run --rm -i busybox cat
  flyrun run --rm --memory 1g --cpus 2 -e POSTGRES_PASSWORD=x postgres
  flyrun run --rm oci-archive:app.tar
  flyrun run -d --name web --restart always nginx
  flyrun run -d --name two --from-snapshot warm

IMAGE is a name (alpine, ghcr.io/a/b:1, localhost:5000/x), docker://NAME, oci:DIR[:TAG], oci-archive:FILE[:TAG],
docker-archive:FILE[:TAG], docker-daemon:NAME, or the path of such a directory or file.")]
pub struct Arguments {
    /// Leave the machine running in the background, and print its id
    #[arg(short, long, conflicts_with = "init_log")]
    detach: bool,
    /// Show guest-init's steps and the kernel's console on standard error
    #[arg(long)]
    init_log: bool,
    #[command(flatten)]
    flags: Flags,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    if !arguments.detach {
        new_machine::check_terminal(arguments.flags.interactive, arguments.flags.tty)?;
    }
    let made = new_machine::make(context, &arguments.flags, State::Starting)?;
    let id = made.machine.record().id.clone();
    let result = if arguments.detach { detach(context, made) } else { follow(context, arguments, made) };
    if result.is_err() && arguments.flags.from_snapshot.is_some() {
        super::from_snapshot::undo(context, &id);
    }
    // The slow part of keeping house is done when nobody waits for it any more.
    context.keep_house()?;
    result
}

fn detach(context: &Context, made: Made) -> Result<ExitCode> {
    let id = made.machine.record().id.clone();
    drop(monitor::spawn(&context.paths, made.machine)?);
    print_line(&id)?;
    Ok(ExitCode::Success)
}

fn follow(context: &Context, arguments: &Arguments, made: Made) -> Result<ExitCode> {
    let view = View { show_console: arguments.init_log, ..View::of_user(true) };
    trace::step("machine made");
    let host = Host { paths: &context.paths, library: &made.library, store: &made.store };
    monitor::run(&host, made.machine, view, &mut || {})?.report()
}
