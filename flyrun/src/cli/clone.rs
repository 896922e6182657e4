//! `flyrun clone`.

use std::fs::{self, File};
use std::path::Path;
use std::time::SystemTime;

use clap::Args;

use super::{Context, lifecycle, new_machine, print_line};
use crate::error::{Context as _, Error, Result};
use crate::exit_code::ExitCode;
use crate::machine::{
    Action, DISK, Owned, Patience, Record, SNAPSHOT, SNAPSHOT_STATE, State, decide, new_id, now,
};
use crate::monitor::{self, Request};
use crate::usage::now_ms;

/// The most clones of one command.
const MAX_CLONES: u32 = 1000;

/// Start copies of a machine, each from where it is
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun clone web
  flyrun clone -n 20 --name worker python     worker-1 to worker-20

Each clone is a machine of its own: its id, name, address, randomness and disk. Their memory is one file on the host as far as none
has written to it. A machine that runs is suspended for the moment it takes, and its connections with it; one that is
suspended stays so. A clone's published ports are chosen by the host: `flyrun port` tells. A machine that writes to a volume
cannot be cloned.")]
pub struct Arguments {
    /// How many
    #[arg(short = 'n', long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=MAX_CLONES as i64))]
    number: u32,
    /// Name of the clone; of several, the beginning of their names [default: their ids]
    #[arg(long)]
    name: Option<String>,
    /// Leave the clones suspended
    #[arg(long)]
    suspended: bool,
    /// Name, id, or beginning of an id
    #[arg(value_name = "MACHINE")]
    machine: String,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    context.keep_house()?;
    let record = context.machines().find(&arguments.machine)?;
    check(&record)?;
    let names = names(arguments)?;
    let runs = record.state != State::Suspended;
    if runs {
        lifecycle::ask(context, &record, &Request::Suspend { force: false })?;
    }
    let source = context.machines().acquire(&record.id, Patience::Glance)?;
    let source = source.filter(|source| source.record().state == State::Suspended).ok_or_else(|| {
        Error::new(format!("{}: somebody else has resumed it", record.name)).advice("Try again.")
    })?;
    // All are made before the first goes on, as the machine's own snapshot ends with its next life.
    let clones = clone_all(context, &source, &names);
    drop(source);
    let mut code = ExitCode::Success;
    let mut tell = |id: &str, error: Error| {
        anstream::eprintln!("flyrun: {id}: {error}");
        code = error.exit_code();
    };
    if runs && let Err(error) = lifecycle::start(context, &context.machines().find(&record.id)?) {
        tell(&record.name, error);
    }
    for clone in clones? {
        let id = clone.record().id.clone();
        // One that does not go on is there all the same, suspended.
        if !arguments.suspended
            && let Err(error) = monitor::spawn(&context.paths, clone)
        {
            tell(&id, error);
        }
        print_line(&id)?;
    }
    Ok(code)
}

/// All of them, or none.
fn clone_all(context: &Context, source: &Owned, names: &[Option<String>]) -> Result<Vec<Owned>> {
    let mut clones = Vec::with_capacity(names.len());
    for name in names {
        match clone(context, source, name.as_deref()) {
            Ok(clone) => clones.push(clone),
            Err(error) => {
                clones.into_iter().try_for_each(Owned::remove)?;
                return Err(error);
            }
        }
    }
    Ok(clones)
}

fn check(record: &Record) -> Result<()> {
    if record.state != State::Suspended {
        decide(record, Action::Suspend)?;
    }
    match record.config.volumes.iter().find(|used| !used.read_only) {
        Some(used) => Err(Error::new(format!(
            "{} writes to volume '{}', which cannot be in two machines",
            record.name, used.name
        ))
        .advice("Keep what clones share read-only, and the rest on their own disks.")),
        None => Ok(()),
    }
}

/// The names that the clones are to have; `None` for their ids.
fn names(arguments: &Arguments) -> Result<Vec<Option<String>>> {
    let Some(name) = &arguments.name else { return Ok(vec![None; arguments.number as usize]) };
    let names: Vec<_> = match arguments.number {
        1 => vec![name.clone()],
        number => (1..=number).map(|index| format!("{name}-{index}")).collect(),
    };
    names.iter().try_for_each(|name| new_machine::check_name(name))?;
    Ok(names.into_iter().map(Some).collect())
}

/// Makes one clone of a suspended machine, suspended too.
fn clone(context: &Context, source: &Owned, name: Option<&str>) -> Result<Owned> {
    let id = new_id()?;
    let record = record_of(source.record(), &id, name);
    context.machines().create_filled(record, |directory| copy(source.directory(), directory))
}

