//! Room for others: a machine that is idle ends before its time when the host has no memory for one that is to start.

use super::slot::Reason;
use super::{Action, Life, Moment, Pool, State};
use crate::config::model::AutoStop;

impl Pool {
    /// The machine that could end now without anybody missing it, and since when it is idle: of those that are, the one that is
    /// longest.
    pub fn idle(&self) -> Option<(Moment, Life)> {
        let ready = self.slots.iter().filter(|slot| slot.routable().is_some()).count() as u32;
        if self.limits.auto_stop == AutoStop::Off || ready <= self.needed_or_busy() {
            return None;
        }
        let lives = self.slots.iter().enumerate().filter(|(_, slot)| slot.is_idle());
        lives.map(|(index, slot)| (slot.idle_since, Life { slot: index, number: slot.life })).min()
    }

    /// Ends a machine that [`Pool::idle`] has named, unless it has a request, or says that it works, by now.
    ///
    /// ## Ready => Draining
    pub fn make_room(&mut self, now: Moment, life: Life) -> Vec<Action> {
        if self.idle().is_some()
            && let Some(slot) = self.of(life)
            && slot.is_idle()
        {
            slot.state = State::Draining { since: now, load: 0, reason: Reason::Excess, passes: true };
        }
        self.settle(now)
    }

    /// How many machines are ending: what they have is free soon.
    pub fn ending(&self) -> usize {
        self.slots.iter().filter(|slot| matches!(slot.state, State::Suspending { .. })).count()
    }
}
