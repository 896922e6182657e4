//! The directory of machines: making one, finding the others, and removing what is over.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::record::{Record, State};
use crate::error::{Context, Error, Result};
use crate::paths::make_private_dir;

const RECORD: &str = "machine.json";
const LOCK: &str = "lock";

/// All machines of one store.
#[derive(Clone, Debug)]
pub struct Machines {
    directory: PathBuf,
}

/// A machine that this process owns: nobody else may start, change or remove it.
#[derive(Debug)]
pub struct Owned {
    directory: PathBuf,
    record: Record,
    _lock: File,
}

impl Machines {
    pub fn new(directory: PathBuf) -> Machines {
        Machines { directory }
    }

    /// Makes a machine's directory and takes its lock.
    ///
    /// # Errors
    /// The name belongs to another machine, or the directory cannot be written.
    pub fn create(&self, record: Record) -> Result<Owned> {
        make_private_dir(&self.directory)?;
        let names = lock_file(&self.directory.join(".names"))?;
        names.lock().context("cannot lock the machines")?;
        if record.name != record.id
            && let Some(other) = self.list()?.into_iter().find(|other| other.name == record.name)
        {
            return Err(Error::new(format!("the name '{}' belongs to machine {}", record.name, other.id))
                .advice("Choose another name, or remove what has ended with `flyrun prune`."));
        }
        let directory = self.directory.join(&record.id);
        make_private_dir(&directory)?;
        let lock = lock_file(&directory.join(LOCK))?;
        lock.lock().context(format!("cannot lock machine {}", record.id))?;
        let owned = Owned { directory, record, _lock: lock };
        owned.save()?;
        Ok(owned)
    }

    /// Whether a process owns that machine at this moment.
    pub fn is_owned(&self, id: &str) -> bool {
        is_owned(&self.directory.join(id))
    }

    /// What is known of each machine. One whose owner died without a word is told as failed.
    ///
    /// # Errors
    /// The directory cannot be read. A directory that is not a machine, or half made, is passed over.
    pub fn list(&self) -> Result<Vec<Record>> {
        let mut records: Vec<Record> = self.ids()?.iter().filter_map(|id| self.read(id)).collect();
        records.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
        Ok(records)
    }

    /// Removes machines that nobody owns: all of them, or only those that should have gone by themselves or were
    /// never finished being made. Returns what was removed and the bytes freed.
    pub fn remove_ended(&self, which: Ended) -> Result<Vec<(String, u64)>> {
        let mut removed = Vec::new();
        for id in self.ids()? {
            let directory = self.directory.join(&id);
            let leftover = self.read(&id).is_none_or(|record| record.auto_remove);
            if which == Ended::Leftovers && !leftover {
                continue;
            }
            // An owner holds the lock for as long as it lives; the name lock keeps one from being made meanwhile.
            let names = lock_file(&self.directory.join(".names"))?;
            names.lock().context("cannot lock the machines")?;
            if let Ok(lock) = lock_file(&directory.join(LOCK))
                && lock.try_lock().is_ok()
            {
                let bytes = size_on_disk(&directory);
                fs::remove_dir_all(&directory).context(format!("cannot remove {}", directory.display()))?;
                removed.push((id, bytes));
            }
        }
        Ok(removed)
    }

    fn ids(&self) -> Result<Vec<String>> {
        let entries = match fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
            Err(error) => {
                return Err(Error::caused(format!("cannot read {}", self.directory.display()), &error));
            }
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        Ok(names.filter(|name| super::is_name(name)).collect())
    }

    fn read(&self, id: &str) -> Option<Record> {
        let directory = self.directory.join(id);
        let text = fs::read(directory.join(RECORD)).ok()?;
        let mut record: Record = serde_json::from_slice(&text).ok()?;
        if record.state == State::Started && !is_owned(&directory) {
            record.state = State::Failed;
        }
        Some(record)
    }
}

/// Which machines to remove.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Those made with `--rm` whose owner died, and directories without a record.
    Leftovers,
    /// Every machine that does not run.
    All,
}

