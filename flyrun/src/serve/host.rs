//! What is done to the machines of apps: the commands of flyrun, on threads that may block.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use images::Store;
use proxy::Opened;

use super::children::Children;
use super::template::{APP, GROUP, MACHINE_VERSION, SLOT, Template};
use crate::cli::{Context, lifecycle};
use crate::error::{Error, Result};
use crate::machine::{Action, DISK, LastStart, Owned, Patience, Record, State, Verdict, decide};
use crate::monitor::{self, Request};
use crate::network;
use crate::paths::Library;
use crate::snapshot;

/// How long a machine that another flyrun starts, or that is just ending, may take until it is clear which.
const SETTLE: Duration = Duration::from_secs(60);
const SETTLE_POLL: Duration = Duration::from_millis(10);

/// All that machines are made and started with.
#[derive(Debug)]
pub struct Host {
    pub context: Context,
    pub library: Library,
    pub store: Store,
    pub children: Children,
}

/// How a machine came to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Resumed,
    Base,
    Cold,
}

impl Kind {
    pub const ALL: [Kind; 3] = [Kind::Resumed, Kind::Base, Kind::Cold];

    pub fn name(self) -> &'static str {
        match self {
            Kind::Resumed => "resumed",
            Kind::Base => "base",
            Kind::Cold => "cold",
        }
    }
}

/// A machine that runs.
#[derive(Clone, Debug)]
pub struct Started {
    pub id: Arc<str>,
    pub address: IpAddr,
    /// What its last check has connected.
    pub opened: Arc<Opened>,
    /// `None` if it ran already.
    pub kind: Option<Kind>,
    /// Why it did not go on from the snapshot that there was.
    pub reason: Option<String>,
}

/// A machine that an app has.
#[derive(Clone, Debug)]
pub struct Known {
    /// Its number in the group; those of one version follow each other.
    pub number: usize,
    pub version: String,
    pub record: Record,
}

impl Host {
    pub fn new(context: Context, library: Library, store: Store) -> Host {
        Host { context, library, store, children: Children::default() }
    }

