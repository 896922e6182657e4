//! What workers tell of a slot's machine. Whatever is told of a life that is over changes nothing.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use app::pool::{Action, Life, Limits, Moment, Pool};
use page::What;
use tokio::sync::{Notify, watch};

use super::{Ending, Group, Inner, LastStart, Slot};
use crate::error::Error;
use crate::machine::Record;
use crate::machine::restart;
use crate::serve::events::what;
use crate::serve::host::Started;
use crate::serve::template::Template;

impl Group {
    /// What its machines are made from now.
    pub fn template(&self) -> Arc<Template> {
        self.lock().wishes.template.clone()
    }

    /// How long its machines may take to end.
    pub fn drain_timeout(&self) -> Duration {
        self.lock().wishes.limits.drain_timeout
    }

    /// How many machines it may have.
    pub fn max_machines(&self) -> u32 {
        self.lock().wishes.limits.max_machines
    }

    /// Whether other slots are to begin where one has been suspended.
    pub fn scales_out(&self) -> bool {
        self.lock().wishes.limits.max_machines > 1
    }

    /// Whether its machines end and stay.
    pub fn is_leaving(&self) -> bool {
        self.lock().ending == Ending::Stays
    }

    /// Whether its machines end and go, as another group has taken its place.
    pub fn is_retired(&self) -> bool {
        self.lock().ending == Ending::Goes
    }

    fn with_slot<T>(&self, life: Life, change: impl FnOnce(&mut Slot) -> T) -> Option<T> {
        let mut inner = self.lock();
        inner.slots.get_mut(life.slot).filter(|slot| slot.life == life.number).map(change)
    }

    /// Keeps for the page what has happened.
    pub(super) fn shows(&self, inner: &Inner, life: Life, what: What, took: Option<Duration>) {
        let slot = inner.slots.get(life.slot).filter(|slot| slot.life == life.number);
        let Some(slot) = slot else { return };
        // One that was not made yet has no id.
        match &slot.id {
            Some(id) => self.shared.events.add(&self.app, id, what, took),
            None => self.shared.events.add(&self.app, &inner.wishes.template.name(life.slot), what, took),
        }
    }

    /// The turn of a start has come. Whether it is still to begin is told by its life.
    pub fn begins(self: &Arc<Self>, life: Life) {
        self.calms(life);
        self.happens(|pool, now| pool.begun(now, life));
    }

    /// A machine runs; whether it does its work is not known yet.
    pub fn runs(&self, life: Life, started: Started) {
        self.with_slot(life, |slot| {
            slot.id = Some(started.id.clone());
            slot.machine = Some(Arc::new(started));
        });
    }

    /// The machine of a life, once it runs.
    pub fn machine(&self, life: Life) -> Option<Arc<Started>> {
        self.with_slot(life, |slot| slot.machine.clone()).flatten()
    }

    /// A check has failed, and said this.
    pub fn troubles(&self, life: Life, why: String) {
        self.with_slot(life, |slot| slot.trouble = Some(why));
    }

    /// There is nothing wrong any more.
    pub fn calms(&self, life: Life) {
        self.with_slot(life, |slot| slot.trouble = None);
    }

    /// A machine that was started has passed all checks. What tells that it is to be checked at once.
    pub fn ready(self: &Arc<Self>, life: Life, last_start: Option<LastStart>) -> Option<Arc<Notify>> {
        if let Some(last_start) = &last_start {
            self.shared.counts.started(last_start.kind, last_start.took);
            self.shows(&self.lock(), life, what(last_start.kind), Some(last_start.took));
        }
        let recheck = self.with_slot(life, |slot| {
            slot.last_start = last_start.or(slot.last_start.take());
            slot.trouble = None;
            slot.recheck.clone()
        });
        self.happens(|pool, now| pool.ready(now, life));
        self.shared.limits.may_have_room();
        recheck
    }

    /// A start has failed.
    pub fn start_failed(self: &Arc<Self>, life: Life, error: &Error) {
        self.shared.counts.start_failed();
        self.shows(&self.lock(), life, What::Failed, None);
        let id = self.line_of("start failed", life).with("why", error.to_string()).end_with_id();
        self.with_slot(life, |slot| {
            slot.over.send_replace(true);
            slot.trouble = Some(error.to_string());
            slot.failure = Some((life.number, id));
        });
        self.lock().fails_trial(life, error.to_string());
        self.happens(|pool, now| pool.start_failed(now, life));
    }

    /// All checks of a machine that is ready have been made since the last word, or one has failed.
    pub fn checked(self: &Arc<Self>, life: Life, told: Result<(), String>) {
        let passed = told.is_ok();
        let changed = self.with_slot(life, |slot| {
            // One that was under way when the machine was lost says nothing any more.
            (!slot.is_ending).then(|| {
                let changed = slot.trouble.is_none() != passed;
                slot.trouble = told.err();
                changed.then(|| slot.trouble.clone())
            })
        });
        let Some(Some(changed)) = changed else { return };
        if let Some(trouble) = changed {
            let event = if passed { "check passes again" } else { "check failed" };
            self.line_of(event, life).with_some("why", trouble).end();
        }
        self.happens(|pool, now| pool.checked(now, life, passed));
    }

    /// `[checks]` have been made.
    pub fn named_checked(&self, life: Life, name: &str, told: Result<(), String>) {
        self.with_slot(life, |slot| {
            slot.named.retain(|(known, _)| known != name);
            slot.named.extend(told.err().map(|why| (name.to_string(), why)));
        });
    }

