//! A pool whose machines are replaced by another pool's, as in a deploy: the one gives way while the other takes over, and either
//! can have it all in the end.

use super::slot::Reason;
use super::{Action, Life, Limits, Moment, Pool, Refusal, Slot, State};
use crate::config::model::AutoStop;

impl Pool {
    /// How many machines run, are about to, or have not ended yet.
    pub fn alive(&self) -> usize {
        self.slots.iter().filter(|slot| slot.is_alive()).count()
    }

    /// Starts no machine any more, and ends none by itself: what runs is to be replaced one by one.
    pub fn freeze(&mut self, now: Moment) -> Vec<Action> {
        self.limits = Limits { min_running: 0, auto_start: false, auto_stop: AutoStop::Off, ..self.limits };
        self.slots.iter_mut().for_each(|slot| slot.comes_back = false);
        self.settle(now)
    }

    /// One machine ends for good, the one that is missed least: its requests end first.
    ///
    /// ## Booting => Cold, Ready => Draining
    pub fn give_way(&mut self, now: Moment) -> Vec<Action> {
        let rank = |slot: &Slot| match slot.state {
            State::Booting { .. } => Some((0, 0)),
            State::Ready { load, failing: Some(_) } => Some((1, load)),
            State::Ready { load, failing: None } => Some((2, load)),
            State::Cold | State::Draining { .. } | State::Suspending { .. } | State::Suspended => None,
        };
        let slots = self.slots.iter().enumerate();
        let least = slots.filter_map(|(index, slot)| Some((rank(slot)?, index))).min();
        if let Some((_, index)) = least {
            self.end_for_good(now, index);
        }
        self.settle(now)
    }

    /// All machines end, each when its requests have, and nothing is left of them. Who waits for one is refused at once.
    ///
    /// ## Booting, Suspended => Cold, Ready => Draining
    pub fn retire(&mut self, now: Moment) -> Vec<Action> {
        self.limits = Limits { max_machines: 0, min_running: 0, auto_start: false, ..self.limits };
        self.quiet = None;
        (0..self.slots.len()).for_each(|index| self.end_for_good(now, index));
        while let Some(request) = self.queue.pop_any() {
            self.refuse(request, Refusal::NotStarted, Moment::ZERO);
        }
        self.settle(now)
    }

    fn end_for_good(&mut self, now: Moment, index: usize) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        let life = Life { slot: index, number: slot.life };
        slot.comes_back = false;
        match slot.state {
            State::Booting { .. } => {
                self.actions.push(Action::Kill(life));
                slot.state = State::Cold;
            }
            State::Suspended => {
                self.actions.push(Action::Discard(life));
                slot.state = State::Cold;
            }
            State::Ready { load, .. } | State::Draining { load, .. } => {
                slot.state = State::Draining { since: now, load, reason: Reason::Replaced, passes: false };
            }
            State::Cold | State::Suspending { .. } => {}
        }
    }

    /// Goes by these limits again, and has at least so many machines run until they are ready.
    pub fn bring_back(&mut self, now: Moment, limits: Limits, count: usize) -> Vec<Action> {
        let count = count.min(limits.max_machines as usize);
        while self.slots.len() < count {
            self.slots.push(Slot::new(self.version));
        }
        let missing = count.saturating_sub(self.slots.iter().filter(|slot| slot.runs()).count());
        let ended = self.slots.iter_mut().filter(|slot| !slot.runs()).take(missing);
        ended.for_each(|slot| slot.comes_back = true);
        self.limit(now, limits)
    }

    /// Goes by these limits from now on. Machines that nobody needs rest at once, if that is wanted.
    pub fn settle_down(&mut self, now: Moment, limits: Limits, rests_at_once: bool) -> Vec<Action> {
        for slot in &mut self.slots {
            slot.is_prepared |= rests_at_once && slot.routable().is_some();
        }
        self.limit(now, limits)
    }
}
