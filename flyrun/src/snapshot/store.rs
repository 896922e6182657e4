//! The directory of snapshots: making one, finding the others, removing one.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::record::{Record, VERSION};
use crate::error::{Context, Error, Result};
use crate::files::{self, Lasting};
use crate::machine::{self, SNAPSHOT, is_name};
use crate::paths::{is_same_file, make_private_dir};

const RECORD: &str = "snapshot.json";
/// Directories of snapshots that are not there yet, or no more. No snapshot can be called so.
const NEW: &str = ".new-";
const OLD: &str = ".old-";

/// All snapshots of one store.
#[derive(Clone, Debug)]
pub struct Snapshots {
    directory: PathBuf,
}

/// A snapshot that is being made. Dropped without [`Draft::publish`], it is removed.
#[derive(Debug)]
pub struct Draft {
    snapshots: Snapshots,
    id: String,
    path: PathBuf,
    _lock: File,
    is_published: bool,
}

impl Snapshots {
    pub fn new(directory: PathBuf) -> Snapshots {
        Snapshots { directory }
    }

    /// Begins to make a snapshot.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn begin(&self, id: &str) -> Result<Draft> {
        if !is_name(id) {
            return Err(Error::new(format!("{id:?} cannot be a snapshot's id")));
        }
        let path = self.directory.join(format!("{NEW}{id}"));
        let told = || format!("cannot make {}", path.display());
        // A sweep by another process may take it in the moment before it is locked.
        for _ in 0..8 {
            make_private_dir(&path)?;
            let Ok(lock) = File::open(&path) else { continue };
            lock.lock().context(told())?;
            if is_same_file(&lock, &path) {
                make_private_dir(&path.join(SNAPSHOT))?;
                let (snapshots, id) = (self.clone(), id.to_string());
                return Ok(Draft { snapshots, id, path, _lock: lock, is_published: false });
            }
        }
        Err(Error::new(format!("{}: it is removed again and again", told())))
    }

    /// All there are, oldest first. One of another version of flyrun is passed over.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn list(&self) -> Result<Vec<Record>> {
        let names = self.names()?;
        let names = names.iter().filter(|name| is_name(name));
        let mut records: Vec<_> = names.filter_map(|id| self.read(id)).collect();
        records.sort_by(|a, b| (a.taken_at_ms, &a.id).cmp(&(b.taken_at_ms, &b.id)));
        Ok(records)
    }

    /// The snapshot that `text` means: its name, its id, or the beginning of its id alone.
    ///
    /// # Errors
    /// None is meant, or several.
    pub fn find(&self, text: &str) -> Result<Record> {
        let mut records = self.list()?;
        if let Some(meant) = records.iter().position(|record| record.id == text || record.name == text) {
            return Ok(records.swap_remove(meant));
        }
        records.retain(|record| !text.is_empty() && record.id.starts_with(text));
        match records.len() {
            1 => Ok(records.remove(0)),
            0 => Err(Error::new(format!("there is no snapshot '{}'", crate::session::printable(text)))
                .advice("`flyrun snapshot ls` lists all by name and id.")),
            count => Err(Error::new(format!("'{text}' begins the ids of {count} snapshots"))
                .advice("Write more of the id; `flyrun snapshot ls` lists all.")),
        }
    }

    /// Where a snapshot is.
    pub fn directory_of(&self, id: &str) -> PathBuf {
        self.directory.join(id)
    }

    /// Whether a snapshot can have this name.
    ///
    /// # Errors
    /// It is no name, or another has it.
    pub fn check_name(&self, name: &str) -> Result<()> {
        if !is_name(name) {
            return Err(Error::new(format!("{name:?} cannot be a snapshot's name"))
                .advice("Use up to 63 letters, digits, '_', '.' and '-', a letter or digit first."));
        }
        self.ensure_free(name, "")
    }

    fn ensure_free(&self, name: &str, id: &str) -> Result<()> {
        let records = self.list()?;
        match records.iter().find(|other| other.id != id && (other.name == name || other.id == name)) {
            None => Ok(()),
            Some(other) => Err(Error::new(format!("the name '{name}' belongs to snapshot {}", other.id))
                .advice("Choose another name, or remove that one with `flyrun snapshot rm`.")),
        }
    }

    /// Removes a snapshot. Machines that were made from it have links to what they need.
    ///
    /// # Errors
    /// The system's.
    pub fn remove(&self, id: &str) -> Result<()> {
        let old = self.directory.join(format!("{OLD}{id}"));
        let told = || format!("cannot remove the snapshot {id}");
        fs::rename(self.directory.join(id), &old).context(told())?;
        remove_all(&old).context(told())
    }

    /// Takes away what those left who were killed.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn sweep(&self) -> Result<()> {
        for name in self.names()?.iter().filter(|name| name.starts_with(NEW) || name.starts_with(OLD)) {
            let path = self.directory.join(name);
            if let Ok(lock) = File::open(&path)
                && lock.try_lock().is_ok()
            {
                // A VMM whose owner was killed may still be writing there: the next sweep takes the rest.
                let _ = remove_all(&path);
            }
        }
        Ok(())
    }

    fn names(&self) -> Result<Vec<String>> {
        let entries = match fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
            Err(error) => {
                return Err(Error::caused(format!("cannot read {}", self.directory.display()), &error));
            }
        };
        Ok(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
    }

    fn read(&self, id: &str) -> Option<Record> {
        let text = fs::read(self.directory.join(id).join(RECORD)).ok()?;
        let record: Record = serde_json::from_slice(&text).ok()?;
        let is_known = record.version == VERSION && record.machine.version == machine::VERSION;
        (is_known && record.id == id).then_some(record)
    }

    fn lock_names(&self) -> Result<File> {
        let path = self.directory.join(".names");
        let names = files::open_lock(&path).context(format!("cannot open the lock {}", path.display()))?;
        names.lock().context("cannot lock the snapshots")?;
        Ok(names)
    }
}

