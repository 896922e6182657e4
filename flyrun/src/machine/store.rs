//! The directory of machines: making one, finding the others, and removing what is over.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::record::{Outcome, Record, Snapshot, VERSION};
use super::state::State;
use crate::error::{Context, Error, Result};
use crate::files::{self, Lasting};
use crate::paths::{is_same_file, make_private_dir};

const RECORD: &str = "machine.json";
const LOCK: &str = "lock";
/// A machine's own disk, in its directory.
pub const DISK: &str = "disk.ext4";
/// A machine's snapshot, in its directory, and what is there once the snapshot is whole.
pub const SNAPSHOT: &str = "snapshot";
pub const SNAPSHOT_STATE: &str = vmm::snapshot::STATE;
/// How long a machine's lock may be held by somebody who only looks, or is about to let go.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait until it is tried again: doubled each time, up to the second.
const LOCK_POLL: [Duration; 2] = [Duration::from_micros(100), Duration::from_millis(5)];
/// The exit code of a machine whose virtual machine was lost: SIGKILL's.
const LOST: u8 = 137;

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
    lock: File,
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
        let (owned, _names) = self.begin(record)?;
        owned.save()?;
        Ok(owned)
    }

    /// A locked directory for a machine that is none yet, and the lock of all names.
    fn begin(&self, record: Record) -> Result<(Owned, File)> {
        make_private_dir(&self.directory)?;
        let names = self.lock_names()?;
        if record.name != record.id {
            self.ensure_free(&record.name, &record.id)?;
        }
        let directory = self.directory.join(&record.id);
        make_private_dir(&directory)?;
        let lock = lock_file(&directory.join(LOCK))?;
        lock.lock().context(format!("cannot lock machine {}", record.id))?;
        Ok((Owned { directory, record, lock }, names))
    }

    /// Makes a machine whose directory `fill` fills first. Until that is done there is no machine, and whatever ends this process
    /// leaves a directory that is swept away.
    ///
    /// # Errors
    /// As [`Machines::create`], and what `fill` says. Nothing is left then.
    pub fn create_filled(&self, record: Record, fill: impl FnOnce(&Path) -> Result<()>) -> Result<Owned> {
        // Others may be made while this one is filled.
        let owned = self.begin(record).map(|(owned, _names)| owned)?;
        let made = fill(&owned.directory).and_then(|()| {
            // Copying may have taken a while.
            let _names = self.lock_names()?;
            self.ensure_free(&owned.record.name, &owned.record.id)?;
            owned.save()
        });
        match made {
            Ok(()) => Ok(owned),
            Err(error) => {
                let _ = fs::remove_dir_all(&owned.directory);
                Err(error)
            }
        }
    }

    /// Whether a process owns that machine at this moment.
    pub fn is_owned(&self, id: &str) -> bool {
        lock_file_of(&self.directory.join(id))
            .is_some_and(|lock| matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock)))
    }

    /// What is true of each machine, oldest first. Where a monitor died without a word, that is written down first, and what
    /// was to go with it goes.
    ///
    /// # Errors
    /// The directory cannot be read. A directory that is not a machine, or half made, is passed over.
    pub fn list(&self) -> Result<Vec<Record>> {
        let mut records: Vec<Record> = self.ids()?.iter().filter_map(|id| self.truth(id)).collect();
        records.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
        Ok(records)
    }

    /// The machine that `text` means: its name, its id, or the beginning of its id alone.
    ///
    /// # Errors
    /// None is meant, or several.
    pub fn find(&self, text: &str) -> Result<Record> {
        if super::is_name(text)
            && let Some(record) = self.truth(text)
        {
            return Ok(record);
        }
        let mut records = self.list()?;
        if let Some(named) = records.iter().position(|record| record.name == text) {
            return Ok(records.swap_remove(named));
        }
        records.retain(|record| !text.is_empty() && record.id.starts_with(text));
        match records.len() {
            1 => Ok(records.remove(0)),
            0 => Err(Error::new(format!("there is no machine '{text}'"))
                .advice("`flyrun ps -a` lists all by name and id.")),
            count => Err(Error::new(format!("'{text}' begins the ids of {count} machines"))
                .advice("Write more of the id; `flyrun ps -a` lists all.")),
        }
    }

    /// Takes a machine's lock, waiting for others who look at it or are about to let go. `None` if its owner stays.
    ///
    /// # Errors
    /// The machine is gone, or cannot be read.
    pub fn acquire(&self, id: &str, patience: Patience) -> Result<Option<Owned>> {
        let directory = self.directory.join(id);
        let deadline = Instant::now() + LOCK_PATIENCE;
        let [mut pause, longest] = LOCK_POLL;
        loop {
            let lock = lock_file(&directory.join(LOCK)).map_err(|_| gone(id))?;
            if lock.try_lock().is_ok() {
                // Taken away in the moment before it was locked?
                if !is_same_file(&lock, &directory.join(LOCK)) {
                    return Err(gone(id));
                }
                let record = read_record(&directory).ok_or_else(|| gone(id))?;
                return Ok(Some(Owned { directory, record, lock }));
            }
            let stays = read_record(&directory).is_some_and(|record| record.state.needs_monitor());
            if (stays && patience == Patience::Glance) || Instant::now() >= deadline {
                return Ok(None);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(longest);
        }
    }

    /// Becomes the owner of a machine whose lock was handed over by the process that held it.
    ///
    /// # Errors
    /// This is not that machine's lock, or the machine cannot be read.
    pub fn adopt(&self, id: &str, lock: OwnedFd) -> Result<Owned> {
        let directory = self.directory.join(id);
        let lock = File::from(lock);
        if !super::is_name(id) || !is_same_file(&lock, &directory.join(LOCK)) || lock.try_lock().is_err() {
            return Err(Error::new("a monitor is started by flyrun alone, which hands it a machine's lock"));
        }
        let record = read_record(&directory).ok_or_else(|| gone(id))?;
        Ok(Owned { directory, record, lock })
    }

    /// Removes machines that nobody owns: all of them, or only those that should have gone by themselves or were
    /// never finished being made. Returns what was removed and the bytes freed.
    pub fn remove_ended(&self, which: Ended) -> Result<Vec<(String, u64)>> {
        let mut removed = Vec::new();
        for id in self.ids()? {
            let directory = self.directory.join(&id);
            // A record that this flyrun cannot read is another version's machine, and not for it to remove.
            let removable = match read_record(&directory) {
                None => !directory.join(RECORD).exists(),
                // All it has in memory is there.
                Some(record) if record.state == State::Suspended => false,
                Some(_) if which == Ended::All => true,
                Some(record) => {
                    record.state == State::Destroying
                        // One that has yet to be started waits for that.
                        || (record.config.auto_remove && record.state != State::Created)
                }
            };
            if !removable {
                continue;
            }
            // An owner holds the lock for as long as it lives; the name lock keeps one from being made meanwhile.
            let _names = self.lock_names()?;
            if let Ok(lock) = lock_file(&directory.join(LOCK))
                && lock.try_lock().is_ok()
            {
                let bytes = size_on_disk(&directory);
                remove_directory(&directory)?;
                removed.push((id, bytes));
            }
        }
        Ok(removed)
    }

    fn lock_names(&self) -> Result<File> {
        let names = lock_file(&self.directory.join(".names"))?;
        names.lock().context("cannot lock the machines")?;
        Ok(names)
    }

    /// Whether a name may be given to this machine: no other has it, or could be meant by it.
    fn ensure_free(&self, name: &str, id: &str) -> Result<()> {
        let others = self.ids()?.into_iter().filter(|other| other != id);
        let mut records = others.filter_map(|other| read_record(&self.directory.join(other)));
        match records.find(|other| other.name == name || other.id == name) {
            None => Ok(()),
            Some(other) => Err(Error::new(format!("the name '{name}' belongs to machine {}", other.id))
                .advice("Choose another name, or remove that machine with `flyrun rm`.")),
        }
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

    /// A machine as it really is.
    fn truth(&self, id: &str) -> Option<Record> {
        let directory = self.directory.join(id);
        let record = read_record(&directory)?;
        let orphaned = |record: &Record| record.state.needs_monitor() || record.state == State::Destroying;
        if !orphaned(&record) {
            return Some(record);
        }
        let Some(lock) = lock_file_of(&directory).filter(|lock| lock.try_lock().is_ok()) else {
            return Some(record);
        };
        // Its owner may have ended in order since the record was read.
        let mut owned = Owned { record: read_record(&directory)?, directory, lock };
        if owned.has_whole_snapshot() {
            // On a disk that is full it remains a finding of this process.
            let _ = owned.become_state(State::Suspended, |record| record.resuming_in_boot = None);
            return Some(owned.record);
        }
        if owned.record.state == State::Destroying
            || (owned.record.config.auto_remove && orphaned(&owned.record))
        {
            let _ = owned.remove();
            return None;
        }
        if orphaned(&owned.record) {
            let error = "its monitor was killed, and the virtual machine with it".to_string();
            let outcome =
                Outcome { exit_code: LOST, oom_killed: false, error: Some(error), finished_at: super::now() };
            // On a disk that is full it remains a finding of this process.
            let _ = owned.become_state(State::Failed, |record| record.outcome = Some(outcome));
        }
        Some(owned.record)
    }
}

fn gone(id: &str) -> Error {
    Error::new(format!("machine {id} is gone")).advice("`flyrun ps -a` lists those there are.")
}

/// `None` for a directory that is half made, or made by another version of flyrun.
fn read_record(directory: &Path) -> Option<Record> {
    // As text: that it is UTF-8 is found for all of it at once.
    let text = fs::read_to_string(directory.join(RECORD)).ok()?;
    let record: Record = serde_json::from_str(&text).ok()?;
    (record.version == VERSION).then_some(record)
}

/// How long to wait for a machine's lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// Until it is clear that the machine runs.
    Glance,
    /// Until it has ended, within reason.
    Wait,
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

    /// Whether its owner died while it was brought to disk or back, and the snapshot is what counts.
    fn has_whole_snapshot(&mut self) -> bool {
        let state = self.directory.join(SNAPSHOT).join(SNAPSHOT_STATE);
        match self.record.state {
            State::Starting => self.record.snapshot.is_some() && state.exists(),
            State::Started if self.record.resuming_in_boot.is_some() => {
                // What was removed in another boot may be there again.
                self.record.resuming_in_boot == super::boot_id()
                    && self.record.snapshot.is_some()
                    && state.exists()
            }
            State::Suspending if state.exists() => {
                let taken_at_ms = crate::usage::now_ms();
                self.record.snapshot = Some(Snapshot { taken_at_ms, network_number: None });
                true
            }
            _ => false,
        }
    }

    /// A handle on the lock for another process: the machine stays owned until both are closed.
    pub fn share_lock(&self) -> Result<File> {
        self.lock.try_clone().context("cannot share the machine's lock")
    }

    /// Changes the record, on disk too: a new file takes the old one's place.
    pub fn update(&mut self, change: impl FnOnce(&mut Record)) -> Result<()> {
        change(&mut self.record);
        self.save()
    }

    /// Goes to another state, and writes it down together with what else changes.
    ///
    /// # Errors
    /// The state cannot follow, or the record not be written.
    pub fn become_state(&mut self, state: State, change: impl FnOnce(&mut Record)) -> Result<()> {
        if !self.record.state.may_become(state) {
            let told = format!("machine {} cannot go from {} to {state}", self.record.id, self.record.state);
            return Err(Error::new(told));
        }
        self.record.state = state;
        self.update(change)
    }

    /// As [`Owned::become_state`], for a state that is none as long as nobody else knows of it.
    ///
    /// # Errors
    /// As there; the machine is as it was then.
    pub fn settle_in_state(&mut self, state: State, change: impl FnOnce(&mut Record)) -> Result<()> {
        let before = self.record.clone();
        self.become_state(state, change).inspect_err(|_| self.record = before)
    }

    /// Gives the machine another name.
    ///
    /// # Errors
    /// The name belongs to another.
    pub fn rename(&mut self, machines: &Machines, name: &str) -> Result<()> {
        let _names = machines.lock_names()?;
        machines.ensure_free(name, &self.record.id)?;
        self.update(|record| record.name = name.to_string())
    }

    /// Removes the machine with all it has. Says so first: a removal that is interrupted leaves nothing that looks whole.
    pub fn remove(mut self) -> Result<()> {
        // The record of one that runs and goes by itself says as much.
        if !(self.record.config.auto_remove && self.record.state.needs_monitor()) {
            self.become_state(State::Destroying, |_| {})?;
        }
        remove_directory(&self.directory)
    }

    fn save(&self) -> Result<()> {
        let told = || format!("cannot write {}", self.directory.join(RECORD).display());
        let contents = serde_json::to_vec_pretty(&self.record).context(told())?;
        // A machine that goes with its process has nothing to say after a power cut.
        let lasting = if self.record.config.auto_remove { Lasting::Process } else { Lasting::PowerCut };
        files::replace(&self.directory, RECORD, &contents, lasting).context(told())
    }
}