impl Owned {
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Changes the record, on disk too: a new file takes the old one's place.
    pub fn update(&mut self, change: impl FnOnce(&mut Record)) -> Result<()> {
        change(&mut self.record);
        self.save()
    }

    /// Removes the machine with all it has.
    pub fn remove(self) -> Result<()> {
        fs::remove_dir_all(&self.directory).context(format!("cannot remove {}", self.directory.display()))
    }

    fn save(&self) -> Result<()> {
        let path = self.directory.join(RECORD);
        let temporary = self.directory.join(".machine.json.new");
        let told = || format!("cannot write {}", path.display());
        let mut file = File::create(&temporary).context(told())?;
        file.write_all(&serde_json::to_vec_pretty(&self.record).context(told())?).context(told())?;
        // A machine that goes with its process has nothing to say after a power cut.
        if !self.record.auto_remove {
            file.sync_all().context(told())?;
        }
        fs::rename(&temporary, &path).context(told())?;
        if !self.record.auto_remove {
            File::open(&self.directory).and_then(|directory| directory.sync_all()).context(told())?;
        }
        Ok(())
    }
}

fn lock_file(path: &Path) -> Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path).context(format!("cannot open the lock {}", path.display()))
}

fn is_owned(directory: &Path) -> bool {
    File::open(directory.join(LOCK))
        .is_ok_and(|lock| matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

fn size_on_disk(directory: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.blocks() * 512).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{Outcome, new_id};
    use crate::size::Size;

    fn record(name: &str, auto_remove: bool) -> Record {
        let id = new_id().unwrap();
        Record {
            version: super::super::record::VERSION,
            name: if name.is_empty() { id.clone() } else { name.into() },
            id,
            image: "busybox".into(),
            chain_id: "sha256:0".into(),
            cpus: 1,
            memory: Size::mib(128),
            disk: None,
            auto_remove,
            state: State::Started,
            created_at: 1,
            outcome: None,
        }
    }

    #[test]
    fn a_name_is_given_once() {
        let directory = tempfile::tempdir().unwrap();
        let machines = Machines::new(directory.path().join("machines"));
        let web = machines.create(record("web", false)).unwrap();
        assert!(machines.create(record("web", false)).unwrap_err().to_string().contains("flyrun prune"));
        web.remove().unwrap();
        machines.create(record("web", false)).unwrap();
    }

    #[test]
    fn a_machine_whose_owner_died_is_told_as_failed_and_can_be_removed() {
        let directory = tempfile::tempdir().unwrap();
        let machines = Machines::new(directory.path().join("machines"));
        let owned = machines.create(record("web", false)).unwrap();
        assert_eq!(machines.list().unwrap()[0].state, State::Started);
        assert!(machines.remove_ended(Ended::All).unwrap().is_empty(), "a running machine was removed");
        drop(owned);
        assert_eq!(machines.list().unwrap()[0].state, State::Failed);
        assert!(
            machines.remove_ended(Ended::Leftovers).unwrap().is_empty(),
            "a machine without --rm was swept"
        );
        assert_eq!(machines.remove_ended(Ended::All).unwrap().len(), 1);
    }

    #[test]
    fn what_was_to_go_by_itself_is_swept_after_a_crash() {
        let directory = tempfile::tempdir().unwrap();
        let machines = Machines::new(directory.path().join("machines"));
        drop(machines.create(record("", true)).unwrap());
        fs::create_dir(directory.path().join("machines/halfmade")).unwrap();
        assert_eq!(machines.remove_ended(Ended::Leftovers).unwrap().len(), 2);
        assert!(machines.list().unwrap().is_empty());
    }

    #[test]
    fn an_outcome_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let machines = Machines::new(directory.path().join("machines"));
        let mut owned = machines.create(record("", false)).unwrap();
        let outcome = Outcome { exit_code: 7, oom_killed: false, error: None, finished_at: 2 };
        owned
            .update(|record| {
                record.state = State::Stopped;
                record.outcome = Some(outcome.clone());
            })
            .unwrap();
        drop(owned);
        assert_eq!(machines.list().unwrap()[0].outcome, Some(outcome));
    }
}
