//! A group that is to take another's place, and one whose place is taken: `serve::deploy` asks for each step.

use std::sync::Arc;

use app::config::model::AutoStop;
use app::pool::{Life, Limits, State};
use tokio::sync::watch;

use super::{Ending, Group, Inner, Shared, Wishes};
use crate::machine::restart::Restarts;
use crate::serve::worker::Order;

/// What is known of machines that are tried.
#[derive(Clone, Debug, Default)]
pub(super) struct Trial {
    /// The first machine that does not do its work.
    failure: Option<Failure>,
}

/// A machine that does not do its work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub machine: String,
    pub why: String,
}

/// How far a trial is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    Goes {
        /// The names of the machines that pass their checks, or have done their work.
        ready: Vec<String>,
        /// What a check of one that is not ready said the last time.
        trouble: Option<Failure>,
    },
    Failed(Failure),
}

impl Inner {
    /// Machines that are stopped go too, from this slot on.
    pub(super) fn discard_resting(&mut self, from: usize) {
        let slots = self.pool.slots().skip(from).filter(|(_, state)| *state == State::Cold);
        for slot in slots.filter_map(|(life, _)| self.slots.get(life.slot)) {
            let _ = slot.orders.send(Order::Discard);
        }
    }

    /// A machine has failed; in a trial that counts.
    pub(super) fn fails_trial(&mut self, life: Life, why: String) {
        let machine = self.wishes.template.name(life.slot);
        if let Some(trial) = &mut self.trial {
            trial.failure.get_or_insert(Failure { machine, why });
        }
    }
}

impl Group {
    /// A group without machines, none of which is given a request until the trial is over.
    pub fn on_trial(shared: Arc<Shared>, wishes: Wishes) -> Arc<Group> {
        let limits = Limits { max_machines: 0, min_running: 0, ..wishes.limits };
        let group = Group::new(shared, wishes, limits);
        group.lock().trial = Some(Trial::default());
        group.shared.runtime.spawn(group.clone().keep_time());
        group
    }

    /// Has so many machines run from now on, whether anybody needs them or not.
    pub fn target(self: &Arc<Self>, count: u32) {
        let mut inner = self.lock();
        let limits = Limits {
            max_machines: count,
            min_running: count.saturating_sub(inner.finished),
            auto_stop: AutoStop::Off,
            auto_start: true,
            ..inner.wishes.limits
        };
        let now = self.shared.now();
        let actions = inner.pool.limit(now, limits);
        self.follow(&mut inner, actions);
    }

    /// How the trial goes.
    pub fn standing(&self) -> Standing {
        let inner = self.lock();
        if let Some(failure) = inner.trial.as_ref().and_then(|trial| trial.failure.clone()) {
            return Standing::Failed(failure);
        }
        let template = &inner.wishes.template;
        let (mut ready, mut trouble) = (Vec::new(), None);
        for (life, state) in inner.pool.slots() {
            let slot = inner.slots.get(life.slot);
            match state {
                State::Ready { failing: None, .. } => ready.push(template.name(life.slot)),
                State::Cold if inner.finished > 0 => ready.push(template.name(life.slot)),
                _ => {
                    trouble = trouble.or_else(|| {
                        let why = slot?.trouble.clone()?;
                        Some(Failure { machine: template.name(life.slot), why })
                    });
                }
            }
        }
        Standing::Goes { ready, trouble }
    }

    /// Whether something is asked of its machines before they are ready.
    pub fn has_checks(&self) -> bool {
        let probes = &self.lock().wishes.probes;
        !(probes.gates.is_empty() && probes.named.is_empty())
    }

    /// Tells whenever something has happened from now on.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// How many of its machines run, are about to, or have not ended yet.
    pub fn alive(&self) -> usize {
        self.lock().pool.alive()
    }

    /// The group has passed, and is as the file says from now on. Machines that nobody needs rest at once, if that is wanted.
    pub fn passes_trial(self: &Arc<Self>, rests_at_once: bool) {
        let mut inner = self.lock();
        inner.trial = None;
        let now = self.shared.now();
        let limits = inner.limits();
        let actions = inner.pool.settle_down(now, limits, rests_at_once);
        self.follow(&mut inner, actions);
        let actions = inner.pool.prepare(now);
        self.follow(&mut inner, actions);
    }

    /// Starts no machine any more: what runs is to be replaced.
    pub fn freeze(self: &Arc<Self>) {
        self.happens(|pool, now| pool.freeze(now));
    }

    /// All machines end, when their requests have, and leave nothing that runs or is on disk: another is to have what they have.
    pub fn clears_out(self: &Arc<Self>) {
        let mut inner = self.lock();
        let limits = Limits { max_machines: 0, min_running: 0, auto_start: false, ..inner.wishes.limits };
        let now = self.shared.now();
        let actions = inner.pool.limit(now, limits);
        self.follow(&mut inner, actions);
    }

    /// One machine ends, when its requests have.
    pub fn gives_way(self: &Arc<Self>) {
        self.happens(|pool, now| pool.give_way(now));
    }

    /// What was to take its place does not: it goes on, with as many machines as it had.
    pub fn comes_back(self: &Arc<Self>, count: usize) {
        let mut inner = self.lock();
        let now = self.shared.now();
        let limits = inner.limits();
        inner.restarts = Restarts::default();
        let actions = inner.pool.bring_back(now, limits, count);
        self.follow(&mut inner, actions);
        let actions = inner.pool.prepare(now);
        self.follow(&mut inner, actions);
    }

    /// Its machines end, each when its requests have, and go. Then the group's tasks end too.
    pub fn retire(self: &Arc<Self>) {
        let mut inner = self.lock();
        inner.ending = Ending::Goes;
        let now = self.shared.now();
        let actions = inner.pool.retire(now);
        self.follow(&mut inner, actions);
        inner.discard_resting(0);
        self.sooner.notify_one();
    }
}
