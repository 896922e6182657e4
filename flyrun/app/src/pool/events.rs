//! What happens to a pool. Each event changes what it is about; [`Pool::settle`] draws the conclusions.

use std::time::Duration;

use super::slot::{Reason, Rest, STABLE};
use super::{Action, Life, Moment, Origin, Pool, Refusal, Request, Slot, State, Whom};

/// When to ask again, where nothing tells how long it will take.
const SOON: Duration = Duration::from_secs(1);

impl Pool {
    /// A request has come.
    pub fn request(&mut self, now: Moment, request: Request) -> Vec<Action> {
        self.request_for(now, request, Whom::Any, &[])
    }

    /// A request has come that knows whom it is for. Slots in `not` have failed it already: it gets another, if another has
    /// room at this moment.
    pub fn request_for(&mut self, now: Moment, request: Request, whom: Whom, not: &[usize]) -> Vec<Action> {
        let (named, only) = match whom {
            Whom::Any => (None, None),
            Whom::Rather(slot) => (Some(slot), None),
            Whom::Only(slot) => (Some(slot), Some(slot)),
        };
        if only.is_some_and(|slot| slot >= self.slots.len()) {
            self.refuse(request, Refusal::NoSuchSlot, Duration::ZERO);
            return self.settle(now);
        }
        let has_room = |slot: &usize| self.has_room(*slot) && !not.contains(slot);
        let direct = match named.filter(has_room) {
            None if only.is_none() => self.pick_but(not),
            named => named,
        };
        if let Some(index) = direct {
            // Nobody waits who could have had it.
            self.forward_to(index, request);
        } else if self.pick_for(only).is_none() && self.queue.len() >= self.limits.queue_limit {
            self.refuse(request, Refusal::QueueFull, SOON);
        } else {
            self.queue.push(request, now.saturating_add(self.limits.queue_timeout), only);
        }
        self.settle(now)
    }

    /// The client of a request that waits has left.
    pub fn cancelled(&mut self, now: Moment, request: Request) -> Vec<Action> {
        self.queue.remove(request);
        self.settle(now)
    }

    /// A request that was forwarded is over: answered, failed, or its client has left.
    pub fn ended(&mut self, now: Moment, life: Life) -> Vec<Action> {
        if let Some(slot) = self.of(life)
            && let Some(load) = slot.load_mut()
        {
            *load = load.saturating_sub(1);
            slot.idle_since = now;
        }
        self.settle(now)
    }

    /// The turn of a start has come: from now on its time runs.
    pub fn begun(&mut self, now: Moment, life: Life) -> Vec<Action> {
        if let Some(slot) = self.of(life)
            && let State::Booting { since: since @ None, .. } = &mut slot.state
        {
            *since = Some(now);
        }
        self.settle(now)
    }

    /// A machine that was started runs, and its check passes.
    ///
    /// ## Booting => Ready
    pub fn ready(&mut self, now: Moment, life: Life) -> Vec<Action> {
        if let Some(slot) = self.of(life)
            && matches!(slot.state, State::Booting { .. })
        {
            slot.state = State::Ready { load: 0, failing: None };
            slot.ready_at = now;
            slot.idle_since = now;
            slot.comes_back = false;
            self.boots.lift();
        }
        self.settle(now)
    }

    /// A start has failed, and nothing of it is left but the log.
    ///
    /// ## Booting => Cold, and on to Booting if it was a resume
    pub fn start_failed(&mut self, now: Moment, life: Life) -> Vec<Action> {
        if let Some(slot) = self.of(life)
            && let State::Booting { origin, .. } = slot.state
        {
            self.boot_failed(now, life, origin);
        }
        self.settle(now)
    }

    /// What a snapshot could not do, a boot may, at once; what a boot could not do, needs a pause.
    pub(super) fn boot_failed(&mut self, now: Moment, life: Life, origin: Origin) {
        let Some(slot) = self.of(life) else { return };
        slot.state = State::Cold;
        match origin {
            Origin::Cold => self.boots.failed(now, life),
            Origin::Suspended | Origin::Suspending if self.boots.forbids(now).is_none() => {
                self.start(life.slot)
            }
            Origin::Suspended | Origin::Suspending => {}
        }
    }

    /// A check of a machine that is ready, or was, has been made.
    pub fn checked(&mut self, now: Moment, life: Life, passed: bool) -> Vec<Action> {
        match self.of(life).map(|slot| &mut slot.state) {
            Some(State::Ready { failing, .. }) => {
                *failing = if passed { None } else { failing.or(Some(now)) };
            }
            Some(State::Draining { passes, .. }) => *passes = passed,
            _ => {}
        }
        self.settle(now)
    }