    /// A request could not connect: the machine gets no other before a check, which comes at once.
    pub fn suspect(self: &Arc<Self>, life: Life, why: &str) {
        let recheck = self.with_slot(life, |slot| (!slot.is_ending).then(|| slot.recheck.clone()));
        if let Some(Some(recheck)) = recheck {
            self.checked(life, Err(why.to_string()));
            recheck.notify_one();
        }
    }

    /// A check is to come soon.
    pub fn recheck(&self, life: Life) {
        self.with_slot(life, |slot| slot.recheck.notify_one());
    }

    /// A machine's workload works for so long, as it says, whether it has requests or not; or not any more.
    pub fn busy(self: &Arc<Self>, life: Life, time: Duration) {
        let now = Instant::now();
        let changed = self.with_slot(life, |slot| {
            let was_busy = slot.busy_until.is_some_and(|until| until > now);
            slot.busy_until = (!time.is_zero()).then(|| now + time);
            was_busy == time.is_zero()
        });
        if changed == Some(true) {
            self.line_of(if time.is_zero() { "busy no more" } else { "busy" }, life).end();
        }
        self.happens(|pool, now| pool.busy(now, life, time));
    }

    /// A machine is on disk, or stopped, as it was asked to.
    pub fn at_rest(self: &Arc<Self>, life: Life) {
        self.happens(|pool, now| pool.at_rest(now, life));
    }

    /// A machine could not be suspended, and runs on. What tells of its end now.
    pub fn rest_failed(
        self: &Arc<Self>,
        life: Life,
        why: &str,
    ) -> Option<(watch::Receiver<bool>, Arc<Notify>)> {
        self.line_of("suspend failed", life).with("why", why).end();
        let renewed = self.with_slot(life, |slot| {
            slot.is_ending = false;
            slot.renew();
            (slot.over.subscribe(), slot.recheck.clone())
        });
        self.happens(|pool, now| pool.rest_failed(now, life));
        renewed
    }

    /// A machine's monitor has left. `false` if that was ordered.
    pub fn loses(self: &Arc<Self>, life: Life) -> bool {
        let unexpected = self.with_slot(life, |slot| {
            slot.over.send_replace(true);
            !std::mem::replace(&mut slot.is_ending, true)
        });
        if unexpected != Some(true) {
            return false;
        }
        // No request goes there while it is found out what has become of it.
        self.happens(|pool, now| pool.checked(now, life, false));
        true
    }

    /// A machine has ended by itself, after so long.
    pub fn died(self: &Arc<Self>, life: Life, record: Option<&Record>, lasted: Duration) {
        self.shared.counts.died();
        let outcome = record.and_then(|record| record.outcome.as_ref());
        let line = self
            .line_of("machine ended", life)
            .with_some("machine", record.map(|record| record.id.as_str()))
            .with_some("exit_code", outcome.map(|outcome| outcome.exit_code))
            .with_some("why", outcome.and_then(|outcome| outcome.error.as_deref()));
        let id = line.end_with_id();
        self.with_slot(life, |slot| slot.failure = Some((life.number, id)));
        let succeeded = outcome.is_some_and(|outcome| outcome.exit_code == 0 && outcome.error.is_none());
        let mut inner = self.lock();
        if !succeeded {
            inner.fails_trial(life, ended(record));
        }
        self.shows(&inner, life, if succeeded { What::Stopped } else { What::Failed }, None);
        let now = self.shared.now();
        if !inner.starts_again(succeeded, lasted) {
            self.line_of("machine is not started again", life).end();
            let actions = inner.finish(now);
            self.follow(&mut inner, actions);
        }
        let actions = Pool::died(&mut inner.pool, now, life);
        self.follow(&mut inner, actions);
        if let Some(slot) = inner.slots.get(life.slot).filter(|slot| slot.life == life.number) {
            slot.forget(life);
        }
    }
}

impl Inner {
    /// Whether a process that has ended after so long starts again, for all that its policy says.
    pub(super) fn starts_again(&mut self, succeeded: bool, lasted: Duration) -> bool {
        let life = restart::Life { succeeded, stopped: false, lasted };
        match self.wishes.restart {
            // Requests and min_machines_running tell.
            None => true,
            Some(policy) => self.restarts.after(policy, life).is_some(),
        }
    }

    /// Does not start that one again, until there is a new version.
    pub(super) fn finish(&mut self, now: Moment) -> Vec<Action> {
        self.finished = self.finished.saturating_add(1);
        let limits = self.limits();
        self.pool.limit(now, limits)
    }

    /// What the pool is to go by.
    pub(super) fn limits(&self) -> Limits {
        let limits = self.wishes.limits;
        Limits { min_running: limits.min_running.saturating_sub(self.finished), ..limits }
    }
}

/// What became of a machine that has ended by itself.
fn ended(record: Option<&Record>) -> String {
    match record.and_then(|record| record.outcome.as_ref()) {
        Some(outcome) => match &outcome.error {
            Some(why) => format!("it has ended: {why}"),
            None => format!("its process has ended with exit code {}", outcome.exit_code),
        },
        None => "it is gone".to_string(),
    }
}

/// How a machine came to run just now.
pub fn last_start(started: &Started, took: Duration) -> Option<LastStart> {
    started.kind.map(|kind| LastStart { kind, at: SystemTime::now(), took })
}
