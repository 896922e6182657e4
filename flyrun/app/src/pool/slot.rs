//! One slot: a machine that is there, or could be.

use std::time::Duration;

use super::{Limits, Moment};
use crate::config::model::AutoStop;

/// A machine that lived shorter has failed, whatever it did.
pub(super) const STABLE: Duration = Duration::from_secs(10);

/// One life of a slot's machine, from a start to its end. Connections belong to a life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Life {
    /// The slot, from 0.
    pub slot: usize,
    /// Raised by each start.
    pub number: u64,
}

/// What a start begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nothing of this slot.
    Cold,
    /// A snapshot of this slot.
    Suspended,
    /// A machine that is being suspended: that is to be given up.
    Suspending,
}

/// The state of a slot. Load is a number of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// There is no machine.
    Cold,
    /// A machine starts.
    Booting {
        /// When that began; `None` while it waits for its turn among others of the host.
        since: Option<Moment>,
        /// From what.
        origin: Origin,
    },
    /// It answers.
    Ready {
        /// Its requests.
        load: u32,
        /// Since when its check fails; it gets no requests then.
        failing: Option<Moment>,
    },
    /// It ends the requests that it has.
    Draining {
        /// Since when.
        since: Moment,
        /// Its requests.
        load: u32,
        /// Why.
        reason: Reason,
        /// Whether its last check passed: else it is not taken back.
        passes: bool,
    },
    /// It has none, and is being suspended or stopped.
    Suspending {
        /// What it will be.
        rest: Rest,
    },
    /// It is on disk.
    Suspended,
}

/// Why a machine gets no more requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Others suffice. It can be taken back.
    Excess,
    /// Another takes its place: it is of an old version, or its check failed for too long.
    Replaced,
}

/// What a machine that is not needed becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Rest {
    Cold,
    Suspended,
}

/// A slot.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub state: State,
    /// The number of its last life.
    pub life: u64,
    /// The deploy that its machine is of.
    pub version: u64,
    /// When its machine was first ready in this life.
    pub ready_at: Moment,
    /// Since when it has no requests.
    pub idle_since: Moment,
    /// It was taken away to be replaced: it is started until it is ready, however few requests there are.
    pub comes_back: bool,
    /// Until then its workload says that it works, though it may have no request.
    pub busy_until: Option<Moment>,
    /// It was started for its snapshot: unless it is needed, it rests as soon as it is ready.
    pub is_prepared: bool,
}

impl Slot {
    pub fn new(version: u64) -> Slot {
        Slot {
            state: State::Cold,
            life: 0,
            version,
            ready_at: Moment::ZERO,
            idle_since: Moment::ZERO,
            comes_back: false,
            busy_until: None,
            is_prepared: false,
        }
    }

    /// The load of a machine that can be given a request.
    pub fn routable(&self) -> Option<u32> {
        match self.state {
            State::Ready { load, failing: None } => Some(load),
            _ => None,
        }
    }

    /// Whether it could end now: it has no request, and its workload does not say that it works.
    pub fn is_idle(&self) -> bool {
        self.routable() == Some(0) && self.busy_until.is_none()
    }

    pub fn load_mut(&mut self) -> Option<&mut u32> {
        match &mut self.state {
            State::Ready { load, .. } | State::Draining { load, .. } => Some(load),
            _ => None,
        }
    }

    /// Whether it counts as running, now or soon.
    pub fn runs(&self) -> bool {
        matches!(self.state, State::Booting { .. } | State::Ready { failing: None, .. })
    }

    /// Whether there is a process that is its machine, or will be in a moment.
    pub fn is_alive(&self) -> bool {
        !matches!(self.state, State::Cold | State::Suspended)
    }

    /// When its state has lasted too long.
    pub fn deadline(&self, limits: &Limits) -> Option<Moment> {
        match self.state {
            State::Booting { since: Some(since), .. } | State::Ready { failing: Some(since), .. } => {
                Some(since.saturating_add(limits.start_timeout))
            }
            State::Draining { since, reason: Reason::Replaced, .. } => {
                Some(since.saturating_add(limits.drain_timeout))
            }
            State::Cold
            | State::Booting { since: None, .. }
            | State::Ready { failing: None, .. }
            | State::Draining { reason: Reason::Excess, .. }
            | State::Suspending { .. }
            | State::Suspended => None,
        }
    }

    /// What becomes of a machine that nobody needs.
    pub fn rest(auto_stop: AutoStop) -> Rest {
        match auto_stop {
            AutoStop::Suspend => Rest::Suspended,
            AutoStop::Stop | AutoStop::Off => Rest::Cold,
        }
    }
}