    /// The workload of a machine says that it works for so long, whether it has requests or not; no time takes that back.
    ///
    /// ## Draining => Ready, Suspending => Booting, where nobody else is to take its place
    pub fn busy(&mut self, now: Moment, life: Life, time: Duration) -> Vec<Action> {
        let version = self.version;
        if let Some(slot) = self.of(life).filter(|slot| slot.is_alive()) {
            slot.busy_until = (!time.is_zero()).then(|| now.saturating_add(time));
            let is_needed = slot.busy_until.is_some() && slot.version == version;
            match slot.state {
                State::Draining { load, reason: Reason::Excess, passes, .. } if is_needed => {
                    slot.state = State::Ready { load, failing: (!passes).then_some(now) };
                }
                State::Suspending { rest: Rest::Suspended } if is_needed => self.start(life.slot),
                _ => {}
            }
        }
        self.settle(now)
    }

    /// A machine has been suspended or stopped, as it was asked to.
    ///
    /// ## Suspending => (Suspended | Cold)
    pub fn at_rest(&mut self, now: Moment, life: Life) -> Vec<Action> {
        let version = self.version;
        if let Some(slot) = self.of(life)
            && let State::Suspending { rest } = slot.state
        {
            let is_old = slot.version != version;
            slot.state = match rest {
                Rest::Suspended if !is_old => State::Suspended,
                Rest::Suspended | Rest::Cold => State::Cold,
            };
            slot.version = version;
            if rest == Rest::Suspended && is_old {
                self.actions.push(Action::Discard(life));
            }
        }
        self.settle(now)
    }

    /// A machine could not be suspended, and runs on.
    ///
    /// ## Suspending => Ready
    pub fn rest_failed(&mut self, now: Moment, life: Life) -> Vec<Action> {
        if let Some(slot) = self.of(life)
            && matches!(slot.state, State::Suspending { rest: Rest::Suspended })
        {
            slot.state = State::Ready { load: 0, failing: None };
            slot.idle_since = now;
            // Or it would be tried again at once.
            self.quiet = None;
        }
        self.settle(now)
    }

    /// A machine has ended by itself, or its snapshot is gone.
    ///
    /// ## (Booting | Ready | Draining | Suspending | Suspended) => Cold
    pub fn died(&mut self, now: Moment, life: Life) -> Vec<Action> {
        let version = self.version;
        if let Some(slot) = self.of(life) {
            match slot.state {
                State::Booting { origin, .. } => self.boot_failed(now, life, origin),
                State::Ready { .. } => {
                    slot.state = State::Cold;
                    slot.version = version;
                    if now.saturating_sub(slot.ready_at) < STABLE {
                        self.boots.died(now, life);
                    } else {
                        self.boots.succeeded();
                    }
                }
                State::Draining { .. } | State::Suspending { .. } | State::Suspended => {
                    slot.state = State::Cold;
                    slot.version = version;
                }
                State::Cold => {}
            }
        }
        self.settle(now)
    }

    /// There is a new version. Machines that run are replaced one after another; what is suspended or starts goes at once.
    pub fn deploy(&mut self, now: Moment) -> Vec<Action> {
        self.version += 1;
        self.boots.succeeded();
        for (index, slot) in self.slots.iter_mut().enumerate() {
            let life = Life { slot: index, number: slot.life };
            match slot.state {
                State::Cold => {}
                State::Booting { .. } => {
                    self.actions.push(Action::Kill(life));
                    slot.comes_back = true;
                }
                State::Suspended => self.actions.push(Action::Discard(life)),
                State::Ready { .. } | State::Draining { .. } | State::Suspending { .. } => continue,
            }
            slot.state = State::Cold;
            slot.version = self.version;
        }
        self.settle(now)
    }

    /// Time has passed: to be called at [`Pool::next_tick`], and whenever else.
    pub fn tick(&mut self, now: Moment) -> Vec<Action> {
        while let Some(request) = self.queue.pop_expired(now) {
            self.refuse(request, Refusal::TimedOut, SOON);
        }
        let limits = self.limits;
        for index in 0..self.slots.len() {
            let Some(slot) = self.slots.get_mut(index) else { continue };
            if slot.deadline(&limits).is_none_or(|deadline| now < deadline) {
                continue;
            }
            let life = Life { slot: index, number: slot.life };
            match slot.state {
                State::Booting { origin, .. } => {
                    self.actions.push(Action::Kill(life));
                    self.boot_failed(now, life, origin);
                }
                State::Ready { load, .. } => {
                    slot.comes_back = true;
                    let reason = Reason::Replaced;
                    slot.state = State::Draining { since: now, load, reason, passes: false };
                }
                State::Draining { .. } => {
                    slot.state = State::Suspending { rest: Rest::Cold };
                    self.actions.push(Action::Stop(life));
                }
                State::Cold | State::Suspending { .. } | State::Suspended => {}
            }
        }
        self.settle(now)
    }

    /// The slot of a life that is not over.
    pub(super) fn of(&mut self, life: Life) -> Option<&mut Slot> {
        self.slots.get_mut(life.slot).filter(|slot| slot.life == life.number)
    }
}