    /// The machines of a group. Copies that somebody has made of them are none of it: they have other names.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn machines_of(&self, template: &Template) -> Result<Vec<Known>> {
        let records = self.context.machines().list()?;
        let known = records.into_iter().filter_map(|record| {
            let label = |key: &str| record.config.labels.get(key).map(String::as_str);
            let number = label(SLOT)?.parse().ok()?;
            let is_ours = label(APP) == Some(&template.app)
                && label(GROUP) == Some(&template.group)
                && record.name == template.name_of(number);
            let version = label(MACHINE_VERSION)?.to_string();
            is_ours.then_some(Known { number, version, record })
        });
        Ok(known.collect())
    }

    /// Starts a slot's machine: goes on from its snapshot, or boots it with a new disk; makes it if there is none of this
    /// version. One that runs is left as it is. `known` is the machine that the slot has, `fresh` the id of a new one.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(
        &self,
        template: &Template,
        slot: usize,
        known: Option<&str>,
        fresh: &str,
    ) -> Result<Started> {
        let is_current =
            |record: &Record| record.config.labels.get(MACHINE_VERSION) == Some(&template.version);
        // The short way: it is there, and nobody else is at it.
        if let Some(id) = known
            && let Ok(Some(owned)) = self.context.machines().acquire(id, Patience::Glance)
            && is_current(owned.record())
            && decide(owned.record(), Action::Start)? == Verdict::Go
        {
            return self.start_owned(owned);
        }
        // A user may have removed it, and a start that was cut short have left another.
        let record = match known.and_then(|id| self.context.machines().find(id).ok()) {
            Some(record) => Some(record),
            None => self.slot_of(template, slot)?.map(|known| known.record),
        };
        if let Some(record) = record {
            if is_current(&record) {
                return self.start_again(&record);
            }
            lifecycle::remove(&self.context, &record, true)?;
        }
        let owned = self.make(template, slot, fresh)?;
        self.spawn(owned)?;
        self.started(fresh, true)
    }

    /// Takes a machine over that runs, of whatever version it is.
    ///
    /// # Errors
    /// It has ended meanwhile, and does not start again.
    pub fn take_over(&self, id: &str) -> Result<Started> {
        self.start_again(&self.context.machines().find(id)?)
    }

    fn start_owned(&self, owned: Owned) -> Result<Started> {
        let id = owned.record().id.clone();
        if owned.record().state != State::Suspended {
            renew_disk(&owned)?;
        }
        self.spawn(owned)?;
        self.started(&id, true)
    }

    /// Starts a machine's monitor, which is this process's child.
    ///
    /// # Errors
    /// The machine did not start.
    pub fn spawn(&self, owned: Owned) -> Result<()> {
        let monitor = monitor::spawn(&self.context.paths, owned)?;
        self.children.add(monitor);
        Ok(())
    }

    /// The machine that a slot has.
    fn slot_of(&self, template: &Template, slot: usize) -> Result<Option<Known>> {
        let number = template.first + slot;
        Ok(self.machines_of(template)?.into_iter().find(|known| known.number == number))
    }

    fn make(&self, template: &Template, slot: usize, id: &str) -> Result<Owned> {
        template.make_volumes(self)?;
        if let Some(golden) = self.golden(template) {
            let mut record = snapshot::offspring(&golden.machine, id, None);
            template.adapt(&mut record, slot);
            let source = self.context.snapshots().directory_of(&golden.id);
            return self
                .context
                .machines()
                .create_filled(record, |directory| snapshot::copy(&source, directory));
        }
        self.context.machines().create(template.record(slot, id))
    }

    fn start_again(&self, record: &Record) -> Result<Started> {
        let deadline = Instant::now() + SETTLE;
        let id = record.id.as_str();
        loop {
            let now = self.context.machines().find(id)?;
            match now.state {
                State::Starting | State::Stopping => {}
                State::Suspending => {
                    // Whether it went on or is on disk by now is seen in the next round.
                    let _ = lifecycle::ask(&self.context, &now, &Request::Resume);
                }
                State::Paused => {
                    lifecycle::ask(&self.context, &now, &Request::Resume)?;
                    return self.started(id, false);
                }
                State::Started => return self.started(id, false),
                _ => {
                    if let Some(owned) = self.context.machines().acquire(id, Patience::Glance)?
                        && decide(owned.record(), Action::Start)? == Verdict::Go
                    {
                        return self.start_owned(owned);
                    }
                }
            }
            if Instant::now() >= deadline {
                return Err(Error::new(format!("{}: it stays {}", now.name, now.state)));
            }
            std::thread::sleep(SETTLE_POLL);
        }
    }

    fn started(&self, id: &str, by_us: bool) -> Result<Started> {
        let told = || Error::new("it has no address in the host's network");
        let facts = network::Facts::read(&self.context.paths.run_dir(id)).ok_or_else(told)?;
        let address = facts.ipv4.map(IpAddr::V4).or(facts.ipv6.map(IpAddr::V6)).ok_or_else(told)?;
        let last = if by_us { self.context.machines().find(id)?.last_start } else { None };
        let (kind, reason) = match last {
            None => (None, None),
            Some(LastStart::Resumed) => (Some(Kind::Resumed), None),
            Some(LastStart::Base) => (Some(Kind::Base), None),
            Some(LastStart::ColdBoot { reason, .. }) => (Some(Kind::Cold), reason),
        };
        Ok(Started { id: Arc::from(id), address, opened: Arc::default(), kind, reason })
    }

    /// Brings a machine to disk.
    ///
    /// # Errors
    /// It runs on, or has ended.
    pub fn suspend(&self, id: &str) -> Result<()> {
        lifecycle::suspend(&self.context, &self.context.machines().find(id)?, false)
    }

    /// Gives up a suspend that is under way.
    pub fn go_on(&self, id: &str) {
        if let Ok(record) = self.context.machines().find(id)
            && record.state == State::Suspending
        {
            let _ = lifecycle::ask(&self.context, &record, &Request::Resume);
        }
    }

    /// Stops a machine, within its own time or this.
    ///
    /// # Errors
    /// It does not stop.
    pub fn stop(&self, id: &str, timeout_s: Option<u32>) -> Result<()> {
        let Ok(record) = self.context.machines().find(id) else { return Ok(()) };
        lifecycle::stop(&self.context, &record, timeout_s)
    }

    /// Ends a machine that runs, at once. What is on disk stays there.
    ///
    /// # Errors
    /// It does not end.
    pub fn kill(&self, id: &str) -> Result<()> {
        let record = self.context.machines().find(id).ok().filter(|record| record.state.needs_monitor());
        record.map_or(Ok(()), |record| lifecycle::stop(&self.context, &record, Some(0)))
    }

    /// Removes a machine with all it has.
    ///
    /// # Errors
    /// It does not go.
    pub fn remove(&self, id: &str) -> Result<()> {
        let Ok(record) = self.context.machines().find(id) else { return Ok(()) };
        lifecycle::remove(&self.context, &record, true)
    }

    /// What has become of a machine whose monitor has left: waits until that is clear, and takes away what would be in the way of the
    /// next one. The rest can wait until it starts.
    pub fn aftermath(&self, id: &str) -> Option<Record> {
        let deadline = Instant::now() + SETTLE;
        let record = loop {
            match self.context.machines().find(id) {
                Ok(record) if record.state.needs_monitor() && Instant::now() < deadline => {
                    std::thread::sleep(SETTLE_POLL);
                }
                found => break found.ok(),
            }
        };
        let way = record.as_ref().map(|record| self.context.make_way(record));
        if let Some(Err(error)) = way {
            anstream::eprintln!("flyrun: {error}");
        }
        self.children.left_something();
        record
    }

    /// Has a machine's leavings taken away, if there are any: a monitor that ends as it should removes its sockets last. One before it
    /// that was killed may have left an interface, which stays while somebody owns the machine.
    pub fn notice_leavings(&self, id: &str) {
        let is_owned = |id: &str| self.context.machines().is_owned(id);
        if let Err(error) = network::sweep(&self.context.paths, &is_owned) {
            anstream::eprintln!("flyrun: {error}");
        }
        if self.context.paths.run_dir(id).exists() && !is_owned(id) {
            self.children.left_something();
        }
    }

    /// Takes away what monitors have left that were killed.
    pub fn tidy(&self) {
        if let Err(error) = self.context.keep_house() {
            anstream::eprintln!("flyrun: {error}");
        }
    }

    /// The snapshot that further machines of a group begin with.
    fn golden(&self, template: &Template) -> Option<snapshot::Record> {
        let is_of = |snapshot: &snapshot::Record| is_golden_of(snapshot, template) == Some(true);
        self.context.snapshots().list().ok()?.into_iter().find(is_of)
    }

    /// Keeps a suspended machine's snapshot for the other slots of its group, and removes that of an earlier version.
    ///
    /// # Errors
    /// It runs again, or the system's.
    pub fn keep_golden(&self, template: &Template, id: &str) -> Result<()> {
        if self.golden(template).is_some() {
            return Ok(());
        }
        let snapshots = self.context.snapshots();
        for old in snapshots.list()?.iter().filter(|old| is_golden_of(old, template) == Some(false)) {
            snapshots.remove(&old.id)?;
        }
        let Some(owned) = self.context.machines().acquire(id, Patience::Glance)? else { return Ok(()) };
        if owned.record().state != State::Suspended || snapshot::check(owned.record()).is_err() {
            return Ok(());
        }
        let golden = crate::machine::new_id()?;
        let draft = snapshots.begin(&golden)?;
        snapshot::copy(owned.directory(), draft.path())?;
        let mut record = snapshot::Record::of(owned.record(), &golden, Some(&template.snapshot_name()));
        record.machine.config.labels.insert(GOLDEN.to_string(), String::new());
        draft.publish(&record)
    }

    /// Removes the snapshot that further machines begin with: one that did was of no use.
    pub fn drop_golden(&self, template: &Template) {
        if let Some(golden) = self.golden(template) {
            let _ = self.context.snapshots().remove(&golden.id);
        }
    }
}

/// Marks the snapshot that is a group's, beside those that users have taken of its machines.
const GOLDEN: &str = "flyrun.golden";

/// Whether a snapshot is for this group's machines of this version, or of another; `None` if it is not a group's.
fn is_golden_of(snapshot: &snapshot::Record, template: &Template) -> Option<bool> {
    let label = |key: &str| snapshot.machine.config.labels.get(key).map(String::as_str);
    label(GOLDEN)?;
    let is_groups = label(APP) == Some(&template.app) && label(GROUP) == Some(&template.group);
    is_groups.then(|| label(MACHINE_VERSION) == Some(&template.version))
}

/// A machine that boots begins with its image, as Fly.io's do; what is to last is in volumes.
fn renew_disk(owned: &Owned) -> Result<()> {
    match std::fs::remove_file(owned.directory().join(DISK)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::caused("cannot renew the machine's disk", &error))
        }
        _ => Ok(()),
    }
}
