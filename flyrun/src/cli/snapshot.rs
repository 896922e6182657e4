//! `flyrun snapshot`.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::Serialize;
use vmm::snapshot::header::Header;

use super::{Context, lifecycle, print_json, print_line, table};
use crate::error::{Error, Result};
use crate::exit_code::ExitCode;
use crate::machine::{self, Action, DISK, Patience, SNAPSHOT, State, decide, new_id};
use crate::monitor::{Reply, Request};
use crate::size::Size;
use crate::snapshot::{self, Record};

mod transfer;

/// Manage snapshots: machines as they were, from which others go on
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun snapshot create --name warm web            web runs on
  flyrun run -d --name two --from-snapshot warm     another goes on from there
  flyrun snapshot ls
  flyrun snapshot export warm -o warm.snapshot
  flyrun snapshot import --name warm warm.snapshot  on another host with such a CPU
  flyrun snapshot rm warm

A snapshot has all that the machine has in memory and on its own disk. It outlives the machine, and keeps the image's root
filesystem. Each machine that goes on from it has its own id, name, address, randomness and disk; their memory is one file on
the host as far as none has written to it.")]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Take a snapshot of a machine, which runs on, or is suspended and stays so
    #[command(after_help = "Examples:
  flyrun snapshot create --name warm web
  flyrun run --from-snapshot warm

A machine that runs stands still while its memory is written and its disk copied. A machine that writes to a volume, or has
directories of the host, cannot be in a snapshot.")]
    Create {
        /// A name to speak of the snapshot by [default: its id]
        #[arg(long)]
        name: Option<String>,
        /// Also when copies (cp, top, stats) do not end within 5 seconds; they are cut off then
        #[arg(short, long)]
        force: bool,
        /// Name, id, or beginning of the id
        machine: String,
    },
    /// List snapshots
    Ls {
        /// Print ids only
        #[arg(short, long)]
        quiet: bool,
        /// Print as JSON
        #[arg(long, conflicts_with = "quiet")]
        json: bool,
    },
    /// Print all that is known of snapshots, as JSON
    Inspect {
        /// Names, ids, or beginnings of ids
        #[arg(required = true, value_name = "SNAPSHOT")]
        snapshots: Vec<String>,
    },
    /// Remove snapshots; machines that were made from them go on
    Rm {
        /// Names, ids, or beginnings of ids
        #[arg(required = true, value_name = "SNAPSHOT")]
        snapshots: Vec<String>,
    },
    Export(transfer::Export),
    Import(transfer::Import),
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    match &arguments.command {
        Command::Create { name, force, machine } => create(context, machine, name.as_deref(), *force),
        Command::Ls { quiet, json } => list(context, *quiet, *json),
        Command::Inspect { snapshots } => inspect(context, snapshots),
        Command::Rm { snapshots } => remove(context, snapshots),
        Command::Export(arguments) => transfer::export(context, arguments),
        Command::Import(arguments) => transfer::import(context, arguments),
    }
}

fn create(context: &Context, machine: &str, name: Option<&str>, force: bool) -> Result<ExitCode> {
    context.keep_house()?;
    let machine = context.machines().find(machine)?;
    if let Some(name) = name {
        context.snapshots().check_name(name)?;
    }
    let id = new_id()?;
    if machine.state == State::Suspended {
        keep(context, &machine, &id, name)?;
    } else {
        decide(&machine, Action::Suspend)?;
        snapshot::check(&machine)?;
        let request = Request::Snapshot { id: id.clone(), name: name.map(str::to_string), force };
        if let Reply::Ended { .. } = lifecycle::ask(context, &machine, &request)? {
            return Err(Error::new(format!("{} ended before its snapshot was whole", machine.name))
                .advice("`flyrun inspect` tells why."));
        }
    }
    print_line(&id)?;
    Ok(ExitCode::Success)
}

/// Keeps what a suspended machine has on disk.
fn keep(context: &Context, machine: &machine::Record, id: &str, name: Option<&str>) -> Result<()> {
    let owned = context.machines().acquire(&machine.id, Patience::Glance)?;
    let owned = owned.filter(|owned| owned.record().state == State::Suspended).ok_or_else(|| {
        Error::new(format!("{}: somebody else has resumed it", machine.name)).advice("Try again.")
    })?;
    snapshot::check(owned.record())?;
    let draft = context.snapshots().begin(id)?;
    snapshot::copy(owned.directory(), draft.path())?;
    draft.publish(&Record::of(owned.record(), id, name))
}