fn record_of(source: &Record, id: &str, name: Option<&str>) -> Record {
    let mut record = source.clone();
    let called_by_id = record.config.run.hostname == source.id;
    record.id = id.to_string();
    record.name = name.unwrap_or(id).to_string();
    record.created_at = now();
    record.restarts = 0;
    record.outcome = None;
    record.last_start = None;
    if called_by_id {
        record.config.run.hostname = id.to_string();
        let old = format!("HOSTNAME={}", source.id);
        for entry in record.config.run.env.iter_mut().filter(|entry| **entry == old) {
            *entry = format!("HOSTNAME={id}");
        }
    }
    for published in &mut record.config.network.publish {
        published.host = 0;
    }
    if let Some(snapshot) = &mut record.snapshot {
        snapshot.taken_at_ms = now_ms();
        snapshot.network_number = None;
    }
    record
}

/// The disk is copied, by reference where the filesystem can; memory is linked.
fn copy(from: &Path, to: &Path) -> Result<()> {
    if from.join(DISK).exists() {
        copy_file(&from.join(DISK), &to.join(DISK))?;
    }
    let (from, to) = (from.join(SNAPSHOT), to.join(SNAPSHOT));
    crate::paths::make_private_dir(&to)?;
    // Neither is written as long as it has several links.
    for name in [vmm::snapshot::MEMORY, vmm::snapshot::BASE] {
        match fs::hard_link(from.join(name), to.join(name)) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            other => other.context(format!("cannot link {}", to.join(name).display()))?,
        }
    }
    copy_file(&from.join(SNAPSHOT_STATE), &to.join(SNAPSHOT_STATE))?;
    File::open(&to)
        .and_then(|directory| directory.sync_all())
        .context(format!("cannot sync {}", to.display()))
}

/// With its time, by which a snapshot knows its disks.
fn copy_file(from: &Path, to: &Path) -> Result<()> {
    images::copy_file(from, to).map_err(|error| crate::error::from_images(&error))?;
    let modified = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified());
    let keep = |time: SystemTime| {
        let file = File::options().write(true).open(to)?;
        file.set_modified(time)?;
        file.sync_all()
    };
    modified(from).and_then(keep).context(format!("cannot copy to {}", to.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Snapshot;

    #[test]
    fn a_clone_is_somebody_else() {
        let mut source = Record::example("web");
        source.config.run.hostname.clone_from(&source.id);
        source.config.network.publish = crate::network::publish::parse("8080:80").unwrap();
        source.snapshot = Some(Snapshot { taken_at_ms: 1, network_number: Some(7) });
        let clone = record_of(&source, "0123456789abcd", None);
        assert_eq!((clone.id.as_str(), clone.name.as_str()), ("0123456789abcd", "0123456789abcd"));
        assert_eq!(clone.config.run.hostname, clone.id);
        assert_eq!(clone.config.network.publish[0].host, 0);
        assert_eq!(clone.snapshot.unwrap().network_number, None);
        source.config.run.hostname = "chosen".into();
        assert_eq!(record_of(&source, "0123456789abcd", Some("two")).config.run.hostname, "chosen");
    }

    #[test]
    fn a_copy_keeps_content_and_time_and_memory_is_one_file() {
        use std::os::unix::fs::MetadataExt;
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("a"), directory.path().join("b"));
        fs::create_dir_all(from.join(SNAPSHOT)).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(from.join(DISK), "disk").unwrap();
        let old = SystemTime::UNIX_EPOCH + std::time::Duration::from_nanos(1_234_567_891_234_567_890);
        File::options().write(true).open(from.join(DISK)).unwrap().set_modified(old).unwrap();
        fs::write(from.join(SNAPSHOT).join("memory"), "memory").unwrap();
        fs::write(from.join(SNAPSHOT).join(SNAPSHOT_STATE), "state").unwrap();
        copy(&from, &to).unwrap();
        assert_eq!(fs::read(to.join(DISK)).unwrap(), b"disk");
        assert_eq!(fs::metadata(to.join(DISK)).unwrap().modified().unwrap(), old);
        assert_eq!(fs::metadata(to.join(SNAPSHOT).join("memory")).unwrap().nlink(), 2);
        assert_eq!(fs::metadata(to.join(SNAPSHOT).join(SNAPSHOT_STATE)).unwrap().nlink(), 1);
    }
}