fn lock_file(path: &Path) -> Result<File> {
    files::open_lock(path).context(format!("cannot open the lock {}", path.display()))
}

/// The lock of a machine that exists: looking at it must not make the file.
fn lock_file_of(directory: &Path) -> Option<File> {
    File::open(directory.join(LOCK)).ok()
}

/// The record goes last: until then the directory is known to be on its way out.
fn remove_directory(directory: &Path) -> Result<()> {
    let told = || format!("cannot remove {}", directory.display());
    for entry in fs::read_dir(directory).context(told())?.flatten() {
        if entry.file_name() != RECORD {
            let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let removed =
                if is_directory { fs::remove_dir_all(entry.path()) } else { fs::remove_file(entry.path()) };
            removed.context(told())?;
        }
    }
    fs::remove_dir_all(directory).context(told())
}

fn size_on_disk(directory: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.blocks() * 512).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machines(directory: &tempfile::TempDir) -> Machines {
        Machines::new(directory.path().join("machines"))
    }

    fn started(machines: &Machines, record: Record) -> Owned {
        let mut owned = machines.create(record).unwrap();
        owned.become_state(State::Starting, |_| {}).unwrap();
        owned.become_state(State::Started, |_| {}).unwrap();
        owned
    }

    #[test]
    fn a_name_is_given_once() {
        let directory = tempfile::tempdir().unwrap();
        let machines = machines(&directory);
        let web = machines.create(Record::example("web")).unwrap();
        assert!(machines.create(Record::example("web")).unwrap_err().to_string().contains("flyrun rm"));
        let mut other = machines.create(Record::example("other")).unwrap();
        assert!(other.rename(&machines, "web").is_err());
        web.remove().unwrap();
        other.rename(&machines, "web").unwrap();
        assert_eq!(machines.find("web").unwrap().id, other.record().id);
    }

    #[test]
    fn a_machine_is_found_by_name_id_and_the_beginning_of_its_id() {
        let directory = tempfile::tempdir().unwrap();
        let machines = machines(&directory);
        let mut one = Record::example("web");
        one.id = "aa11".into();
        let two = Record { id: "ab22".into(), ..Record::example("db") };
        let (_one, _two) = (machines.create(one).unwrap(), machines.create(two).unwrap());
        for text in ["web", "aa11", "aa"] {
            assert_eq!(machines.find(text).unwrap().name, "web");
        }
        assert!(machines.find("a").unwrap_err().to_string().contains("2 machines"));
        for text in ["", "x", "../machines/aa11", "web "] {
            assert!(machines.find(text).unwrap_err().to_string().contains("no machine"), "{text}");
        }
    }

    #[test]
    fn a_machine_whose_monitor_died_is_found_failed_and_written_down() {
        let directory = tempfile::tempdir().unwrap();
        let machines = machines(&directory);
        let owned = started(&machines, Record::example("web"));
        assert_eq!(machines.list().unwrap()[0].state, State::Started);
        assert!(machines.remove_ended(Ended::All).unwrap().is_empty(), "a running machine was removed");
        let path = owned.directory().to_path_buf();
        drop(owned);
        assert_eq!(machines.list().unwrap()[0].state, State::Failed);
        assert_eq!(read_record(&path).unwrap().outcome.unwrap().exit_code, LOST);
        assert!(
            machines.remove_ended(Ended::Leftovers).unwrap().is_empty(),
            "a machine without --rm was swept"
        );
        assert_eq!(machines.remove_ended(Ended::All).unwrap().len(), 1);
    }

    #[test]
    fn what_was_to_go_by_itself_is_swept_after_a_crash() {
        let directory = tempfile::tempdir().unwrap();
        let machines = machines(&directory);
        let mut record = Record::example("");
        record.config.auto_remove = true;
        drop(started(&machines, record));
        fs::create_dir(directory.path().join("machines/halfmade")).unwrap();
        assert_eq!(machines.remove_ended(Ended::Leftovers).unwrap().len(), 2);
        assert!(machines.list().unwrap().is_empty());
    }

    #[test]
    fn a_machine_of_another_version_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let machines = machines(&directory);
        let path = directory.path().join("machines/old");
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join(RECORD), r#"{"version":1,"id":"old"}"#).unwrap();
        for which in [Ended::Leftovers, Ended::All] {
            assert!(machines.remove_ended(which).unwrap().is_empty());
        }
        assert!(path.exists() && machines.list().unwrap().is_empty());
    }

    #[test]
    fn a_removal_that_was_interrupted_is_finished_by_the_next_look() {
        let directory = tempfile::tempdir().unwrap();
        let machines = machines(&directory);
        let mut owned = machines.create(Record::example("web")).unwrap();
        owned.become_state(State::Destroying, |_| {}).unwrap();
        let path = owned.directory().to_path_buf();
        drop(owned);
        assert!(machines.find("web").is_err());
        assert!(!path.exists());
    }

    #[test]
    fn a_lock_is_handed_over_without_a_gap() {
        let directory = tempfile::tempdir().unwrap();
        let machines = machines(&directory);
        let owned = started(&machines, Record::example("web"));
        let id = owned.record().id.clone();
        let handed = owned.share_lock().unwrap();
        drop(owned);
        assert!(machines.acquire(&id, Patience::Glance).unwrap().is_none());
        let adopted = machines.adopt(&id, handed.into()).unwrap();
        assert_eq!(machines.list().unwrap()[0].state, State::Started);
        let stranger = File::open(directory.path().join("machines/.names")).unwrap();
        assert!(machines.adopt(&id, stranger.into()).is_err());
        drop(adopted);
        assert!(machines.acquire(&id, Patience::Glance).unwrap().is_some());
    }

    #[test]
    fn a_state_that_cannot_be_written_down_is_none_where_others_must_know() {
        let directory = tempfile::tempdir().unwrap();
        let machines = machines(&directory);
        let mut owned = started(&machines, Record::example("web"));
        // A file cannot take a directory's place.
        let record = owned.directory().join(RECORD);
        fs::remove_file(&record).unwrap();
        fs::create_dir(&record).unwrap();
        let snapshot = Snapshot { taken_at_ms: 1, network_number: None };
        assert!(
            owned
                .settle_in_state(State::Suspending, |record| record.snapshot = Some(snapshot.clone()))
                .is_err()
        );
        assert_eq!((owned.record().state, &owned.record().snapshot), (State::Started, &None));
    }

    #[test]
    fn a_resume_that_was_cut_off_before_the_guest_was_told_leaves_the_snapshot() {
        let snapshot = Snapshot { taken_at_ms: 1, network_number: None };
        let resuming = |boot: Option<String>| {
            let directory = tempfile::tempdir().unwrap();
            let machines = machines(&directory);
            let mut owned = started(&machines, Record::example("web"));
            let id = owned.record().id.clone();
            fs::create_dir(owned.directory().join(SNAPSHOT)).unwrap();
            let state = owned.directory().join(SNAPSHOT).join(SNAPSHOT_STATE);
            fs::write(&state, "state").unwrap();
            owned
                .update(|record| (record.snapshot, record.resuming_in_boot) = (Some(snapshot.clone()), boot))
                .unwrap();
            drop(owned);
            (directory, machines, id, state)
        };
        let boot = super::super::boot_id();
        assert!(boot.is_some());
        let (_directory, machines, id, _) = resuming(boot.clone());
        let found = machines.find(&id).unwrap();
        assert_eq!((found.state, found.resuming_in_boot), (State::Suspended, None));
        assert_eq!(found.snapshot, Some(snapshot.clone()));
        // Told, or in another boot of the host: nobody knows what has become of the disk.
        let (_directory, machines, id, state) = resuming(boot);
        fs::remove_file(state).unwrap();
        assert_eq!(machines.find(&id).unwrap().state, State::Failed);
        let (_directory, machines, id, _) = resuming(Some("another".into()));
        assert_eq!(machines.find(&id).unwrap().state, State::Failed);
    }

    #[test]
    fn a_state_that_cannot_follow_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let machines = machines(&directory);
        let mut owned = machines.create(Record::example("")).unwrap();
        assert!(owned.become_state(State::Started, |_| {}).is_err());
        assert_eq!(owned.record().state, State::Created);
    }
}
