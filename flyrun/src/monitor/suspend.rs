//! Bringing a machine that runs to disk, and a machine on disk back.
//!
//! ```text
//! Started ── suspend ──▶ Suspending: freeze ──▶ stands ──▶ snapshot complete ── recorded ──▶ Suspended, VMM ended
//!    ▲                        │           resume, or a failure          │
//!    └────────────────────────┴─────────────────────────────────────────┘
//! Suspended ── resume ──▶ Starting: VMM restored ──▶ guest-init connects ── recorded ──▶ Started ──▶ workload thawed
//! ```
//! The record decides: until it says Suspended the running machine is what counts, and until it says Started the snapshot is.
//! In between neither changes the machine's disks, as guest-init keeps its filesystems frozen. What is left by a monitor or a VMM
//! that is killed: a snapshot whose `state` is there counts, as that is the last of it to be written, and the first to be
//! removed, before guest-init is told to go on. Whatever is under way, a resume ends it (`Suspending::give_up`).

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use protocol::Renewal;

use super::company::Place;
use super::life::Life;
use super::{Conversation, End, Monitor, Reply, entropy};
use crate::error::{Context, Error, Result};
use crate::machine::{
    Action, LastStart, SNAPSHOT, SNAPSHOT_STATE, Snapshot, State, Verdict, boot_id, decide, now,
};
use crate::usage::{Ledger, now_ms};
use crate::{snapshot, trace};

/// A suspend that is under way.
#[derive(Debug, Default)]
pub struct Suspending {
    /// Those who want it done.
    wanted: Vec<Conversation>,
    /// Those who want it undone.
    unwanted: Vec<Conversation>,
    /// Why it is not to be completed.
    given_up: Option<String>,
    is_writing: bool,
    /// How the workload is to be stopped once it runs on: the signal, and the time it has.
    stop: Option<(i32, Duration)>,
}

impl Suspending {
    /// Whether somebody wants it undone.
    fn give_up(&mut self, why: &str) -> bool {
        let first = self.given_up.is_none();
        self.given_up.get_or_insert_with(|| why.to_string());
        first
    }
}

