//! The command line: what can be said, and who does it.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

mod app_logs;
mod attach;
mod background;
mod clone;
mod completions;
mod config;
pub mod cp;
mod create;
mod deploy;
mod doctor;
mod each;
mod exec;
mod files;
mod from_snapshot;
mod health;
mod images;
mod inspect;
mod kill;
pub mod lifecycle;
mod limits;
mod logs;
mod man;
mod monitor;
mod network;
pub mod new_machine;
mod pause;
mod port;
mod prune;
pub mod ps;
mod pull;
mod rename;
mod restart;
mod rm;
mod rmi;
mod run;
mod scale;
mod secrets;
mod serve;
mod share;
mod short;
mod snapshot;
mod start;
mod stats;
mod status;
mod stop;
mod suspend;
mod table;
mod top;
mod update;
mod usage;
mod version;
mod volume;
mod wait;

pub use background::Background;

use crate::error::{Context as _, Result};
use crate::exit_code::ExitCode;
use crate::machine::{Ended, Machines, Record};
use crate::network::Mode;
pub use new_machine::MIN_MEMORY_MIB;

use crate::paths::{Paths, make_private_dir};
use crate::snapshot::Snapshots;
use crate::usage::Ledger;
use crate::volume::Volumes;

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
  flyrun run -d --name web nginx         leave it running in the background
  flyrun logs -f web                     and see what it writes
  flyrun serve fly.toml                  apps whose machines start with the first request
  flyrun doctor                          can this host run machines?

Exit codes: the workload's own (128 + n when signal n ended it); 125 flyrun failed, 126 the command cannot be
executed, 127 it does not exist."
)]
pub struct Cli {
    #[command(flatten)]
    places: Places,

    #[command(subcommand)]
    command: Command,
}

/// Where everything is.
#[derive(Debug, clap::Args)]
struct Places {
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
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(Box<run::Arguments>),
    Create(Box<create::Arguments>),
    Start(start::Arguments),
    Stop(stop::Arguments),
    Restart(restart::Arguments),
    Kill(kill::Arguments),
    Pause(pause::Pause),
    Unpause(pause::Unpause),
    Suspend(suspend::Suspend),
    Resume(suspend::Resume),
    Clone(clone::Arguments),
    Snapshot(snapshot::Arguments),
    Rm(rm::Arguments),
    Wait(wait::Arguments),
    Ps(ps::Arguments),
    Inspect(inspect::Arguments),
    Rename(rename::Arguments),
    Update(update::Arguments),
    Logs(logs::Arguments),
    Volume(volume::Arguments),
    Exec(exec::Arguments),
    Attach(attach::Arguments),
    Cp(cp::Arguments),
    Top(top::Arguments),
    Port(port::Arguments),
    Stats(stats::Arguments),
    Usage(usage::Arguments),
    Pull(pull::Arguments),
    Images(images::Arguments),
    Rmi(rmi::Arguments),
    Prune(prune::Arguments),
    Serve(serve::Arguments),
    Status(status::Arguments),
    Deploy(deploy::Arguments),
    Scale(scale::Arguments),
    Config(config::Arguments),
    Secrets(secrets::Arguments),
    Doctor(doctor::Arguments),
    Version(version::Arguments),
    Completions(completions::Arguments),
    Man(man::Arguments),
}

impl Cli {
    /// Reads the command line.
    ///
    /// # Errors
    /// It is not understood, or asks for help.
    pub fn read() -> std::result::Result<Cli, clap::Error> {
        short::read().map_or_else(Cli::try_parse, Ok)
    }

