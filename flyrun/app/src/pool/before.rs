//! What a pool is told before there are requests, or beside them: machines that are there already, other limits, and that a
//! snapshot is to be made.

use super::{Action, Life, Limits, Moment, Origin, Pool, Slot, State};
use crate::config::model::AutoStop;

/// A machine that was there before its pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// It is on disk, and of the current version.
    Suspended,
    /// It runs; whether its check passes is not known. The answer is as to a start.
    Running {
        /// It is of a version that is gone, and is to be replaced.
        is_old: bool,
    },
}

impl Pool {
    /// Takes a machine over that its owner has found, before anything else is told of its slot. `None` if there is no such slot.
    ///
    /// ## Cold => (Suspended | Booting)
    pub fn found(&mut self, now: Moment, index: usize, found: Found) -> Option<Life> {
        if index >= self.limits.max_machines as usize {
            return None;
        }
        while self.slots.len() <= index {
            self.slots.push(Slot::new(self.version));
        }
        let version = self.version;
        let slot = self.slots.get_mut(index).filter(|slot| slot.state == State::Cold)?;
        slot.life += 1;
        slot.state = match found {
            Found::Suspended => State::Suspended,
            Found::Running { is_old } => {
                slot.version = version - u64::from(is_old);
                State::Booting { since: Some(now), origin: Origin::Cold }
            }
        };
        Some(Life { slot: index, number: slot.life })
    }

    /// Makes sure that there is something to go on from, where machines are suspended: unless one runs or is on disk, one starts,
    /// and is suspended as soon as it is ready. A start that fails is tried again.
    pub fn prepare(&mut self, now: Moment) -> Vec<Action> {
        let is_there = self.slots.iter().any(|slot| slot.state != State::Cold);
        if self.limits.auto_stop == AutoStop::Suspend && !is_there {
            if self.slots.is_empty() {
                self.slots.push(Slot::new(self.version));
            }
            if let Some(slot) = self.slots.first_mut() {
                slot.comes_back = true;
                slot.is_prepared = true;
            }
        }
        self.settle(now)
    }

    /// Goes by other limits from now on. Machines beyond their number end as in a deploy, and do not come back.
    pub fn limit(&mut self, now: Moment, limits: Limits) -> Vec<Action> {
        self.limits = limits;
        self.quiet = None;
        for (index, slot) in self.slots.iter_mut().enumerate().skip(limits.max_machines as usize) {
            let life = Life { slot: index, number: slot.life };
            slot.comes_back = false;
            match slot.state {
                State::Booting { .. } => self.actions.push(Action::Kill(life)),
                State::Suspended => self.actions.push(Action::Discard(life)),
                State::Cold | State::Ready { .. } | State::Draining { .. } | State::Suspending { .. } => {
                    continue;
                }
            }
            slot.state = State::Cold;
        }
        self.settle(now)
    }
}