impl Monitor<'_> {
    pub(super) fn snapshot_directory(&self) -> PathBuf {
        self.machine.directory().join(SNAPSHOT)
    }

    /// Begins to suspend the machine, or joins one who did.
    pub(super) fn suspend(&mut self, mut conversation: Conversation, force: bool, life: Option<&mut Life>) {
        let begun = match (&mut self.suspending, life) {
            (Some(suspending), _) => {
                suspending.wanted.push(conversation);
                return;
            }
            (None, Some(life)) if !life.has_exited() && !life.is_still() => self.begin_suspend(force, life),
            _ => decide(self.machine.record(), Action::Suspend)
                .and(Err(Error::new("its process does not run now"))),
        };
        match begun {
            Ok(true) => {
                self.suspending = Some(Suspending { wanted: vec![conversation], ..Suspending::default() });
            }
            Ok(false) => conversation.reply(&Reply::Done),
            Err(error) => conversation.reply(&Reply::Failed { message: error.to_string() }),
        }
    }

    fn begin_suspend(&mut self, force: bool, life: &mut Life) -> Result<bool> {
        if decide(self.machine.record(), Action::Suspend)? == Verdict::Already {
            return Ok(false);
        }
        snapshot::ensure_can_rest(self.machine.record())?;
        self.machine.settle_in_state(State::Suspending, |_| {})?;
        trace::step("suspending recorded");
        life.freeze(force);
        if let Some(input) = &self.input {
            input.hold();
        }
        Ok(true)
    }

    /// Undoes a suspend that is under way. `false` if there is none.
    pub(super) fn cancel_suspend(
        &mut self,
        conversation: Option<Conversation>,
        stop: Option<(i32, Duration)>,
        life: &mut Life,
    ) -> bool {
        let Some(suspending) = &mut self.suspending else { return false };
        suspending.unwanted.extend(conversation);
        suspending.stop = stop.or(suspending.stop);
        if !suspending.give_up("it was told to go on instead") {
            return true;
        }
        if life.is_freezing() {
            life.go_on(Renewal::default());
        } else if suspending.is_writing
            && let Err(error) = life.vm.cancel_snapshot()
        {
            eprintln!("flyrun: {error}");
        }
        true
    }

    /// The workload stands: its memory is written, unless somebody has thought better of it.
    pub(super) fn on_stands(&mut self, life: &mut Life, place: &Place) {
        trace::step("stands");
        self.learn_now(life);
        let directory = self.snapshot_directory();
        let Some(suspending) = &mut self.suspending else { return life.go_on(Renewal::default()) };
        if suspending.given_up.is_some() {
            return life.go_on(Renewal::default());
        }
        let begun = crate::paths::make_private_dir(&directory)
            .inspect(|()| self.base.iter().for_each(|base| base.keep(&directory)))
            .and_then(|()| life.vm.pause())
            .and_then(|()| life.vm.snapshot(&directory, &place.post).inspect_err(|_| _ = life.vm.resume()));
        match begun {
            Ok(()) => {
                suspending.is_writing = true;
                trace::step("snapshot asked for");
            }
            Err(error) => {
                suspending.give_up(&error.to_string());
                life.go_on(Renewal::default());
            }
        }
    }

    /// The snapshot is complete, or is not to be. `true` when the machine is on disk.
    pub(super) fn on_snapshotted(
        &mut self,
        result: std::result::Result<(), String>,
        life: &mut Life,
        place: &Place,
    ) -> Result<bool> {
        trace::step("snapshot told of");
        let number = place.network.as_ref().map(crate::network::Attached::number);
        let is_given_up = self.suspending.as_ref().is_none_or(|suspending| suspending.given_up.is_some());
        let recorded = result.map_err(Error::new).and_then(|()| {
            if is_given_up {
                return Err(Error::new("it was told to go on instead"));
            }
            let snapshot = Snapshot { taken_at_ms: now_ms(), network_number: number };
            self.machine.settle_in_state(State::Suspended, |record| record.snapshot = Some(snapshot))
        });
        let Err(error) = recorded else {
            trace::step("suspended recorded");
            life.vm.end();
            for mut conversation in self.suspending.take().unwrap_or_default().wanted {
                conversation.reply(&Reply::Done);
            }
            return Ok(true);
        };
        if life.vm.is_lost() {
            // What there is of a snapshot is all that there is.
            return Err(error);
        }
        if let Err(error) = self.invalidate_snapshot() {
            eprintln!("flyrun: {error}");
        }
        if is_given_up {
            life.vm.await_resume()?;
        } else {
            life.vm.resume()?;
        }
        if let Some(suspending) = &mut self.suspending {
            suspending.is_writing = false;
            suspending.give_up(&error.to_string());
        }
        life.go_on(Renewal::default());
        Ok(false)
    }

    /// The VMM was lost while the machine was brought to disk. If the snapshot was whole by then, nothing else was.
    ///
    /// # Errors
    /// `lost`, if it was not.
    pub(super) fn settle_on_disk(&mut self, life: &Life, lost: Error) -> Result<End> {
        if self.machine.record().state != State::Suspending || self.suspending.is_none() {
            return Err(lost);
        }
        // It writes nothing any more then.
        life.vm.end();
        if !self.snapshot_directory().join(SNAPSHOT_STATE).exists() {
            return Err(lost);
        }
        eprintln!("flyrun: the machine is on disk, but for this: {lost}");
        let snapshot = Snapshot { taken_at_ms: now_ms(), network_number: None };
        self.machine.settle_in_state(State::Suspended, |record| record.snapshot = Some(snapshot))?;
        let suspending = self.suspending.take().unwrap_or_default();
        for mut conversation in suspending.wanted {
            conversation.reply(&Reply::Done);
        }
        for mut conversation in suspending.unwanted {
            conversation.reply(&Reply::Failed { message: format!("it is on disk: {lost}") });
        }
        Ok(End::Suspended)
    }

    /// The life that was to come to disk is over without, and another follows. Those who wait find that out.
    pub(super) fn forget_suspend(&mut self, exit_code: u8) {
        let Suspending { wanted, unwanted, .. } = self.suspending.take().unwrap_or_default();
        for mut conversation in wanted.into_iter().chain(unwanted) {
            conversation.reply(&Reply::Ended { exit_code });
        }
    }

    /// The guest would not stand still, and goes on by itself.
    pub(super) fn on_stands_not(&mut self, why: &str) {
        if let Some(suspending) = &mut self.suspending {
            suspending.give_up(why);
        }
    }

    /// The workload runs on after all.
    pub(super) fn on_went_on(&mut self, life: &mut Life) {
        let Some(suspending) = self.suspending.take() else { return };
        if self.machine.record().state == State::Suspending {
            self.try_become(State::Started, |_| {});
        }
        let why = suspending.given_up.unwrap_or_default();
        for mut conversation in suspending.wanted {
            conversation.reply(&Reply::Failed { message: why.clone() });
        }
        for mut conversation in suspending.unwanted {
            conversation.reply(&Reply::Done);
        }
        if let Some((signal, patience)) = suspending.stop {
            self.try_become(State::Stopping, |_| {});
            life.stop(signal, patience);
        }
    }

    /// A restored machine's guest-init has connected: from here on the running machine is what counts.
    ///
    /// # Errors
    /// That cannot be written down, or the host has no randomness for it.
    pub(super) fn commit_resume(&mut self, life: &mut Life, place: &Place) -> Result<()> {
        let renewal = self.renewal(place, life)?;
        if life.vm.is_lost() {
            // Its end is the next event, and the snapshot is as good as before.
            return Ok(());
        }
        let suspended = self.machine.record().clone();
        // Until its `state` is gone, the snapshot is whole: a monitor that is killed before has told the guest nothing.
        self.machine.settle_in_state(State::Started, |record| {
            record.resuming_in_boot = boot_id();
            record.started_at = Some(now());
            record.last_start = Some(LastStart::Resumed);
        })?;
        trace::step("resume recorded");
        if life.vm.is_lost() {
            return Ok(());
        }
        self.invalidate_snapshot()?;
        trace::step("snapshot invalidated");
        // The time last, as writing the record down takes some.
        life.go_on(Renewal { realtime_ns: realtime_ns(), ..renewal });
        let forgotten = self.machine.update(|record| {
            record.snapshot = None;
            record.resuming_in_boot = None;
        });
        if let Err(error) = forgotten {
            eprintln!("flyrun: {error}");
        }
        if !self.view.own_output {
            eprintln!("flyrun: {}", LastStart::Resumed);
        }
        Ledger::new(self.host.paths.usage()).end_suspension(&suspended);
        Ok(())
    }

    /// The memory's file stays: the machine's pages are mapped from it, and the next snapshot needs only what has changed.
    fn invalidate_snapshot(&self) -> Result<()> {
        let state = self.snapshot_directory().join(SNAPSHOT_STATE);
        match fs::remove_file(&state) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            other => other.context(format!("cannot remove {}", state.display())),
        }
    }

    /// Says how a machine that could not be resumed is started instead.
    ///
    /// # Errors
    /// That cannot be written down.
    pub(super) fn fall_back(&mut self, reason: String) -> Result<()> {
        eprintln!("flyrun: {}", LastStart::ColdBoot { reason: Some(reason.clone()), no_base: None });
        Ledger::new(self.host.paths.usage()).end_suspension(self.machine.record());
        self.machine.update(|record| {
            record.snapshot = None;
            record.resuming_in_boot = None;
        })?;
        let _ = fs::remove_dir_all(self.snapshot_directory());
        // One thing that did not go on is enough.
        self.without_base = true;
        self.cold_reason = Some(reason);
        Ok(())
    }

    /// What a restored guest must learn before its workload goes on. Without fresh randomness it must not: another may have gone
    /// on from the same memory.
    fn renewal(&self, place: &Place, life: &Life) -> Result<Renewal> {
        let users = self.view.own_output.then_some(self.view.terminal);
        Ok(Renewal {
            realtime_ns: 0,
            entropy: entropy()?,
            hostname: self.machine.record().config.run.hostname.clone(),
            network: place.network.as_ref().map(|network| network.config.clone()),
            terminal: life.size().or(users).filter(|_| self.machine.record().config.tty),
        })
    }
}

/// The time of day in nanoseconds since the epoch.
pub fn realtime_ns() -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_nanos()).unwrap_or(0)
}

/// Removes what a machine that ends otherwise has of a snapshot.
///
/// # Errors
/// The system's.
pub fn discard(directory: &std::path::Path) -> Result<()> {
    let snapshot = directory.join(SNAPSHOT);
    match fs::remove_dir_all(&snapshot) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.context(format!("cannot remove {}", snapshot.display())),
    }
}
