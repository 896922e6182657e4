//! Taking a snapshot of a machine that goes on: as a suspend that is undone, but for what is kept.
//!
//! ```text
//! Started ── freeze ──▶ stands ──▶ memory written, disk copied ──▶ goes on ──▶ thawed
//!                                                         └──▶ synced, named (on a thread)
//! ```
//! The record says Started all the time. What is asked of the machine meanwhile, and would have it stand or move, waits; but for a
//! stop, which gives the snapshot up.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use protocol::Renewal;

use super::company::Place;
use super::life::Life;
use super::{Conversation, Monitor, Reply, Request};
use crate::error::{Context, Error, Result};
use crate::machine::{Action, State, Verdict, decide};
use crate::snapshot::{self, Draft, Snapshots};
use crate::vm::spawn as spawn_thread;

/// What is asked for.
#[derive(Debug)]
pub struct Wanted {
    pub id: String,
    pub name: Option<String>,
    pub force: bool,
}

/// A snapshot that is being taken.
#[derive(Debug)]
pub struct Taking {
    /// Until there is a snapshot: who wants it, and where it is made.
    wanted: Option<(Conversation, Draft)>,
    record: snapshot::Record,
    /// Why it is not to be completed.
    why_not: Option<String>,
    given_up: Arc<AtomicBool>,
    is_writing: bool,
    /// How the workload is to be stopped once it runs on: the signal, and the time it has.
    stop: Option<(i32, Duration)>,
    /// What was asked of the machine meanwhile.
    deferred: Vec<Conversation>,
}

impl Taking {
    fn give_up(&mut self, why: &str) {
        self.why_not.get_or_insert_with(|| why.to_string());
        self.given_up.store(true, Ordering::Relaxed);
    }

    /// Tells who wants it that there is none.
    fn refuse(&mut self) {
        let Some((mut conversation, _draft)) = self.wanted.take() else { return };
        let message = self.why_not.clone().unwrap_or_else(|| "it ended before its snapshot was whole".into());
        conversation.reply(&Reply::Failed { message });
    }
}