impl Draft {
    /// The id it will have.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The directory to fill, laid out as a machine's is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The part of it that the VMM writes.
    pub fn snapshot(&self) -> PathBuf {
        self.path.join(SNAPSHOT)
    }

    /// Takes away the memory of others, which the snapshot is whole without.
    ///
    /// # Errors
    /// The system's.
    pub fn remove_base(&self) -> Result<()> {
        match fs::remove_file(self.snapshot().join(vmm::snapshot::BASE)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.context(format!("cannot write {}", self.path.display())),
        }
    }

    /// Gives the snapshot its place. All that is in it has been synced, but for the disk and the directories.
    ///
    /// # Errors
    /// The name belongs to another, or the system refuses. Nothing is left then.
    pub fn publish(mut self, record: &Record) -> Result<()> {
        let told = || format!("cannot write {}", self.path.display());
        let sync = |path: &Path| File::open(path).and_then(|file| file.sync_all()).context(told());
        let disk = self.path.join(machine::DISK);
        if disk.exists() {
            sync(&disk)?;
        }
        sync(&self.snapshot())?;
        let contents = serde_json::to_vec_pretty(record).context(told())?;
        files::replace(&self.path, RECORD, &contents, Lasting::PowerCut).context(told())?;
        let _names = self.snapshots.lock_names()?;
        self.snapshots.ensure_free(&record.name, &record.id)?;
        fs::rename(&self.path, self.snapshots.directory.join(&self.id)).context(told())?;
        self.is_published = true;
        sync(&self.snapshots.directory)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.is_published {
            // What stays is swept away.
            let _ = remove_all(&self.path);
        }
    }
}

/// Another may be at it.
fn remove_all(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshots() -> (tempfile::TempDir, Snapshots) {
        let directory = tempfile::tempdir().unwrap();
        let snapshots = Snapshots::new(directory.path().join("snapshots"));
        (directory, snapshots)
    }

    fn make(snapshots: &Snapshots, id: &str, name: Option<&str>) -> Result<()> {
        let draft = snapshots.begin(id).unwrap();
        fs::write(draft.snapshot().join("memory"), "memory").unwrap();
        draft.publish(&Record::of(&machine::Record::example("web"), id, name))
    }

    #[test]
    fn a_snapshot_is_made_found_and_removed() {
        let (_directory, snapshots) = snapshots();
        make(&snapshots, "aa11", Some("warm")).unwrap();
        make(&snapshots, "ab22", None).unwrap();
        for text in ["warm", "aa11", "aa"] {
            assert_eq!(snapshots.find(text).unwrap().id, "aa11", "{text}");
        }
        assert!(snapshots.find("a").unwrap_err().to_string().contains("2 snapshots"));
        for text in ["", "x", "../snapshots/aa11", ".new-x", "warm "] {
            assert!(snapshots.find(text).unwrap_err().to_string().contains("no snapshot"), "{text}");
        }
        snapshots.remove("aa11").unwrap();
        assert!(snapshots.find("warm").is_err() && snapshots.remove("aa11").is_err());
        assert_eq!(snapshots.list().unwrap().len(), 1);
        assert!(!snapshots.directory.join(".old-aa11").exists());
    }

    #[test]
    fn a_name_is_given_once_and_a_snapshot_that_comes_too_late_leaves_nothing() {
        let (_directory, snapshots) = snapshots();
        let late = snapshots.begin("ab22").unwrap();
        make(&snapshots, "aa11", Some("warm")).unwrap();
        assert!(snapshots.check_name("warm").is_err() && snapshots.check_name("aa11").is_err());
        assert!(snapshots.check_name("a b").is_err() && snapshots.check_name("cold").is_ok());
        let record = Record::of(&machine::Record::example("web"), "ab22", Some("warm"));
        assert!(late.publish(&record).unwrap_err().to_string().contains("belongs to snapshot aa11"));
        assert_eq!(snapshots.list().unwrap().len(), 1);
        assert_eq!(snapshots.names().unwrap().iter().filter(|name| name.starts_with(NEW)).count(), 0);
    }

    #[test]
    fn what_a_killed_maker_left_is_swept_and_what_is_being_made_is_not() {
        let (_directory, snapshots) = snapshots();
        let draft = snapshots.begin("aa11").unwrap();
        for dead in [".new-dead", ".old-dead"] {
            fs::create_dir_all(snapshots.directory.join(dead).join(SNAPSHOT)).unwrap();
        }
        snapshots.sweep().unwrap();
        let names = snapshots.names().unwrap();
        assert_eq!(names, [".new-aa11"]);
        assert!(snapshots.list().unwrap().is_empty(), "what is being made is no snapshot");
        drop(draft);
        assert!(snapshots.names().unwrap().is_empty());
    }

    #[test]
    fn a_snapshot_of_another_version_is_passed_over() {
        let (_directory, snapshots) = snapshots();
        make(&snapshots, "aa11", None).unwrap();
        let path = snapshots.directory.join("aa11").join(RECORD);
        let text = fs::read_to_string(&path).unwrap().replacen("\"version\": 1", "\"version\": 2", 1);
        fs::write(&path, text).unwrap();
        assert!(snapshots.list().unwrap().is_empty() && path.exists());
    }
}
