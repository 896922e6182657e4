//! The command line: what can be said, and who does it.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

mod completions;
mod doctor;
mod images;
mod man;
mod network;
mod prune;
mod pull;
mod rmi;
mod run;
mod table;
mod version;

use crate::error::Result;
use crate::exit_code::ExitCode;
use crate::machine::Machines;
use crate::paths::{Paths, make_private_dir};

/// Boots any OCI image as a KVM microVM.
#[derive(Debug, Parser)]
#[command(
    name = "flyrun",
    version,
    propagate_version = true,
    disable_help_subcommand = true,
    after_help = "Examples:
  flyrun run --rm alpine echo hello      run a command in a new machine
  flyrun run -it debian                  a shell in a machine of its own
  flyrun doctor                          can this host run machines?

Exit codes: the workload's own (128 + n when signal n ended it); 125 flyrun failed, 126 the command cannot be
executed, 127 it does not exist."
)]
pub struct Cli {
    /// Where images and machines are kept
    #[arg(long, global = true, value_name = "DIR", env = "FLYRUN_ROOT", default_value = "/var/lib/flyrun")]
    root: PathBuf,

    /// Where sockets of running machines are
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "FLYRUN_RUN",
        default_value = "/run/flyrun",
        hide = true
    )]
    run_dir: PathBuf,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(Box<run::Arguments>),
    Pull(pull::Arguments),
    Images(images::Arguments),
    Rmi(rmi::Arguments),
    Prune(prune::Arguments),
    Doctor(doctor::Arguments),
    Version(version::Arguments),
    Completions(completions::Arguments),
    Man(man::Arguments),
}

impl Cli {
    /// Does what the command line says.
    pub fn execute(self) -> Result<ExitCode> {
        let context = Context { paths: Paths { root: self.root, run: self.run_dir } };
        match self.command {
            Command::Run(arguments) => run::execute(&context, &arguments),
            Command::Pull(arguments) => pull::execute(&context, &arguments),
            Command::Images(arguments) => images::execute(&context, &arguments),
            Command::Rmi(arguments) => rmi::execute(&context, &arguments),
            Command::Prune(arguments) => prune::execute(&context, &arguments),
            Command::Doctor(arguments) => doctor::execute(&context, &arguments),
            Command::Version(arguments) => version::execute(&arguments),
            Command::Completions(arguments) => completions::execute(&arguments),
            Command::Man(arguments) => man::execute(&arguments),
        }
    }
}

/// What every command works on.
#[derive(Debug)]
struct Context {
    paths: Paths,
}

impl Context {
    fn store(&self) -> Result<::images::Store> {
        make_private_dir(&self.paths.root)?;
        Ok(::images::Store::open(&self.paths.root))
    }

    fn machines(&self) -> Machines {
        Machines::new(self.paths.machines())
    }
}

/// Prints for a script.
fn print_json(value: &impl serde::Serialize) -> Result<ExitCode> {
    use crate::error::Context as _;
    let text = serde_json::to_string_pretty(value).context("cannot write JSON")?;
    print_line(&text)?;
    Ok(ExitCode::Success)
}

/// Prints a line; a reader that has left, as `head` does, is no failure.
fn print_line(text: &str) -> Result<()> {
    use std::io::Write;
    match writeln!(std::io::stdout().lock(), "{text}") {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(crate::error::Error::caused("cannot write to standard output", &error))
        }
        _ => Ok(()),
    }
}