impl Monitor<'_> {
    /// Begins to take a snapshot.
    pub(super) fn take_snapshot(
        &mut self,
        mut conversation: Conversation,
        wanted: Wanted,
        life: Option<&mut Life>,
    ) {
        let begun = match life {
            Some(life) if !life.has_exited() && !life.is_still() => self.begin_snapshot(&wanted, life),
            _ => decide(self.machine.record(), Action::Suspend)
                .and(Err(Error::new("its process does not run now").advice("Try again."))),
        };
        match begun {
            Ok((draft, record)) => {
                self.taking = Some(Taking {
                    wanted: Some((conversation, draft)),
                    record,
                    why_not: None,
                    given_up: Arc::default(),
                    is_writing: false,
                    stop: None,
                    deferred: Vec::new(),
                });
            }
            Err(error) => conversation.reply(&Reply::Failed { message: error.to_string() }),
        }
    }

    fn begin_snapshot(&self, wanted: &Wanted, life: &mut Life) -> Result<(Draft, snapshot::Record)> {
        let record = self.machine.record();
        if decide(record, Action::Suspend)? == Verdict::Already || record.state != State::Started {
            return Err(Error::new(format!("it is {}", record.state)).advice("Try again."));
        }
        snapshot::check(record)?;
        let draft = Snapshots::new(self.host.paths.snapshots()).begin(&wanted.id)?;
        let record = snapshot::Record::of(record, &wanted.id, wanted.name.as_deref());
        life.freeze(wanted.force);
        if let Some(input) = &self.input {
            input.hold();
        }
        Ok((draft, record))
    }

    /// Keeps a request for later that would come between a machine and its snapshot.
    pub(super) fn defer(&mut self, conversation: Conversation) -> Option<Conversation> {
        let Some(taking) = &mut self.taking else { return Some(conversation) };
        match conversation.request {
            Request::Pause
            | Request::Unpause
            | Request::Suspend { .. }
            | Request::Resume
            | Request::Snapshot { .. }
            | Request::Signal { .. } => {
                taking.deferred.push(conversation);
                None
            }
            Request::Stop { .. }
            | Request::Wait
            | Request::Follow
            | Request::Attach
            | Request::Rename { .. }
            | Request::Update(_) => Some(conversation),
        }
    }

    /// Gives the snapshot up that is being taken, to stop the machine. `false` if there is none.
    pub(super) fn cancel_snapshot(&mut self, stop: (i32, Duration), life: &mut Life) -> bool {
        let Some(taking) = &mut self.taking else { return false };
        taking.stop = Some(stop);
        if taking.why_not.is_some() {
            return true;
        }
        taking.give_up("it was told to end meanwhile");
        if life.is_freezing() {
            life.go_on(Renewal::default());
        } else if taking.is_writing
            && let Err(error) = life.vm.cancel_snapshot()
        {
            eprintln!("flyrun: {error}");
        }
        true
    }

    /// The workload stands: memory is written and the disk copied.
    pub(super) fn on_stands_for_snapshot(&mut self, life: &mut Life, place: &Place) {
        let directory = self.machine.directory().to_path_buf();
        let Some(taking) = &mut self.taking else { return };
        if let Some((_, draft)) = taking.wanted.as_ref().filter(|_| taking.why_not.is_none()) {
            let (target, path, given_up) =
                (draft.snapshot(), draft.path().to_path_buf(), taking.given_up.clone());
            let base = self.base.as_ref();
            let begun = snapshot::link_base(&directory, &target)
                .inspect(|()| base.into_iter().for_each(|base| base.keep(&target)))
                .and_then(|()| life.vm.pause())
                .and_then(|()| {
                    let copy =
                        move || snapshot::copy_disk(&directory, &path, &|| given_up.load(Ordering::Relaxed));
                    let asked = life.vm.snapshot_with(&target, &place.post, copy);
                    asked.inspect_err(|_| _ = life.vm.resume())
                });
            match begun {
                Ok(()) => {
                    taking.is_writing = true;
                    return;
                }
                Err(error) => taking.give_up(&error.to_string()),
            }
        }
        life.go_on(Renewal::default());
    }

    /// All is written, or is not to be: the machine goes on.
    ///
    /// # Errors
    /// It does not.
    pub(super) fn on_snapshot(
        &mut self,
        result: std::result::Result<(), String>,
        life: &mut Life,
    ) -> Result<()> {
        let Some(taking) = &mut self.taking else { return Ok(()) };
        taking.is_writing = false;
        match taking.why_not {
            Some(_) => life.vm.await_resume()?,
            None => life.vm.resume()?,
        }
        life.go_on(Renewal::default());
        if let Err(why) = result {
            taking.give_up(&why);
        }
        if taking.why_not.is_none()
            && let Some((conversation, draft)) = taking.wanted.take()
        {
            let record = taking.record.clone();
            publish(conversation, draft, record).unwrap_or_else(|error| eprintln!("flyrun: {error}"));
        }
        Ok(())
    }

    /// The guest would not stand still, and goes on by itself.
    pub(super) fn on_no_snapshot(&mut self, why: &str) {
        if let Some(taking) = &mut self.taking {
            taking.give_up(why);
        }
    }

    /// The workload runs on.
    pub(super) fn on_went_on_from_snapshot(&mut self, life: &mut Life) {
        let Some(mut taking) = self.taking.take() else { return };
        taking.refuse();
        if let Some((signal, patience)) = taking.stop {
            self.try_become(State::Stopping, |_| {});
            life.stop(signal, patience);
        }
        for conversation in taking.deferred {
            self.answer(conversation, Some(life));
        }
    }

    /// The life is over that a snapshot was to be taken of. Those who asked for something else find that out.
    pub(super) fn forget_snapshot(&mut self) {
        if let Some(mut taking) = self.taking.take() {
            taking.given_up.store(true, Ordering::Relaxed);
            taking.refuse();
        }
    }
}

/// Without the monitor's own thread, as a disk may take its time to sync. If this process ends first there is no snapshot.
fn publish(mut conversation: Conversation, draft: Draft, record: snapshot::Record) -> Result<()> {
    spawn_thread("publish", move || {
        conversation.reply(&match finish(draft, record) {
            Ok(()) => Reply::Done,
            Err(error) => Reply::Failed { message: error.to_string() },
        });
    })
    .context("cannot start a thread")
}

fn finish(draft: Draft, mut record: snapshot::Record) -> Result<()> {
    let header = snapshot::header(&draft.snapshot())?;
    record.taken_at_ms = header.taken_unix_ms;
    if !header.memory.base {
        // Linked, and of no use: the machine's memory was from elsewhere.
        draft.remove_base()?;
    }
    draft.publish(&record)
}