    /// Does what the command line says.
    pub fn execute(self) -> Result<ExitCode> {
        let context = Context { paths: Paths { root: self.places.root, run: self.places.run_dir } };
        match self.command {
            Command::Run(arguments) => run::execute(&context, &arguments),
            Command::Create(arguments) => create::execute(&context, &arguments),
            Command::Start(arguments) => start::execute(&context, &arguments),
            Command::Stop(arguments) => stop::execute(&context, &arguments),
            Command::Restart(arguments) => restart::execute(&context, &arguments),
            Command::Kill(arguments) => kill::execute(&context, &arguments),
            Command::Pause(arguments) => pause::pause(&context, &arguments),
            Command::Unpause(arguments) => pause::unpause(&context, &arguments),
            Command::Suspend(arguments) => suspend::suspend(&context, &arguments),
            Command::Resume(arguments) => suspend::resume(&context, &arguments),
            Command::Clone(arguments) => clone::execute(&context, &arguments),
            Command::Snapshot(arguments) => snapshot::execute(&context, &arguments),
            Command::Rm(arguments) => rm::execute(&context, &arguments),
            Command::Wait(arguments) => wait::execute(&context, &arguments),
            Command::Ps(arguments) => ps::execute(&context, &arguments),
            Command::Inspect(arguments) => inspect::execute(&context, &arguments),
            Command::Update(arguments) => update::execute(&context, &arguments),
            Command::Rename(arguments) => rename::execute(&context, &arguments),
            Command::Logs(arguments) => logs::execute(&context, &arguments),
            Command::Volume(arguments) => volume::execute(&context, &arguments),
            Command::Exec(arguments) => exec::execute(&context, &arguments),
            Command::Attach(arguments) => attach::execute(&context, &arguments),
            Command::Cp(arguments) => cp::execute(&context, &arguments),
            Command::Top(arguments) => top::execute(&context, &arguments),
            Command::Usage(arguments) => usage::execute(&context, &arguments),
            Command::Port(arguments) => port::execute(&context, &arguments),
            Command::Stats(arguments) => stats::execute(&context, &arguments),
            Command::Pull(arguments) => pull::execute(&context, &arguments),
            Command::Images(arguments) => images::execute(&context, &arguments),
            Command::Rmi(arguments) => rmi::execute(&context, &arguments),
            Command::Prune(arguments) => prune::execute(&context, &arguments),
            Command::Serve(arguments) => serve::execute(context, &arguments),
            Command::Status(arguments) => status::execute(&context, &arguments),
            Command::Deploy(arguments) => deploy::execute(&context, &arguments),
            Command::Scale(arguments) => scale::execute(&context, &arguments),
            Command::Config(arguments) => config::execute(&arguments),
            Command::Secrets(arguments) => secrets::execute(&context, &arguments),
            Command::Doctor(arguments) => doctor::execute(&context, &arguments),
            Command::Version(arguments) => version::execute(&arguments),
            Command::Completions(arguments) => completions::execute(&arguments),
            Command::Man(arguments) => man::execute(&arguments),
        }
    }
}

/// What every command works on.
#[derive(Debug)]
pub struct Context {
    pub paths: Paths,
}

impl Context {
    pub fn store(&self) -> Result<::images::Store> {
        make_private_dir(&self.paths.root)?;
        Ok(::images::Store::open(&self.paths.root))
    }

    /// Takes away what those left who were killed: machines that were to go, sockets, interfaces and rules.
    pub fn keep_house(&self) -> Result<()> {
        self.machines().remove_ended(Ended::Leftovers)?;
        self.snapshots().sweep()?;
        self.paths.sweep_run_dirs();
        let is_owned = |id: &str| self.machines().is_owned(id);
        crate::cgroup::sweep(&self.paths, &is_owned);
        Ledger::new(self.paths.usage())
            .settle(&is_owned)
            .context("cannot write down what machines have used")?;
        crate::network::sweep(&self.paths, &is_owned)?;
        self.sweep_rules()
    }

    /// Takes away the host's rules, if no machine is left that they wait for.
    pub fn sweep_rules(&self) -> Result<()> {
        crate::network::sweep_rules(|| {
            self.machines().list().is_ok_and(|all| all.iter().any(Record::comes_back))
        })
    }

    /// Of this, only what a machine that is started may need itself: its addresses, and ports of the host. The rest can wait
    /// until nobody does. To be called before the machine is locked, which itself may be the one that was killed.
    pub fn make_way(&self, record: &Record) -> Result<()> {
        if record.config.network.mode == Mode::None {
            return Ok(());
        }
        crate::network::sweep(&self.paths, &|id| self.machines().is_owned(id))
    }

    pub fn volumes(&self) -> Volumes {
        Volumes::new(self.paths.volumes())
    }

    pub fn snapshots(&self) -> Snapshots {
        Snapshots::new(self.paths.snapshots())
    }

    pub fn machines(&self) -> Machines {
        Machines::new(self.paths.machines())
    }
}

/// Prints for a script.
fn print_json(value: &impl serde::Serialize) -> Result<ExitCode> {
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