fn remove(context: &Context, names: &[String]) -> Result<ExitCode> {
    let snapshots = context.snapshots();
    let mut code = ExitCode::Success;
    for name in names {
        match snapshots.find(name).and_then(|record| snapshots.remove(&record.id)) {
            Ok(()) => print_line(name)?,
            Err(error) => {
                anstream::eprintln!("flyrun: {error}");
                code = error.exit_code();
            }
        }
    }
    Ok(code)
}

/// The fields of `--json`; their names are stable.
#[derive(Serialize)]
struct Listed {
    id: String,
    name: String,
    taken_at_ms: u64,
    machine: Origin,
    image: String,
    /// The root filesystem.
    chain_id: String,
    cpus: u8,
    memory: Size,
    /// The size of the machine's own disk.
    disk: Option<Size>,
    /// What its files take up on the host. Machines and snapshots may share them.
    bytes_on_disk: u64,
}

#[derive(Serialize)]
struct Origin {
    id: String,
    name: String,
}

impl Listed {
    fn new(context: &Context, record: &Record) -> Listed {
        let files = files(&context.snapshots().directory_of(&record.id));
        let machine = &record.machine;
        Listed {
            id: record.id.clone(),
            name: record.name.clone(),
            taken_at_ms: record.taken_at_ms,
            machine: Origin { id: machine.id.clone(), name: machine.name.clone() },
            image: machine.image.clone(),
            chain_id: machine.chain_id.clone(),
            cpus: machine.config.cpus,
            memory: machine.config.memory,
            disk: machine.config.disk,
            bytes_on_disk: files.iter().map(|file| file.bytes_on_disk).sum(),
        }
    }
}

fn list(context: &Context, quiet: bool, json: bool) -> Result<ExitCode> {
    let records = context.snapshots().list()?;
    let all: Vec<_> = records.iter().map(|record| Listed::new(context, record)).collect();
    if json {
        return print_json(&all);
    }
    if quiet {
        all.iter().try_for_each(|listed| print_line(&listed.id))?;
        return Ok(ExitCode::Success);
    }
    let mut rows = table::new(&["ID", "MACHINE", "IMAGE", "TAKEN", "MEMORY", "ON DISK", "NAME"]);
    for listed in &all {
        rows.add_row([
            listed.id.clone(),
            listed.machine.name.clone(),
            listed.image.clone(),
            table::ago(listed.taken_at_ms / 1000),
            listed.memory.to_string(),
            Size(listed.bytes_on_disk).to_string(),
            listed.name.clone(),
        ]);
    }
    print_line(&table::text(&rows))?;
    Ok(ExitCode::Success)
}

/// The fields of `inspect`; their names are stable.
#[derive(Serialize)]
struct Inspected {
    #[serde(flatten)]
    listed: Listed,
    directory: PathBuf,
    files: Vec<FileFacts>,
    /// What the VMM wrote of the machine: the CPU that it saw, its kernel, its disks; or why that cannot be read.
    #[serde(flatten)]
    header: HeaderFacts,
    config: machine::Config,
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum HeaderFacts {
    Header(Box<Header>),
    Damage(String),
}

#[derive(Serialize)]
struct FileFacts {
    name: &'static str,
    bytes: u64,
    bytes_on_disk: u64,
    /// How many machines and snapshots have it.
    links: u64,
}

fn files(directory: &Path) -> Vec<FileFacts> {
    use std::os::unix::fs::MetadataExt;
    let snapshot = directory.join(SNAPSHOT);
    let places = [
        (vmm::snapshot::STATE, &snapshot),
        (vmm::snapshot::MEMORY, &snapshot),
        (vmm::snapshot::BASE, &snapshot),
        (DISK, &directory.to_path_buf()),
    ];
    let facts = places.into_iter().filter_map(|(name, directory)| {
        let found = directory.join(name).metadata().ok()?;
        let bytes_on_disk = found.blocks().saturating_mul(512);
        Some(FileFacts { name, bytes: found.len(), bytes_on_disk, links: found.nlink() })
    });
    facts.collect()
}

fn inspect(context: &Context, names: &[String]) -> Result<ExitCode> {
    let snapshots = context.snapshots();
    let records = names.iter().map(|name| snapshots.find(name)).collect::<Result<Vec<_>>>()?;
    let inspected: Vec<_> = records
        .into_iter()
        .map(|record| {
            let directory = snapshots.directory_of(&record.id);
            Inspected {
                listed: Listed::new(context, &record),
                files: files(&directory),
                header: match snapshot::header(&directory.join(SNAPSHOT)) {
                    Ok(header) => HeaderFacts::Header(Box::new(header)),
                    Err(error) => HeaderFacts::Damage(error.to_string()),
                },
                directory,
                config: record.machine.config,
            }
        })
        .collect();
    print_json(&inspected)
}
