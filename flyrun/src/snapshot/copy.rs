//! Copies of a machine on disk: its memory by links, its own disk by reference where the filesystem can.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::time::SystemTime;

use vmm::snapshot::{BASE, MEMORY, WORKING_SET};

use crate::error::{Context, Error, Result};
use crate::machine::{DISK, Record, SNAPSHOT, SNAPSHOT_STATE, now};
use crate::usage::now_ms;

/// The record of another machine that goes on from where `source` was suspended.
pub fn offspring(source: &Record, id: &str, name: Option<&str>) -> Record {
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

/// Copies disk and snapshot from one directory to another. Of both there is nothing yet.
///
/// # Errors
/// The system's.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    copy_disk(from, to, &|| false)?;
    if to.join(DISK).exists() {
        sync(&to.join(DISK))?;
    }
    let (from, to) = (from.join(SNAPSHOT), to.join(SNAPSHOT));
    crate::paths::make_private_dir(&to)?;
    // Neither is written as long as it has several links.
    link(&from.join(MEMORY), &to.join(MEMORY))?;
    link(&from.join(BASE), &to.join(BASE))?;
    // Replaced, never written.
    link(&from.join(WORKING_SET), &to.join(WORKING_SET))?;
    // A machine that was killed while it wrote may have been in its guest's hands.
    if from.join(SNAPSHOT_STATE).symlink_metadata().is_ok_and(|found| !found.is_file()) {
        return Err(Error::new(format!("{} is no file", from.join(SNAPSHOT_STATE).display())));
    }
    copy_file(&from.join(SNAPSHOT_STATE), &to.join(SNAPSHOT_STATE), &|| false)?;
    sync(&to.join(SNAPSHOT_STATE))?;
    sync(&to)
}

/// Gives a snapshot of a machine that runs the file of memory which that was resumed from, if it was: then only what it has
/// written since is to be written.
///
/// # Errors
/// The system's.
pub fn link_base(machine: &Path, to: &Path) -> Result<()> {
    let (from, to) = (machine.join(SNAPSHOT), to.join(BASE));
    link(&from.join(BASE), &to)?;
    if to.exists() { Ok(()) } else { link(&from.join(MEMORY), &to) }
}

/// A file that is not there is not missed: which there are depends on the machine.
fn link(from: &Path, to: &Path) -> Result<()> {
    match fs::hard_link(from, to) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.context(format!("cannot link {}", to.display())),
    }
}

/// Copies a machine's own disk, if it has one; not synced.
///
/// # Errors
/// The system's, and that it was given up.
pub fn copy_disk(from: &Path, to: &Path, given_up: &dyn Fn() -> bool) -> Result<()> {
    if from.join(DISK).exists() { copy_file(&from.join(DISK), &to.join(DISK), given_up) } else { Ok(()) }
}

/// With its time, by which a snapshot knows its disks.
fn copy_file(from: &Path, to: &Path, given_up: &dyn Fn() -> bool) -> Result<()> {
    images::copy_file_unless(from, to, given_up).map_err(|error| crate::error::from_images(&error))?;
    let modified = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified());
    let keep = |time: SystemTime| File::options().write(true).open(to)?.set_modified(time);
    modified(from).and_then(keep).context(format!("cannot copy to {}", to.display()))
}

fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).context(format!("cannot sync {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::machine::Snapshot;

    #[test]
    fn an_offspring_is_somebody_else() {
        let mut source = Record::example("web");
        source.config.run.hostname.clone_from(&source.id);
        source.config.network.publish = crate::network::publish::parse("8080:80").unwrap();
        source.snapshot = Some(Snapshot { taken_at_ms: 1, network_number: Some(7) });
        let clone = offspring(&source, "0123456789abcd", None);
        assert_eq!((clone.id.as_str(), clone.name.as_str()), ("0123456789abcd", "0123456789abcd"));
        assert_eq!(clone.config.run.hostname, clone.id);
        assert_eq!(clone.config.network.publish[0].host, 0);
        assert_eq!(clone.snapshot.unwrap().network_number, None);
        source.config.run.hostname = "chosen".into();
        assert_eq!(offspring(&source, "0123456789abcd", Some("two")).config.run.hostname, "chosen");
    }

    fn machine() -> (tempfile::TempDir, std::path::PathBuf, std::path::PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("a"), directory.path().join("b"));
        fs::create_dir_all(from.join(SNAPSHOT)).unwrap();
        fs::create_dir(&to).unwrap();
        (directory, from, to)
    }

    #[test]
    fn a_copy_keeps_content_and_time_and_memory_is_one_file() {
        let (_directory, from, to) = machine();
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

    #[test]
    fn the_base_is_the_base_and_else_the_memory_and_else_there_is_none() {
        let (_directory, from, to) = machine();
        link_base(&from, &to).unwrap();
        assert!(!to.join(BASE).exists());
        fs::write(from.join(SNAPSHOT).join(MEMORY), "memory").unwrap();
        link_base(&from, &to).unwrap();
        assert_eq!(fs::read(to.join(BASE)).unwrap(), b"memory");
        fs::remove_file(to.join(BASE)).unwrap();
        fs::write(from.join(SNAPSHOT).join(BASE), "base").unwrap();
        link_base(&from, &to).unwrap();
        assert_eq!(fs::read(to.join(BASE)).unwrap(), b"base");
    }
}
