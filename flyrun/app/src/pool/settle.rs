//! The conclusions: who is forwarded, what starts, what ends. Called after every event, and changes nothing when called twice.

use super::slot::{Reason, Rest};
use super::{Action, Life, Moment, Origin, Pool, Quiet, Refusal, Request, Slot, State};
use crate::config::model::AutoStop;

impl Pool {
    /// Draws every conclusion that can be drawn now.
    pub(super) fn settle(&mut self, now: Moment) -> Vec<Action> {
        for slot in &mut self.slots {
            slot.busy_until.take_if(|until| *until <= now);
        }
        self.forward();
        self.replace_one(now);
        self.start_needed(now);
        self.start_wanted(now);
        self.give_up_starts();
        self.forward();
        self.refuse_hopeless(now);
        self.rest_prepared(now);
        self.end_unneeded(now);
        self.rest_drained();
        std::mem::take(&mut self.actions)
    }

    /// The machine for the next request: the least loaded below its hard limit, which is below the soft one if any is.
    pub(super) fn pick(&self) -> Option<usize> {
        self.pick_but(&[])
    }

    /// As [`Self::pick`], without these.
    pub(super) fn pick_but(&self, not: &[usize]) -> Option<usize> {
        let loads = self.slots.iter().enumerate().filter_map(|(index, slot)| Some((slot.routable()?, index)));
        let able = loads.filter(|(load, index)| *load < self.limits.hard_limit && !not.contains(index));
        able.min().map(|(_, index)| index)
    }

    /// As [`Self::pick`], for a request that can be for one slot alone.
    pub(super) fn pick_for(&self, only: Option<usize>) -> Option<usize> {
        match only {
            None => self.pick(),
            Some(slot) => self.has_room(slot).then_some(slot),
        }
    }

    /// Whether this slot's machine can be given a request.
    pub(super) fn has_room(&self, slot: usize) -> bool {
        let load = self.slots.get(slot).and_then(Slot::routable);
        load.is_some_and(|load| load < self.limits.hard_limit)
    }

    fn forward(&mut self) {
        for slot in self.queue.wanted() {
            while self.has_room(slot)
                && let Some(request) = self.queue.pop_for(slot)
            {
                self.forward_to(slot, request);
            }
        }
        while self.queue.free() > 0
            && let Some(index) = self.pick()
            && let Some(request) = self.queue.pop()
        {
            self.forward_to(index, request);
        }
    }

    /// To a slot that has room.
    pub(super) fn forward_to(&mut self, index: usize, request: Request) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        let life = Life { slot: index, number: slot.life };
        if let Some(load) = slot.load_mut() {
            *load += 1;
            self.actions.push(Action::Forward { request, life });
        }
    }

    /// After a deploy machines go one by one: the next when the last one's place is taken.
    ///
    /// ## Ready => Draining
    fn replace_one(&mut self, now: Moment) {
        let is_moving = |slot: &Slot| {
            let replaced = matches!(slot.state, State::Draining { reason: Reason::Replaced, .. });
            replaced || slot.comes_back || matches!(slot.state, State::Booting { .. })
        };
        if self.slots.iter().any(is_moving) {
            return;
        }
        let (version, most) = (self.version, self.limits.max_machines as usize);
        let slots = self.slots.iter_mut().enumerate().map(|(index, slot)| (index < most, slot));
        let old = slots.filter(|(has_place, slot)| slot.version != version || !has_place);
        let ready = old.filter_map(|(has_place, slot)| match slot.state {
            State::Ready { load, .. } => Some((load, has_place, slot)),
            _ => None,
        });
        if let Some((load, has_place, slot)) = ready.min_by_key(|(load, ..)| *load) {
            slot.comes_back = has_place;
            let passes = matches!(slot.state, State::Ready { failing: None, .. });
            slot.state = State::Draining { since: now, load, reason: Reason::Replaced, passes };
        }
    }

    /// How many machines the requests need that there are.
    pub(super) fn needed(&self) -> u32 {
        let load = |slot: &Slot| match slot.state {
            State::Ready { load, .. } => u64::from(load),
            _ => 0,
        };
        let all = self.slots.iter().map(load).sum::<u64>() + self.queue.free() as u64;
        u32::try_from(all.div_ceil(u64::from(self.limits.soft_limit.max(1)))).unwrap_or(u32::MAX)
    }

    /// How many of those that are ready are to go on.
    pub(super) fn needed_or_busy(&self) -> u32 {
        let is_busy = |slot: &&Slot| slot.busy_until.is_some() && slot.routable().is_some();
        let busy = self.slots.iter().filter(is_busy).count() as u32;
        self.needed().max(self.limits.min_running).max(busy)
    }

    fn running(&self) -> u32 {
        self.slots.iter().filter(|slot| slot.runs()).count() as u32
    }

    /// How many are to run.
    fn target(&self) -> u32 {
        let demand = if self.limits.auto_start { self.needed() } else { 0 };
        demand.max(self.limits.min_running).min(self.limits.max_machines)
    }

    /// Whether a machine would be started if boots were allowed now.
    pub(super) fn wants_boot(&self) -> bool {
        let most = self.limits.max_machines as usize;
        let can_boot =
            self.slots.len() < most || self.slots.iter().take(most).any(|slot| slot.state == State::Cold);
        can_boot && (self.running() < self.target() || self.slots.iter().take(most).any(Self::is_missed))
    }

    fn is_missed(slot: &Slot) -> bool {
        slot.comes_back && slot.state == State::Cold
    }

    fn start_needed(&mut self, now: Moment) {
        let may_boot = self.boots.forbids(now).is_none();
        let missed: Vec<usize> = (0..self.slots.len().min(self.limits.max_machines as usize))
            .filter(|index| self.slots.get(*index).is_some_and(Self::is_missed))
            .collect();
        for index in missed.into_iter().filter(|_| may_boot) {
            self.start(index);
        }
        while self.running() < self.target() {
            let Some(index) = self.startable(may_boot) else { break };
            self.start(index);
        }
    }

    /// How soon a slot can answer that does not now, the soonest first; `None` if it cannot be started.
    fn rank(slot: &Slot, version: u64, may_boot: bool) -> Option<u32> {
        match slot.state {
            State::Draining { reason: Reason::Excess, passes: true, .. } if slot.version == version => {
                Some(0)
            }
            State::Suspending { rest: Rest::Suspended } if slot.version == version => Some(1),
            State::Suspended => Some(2),
            State::Cold if may_boot => Some(3),
            _ => None,
        }
    }

    /// Starts the slots that somebody waits for who takes no other.
    fn start_wanted(&mut self, now: Moment) {
        if !self.limits.auto_start {
            return;
        }
        let may_boot = self.boots.forbids(now).is_none();
        let wanted = self.queue.wanted().into_iter();
        for index in wanted.filter(|index| *index < self.limits.max_machines as usize).collect::<Vec<_>>() {
            let rank = self.slots.get(index).and_then(|slot| Self::rank(slot, self.version, may_boot));
            if rank.is_some() {
                self.start(index);
            }
        }
    }

    /// The slot that can answer soonest; a new one if that may be.
    fn startable(&mut self, may_boot: bool) -> Option<usize> {
        let version = self.version;
        let rank = |slot: &Slot| Self::rank(slot, version, may_boot);
        let most = self.limits.max_machines as usize;
        let slots = self.slots.iter().take(most).enumerate();
        let ranked = slots.filter_map(|(index, slot)| Some((rank(slot)?, index)));
        let best = ranked.min().map(|(_, index)| index);
        if best.is_none() && may_boot && self.slots.len() < most {
            self.slots.push(Slot::new(version));
            return Some(self.slots.len() - 1);
        }
        best
    }

    /// ## Draining => Ready
    /// ## (Suspending | Suspended | Cold) => Booting
    pub(super) fn start(&mut self, index: usize) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        let origin = match slot.state {
            State::Draining { load, .. } => {
                slot.state = State::Ready { load, failing: None };
                return;
            }
            State::Suspending { .. } => Origin::Suspending,
            State::Suspended => Origin::Suspended,
            State::Cold | State::Booting { .. } | State::Ready { .. } => Origin::Cold,
        };
        slot.life += 1;
        slot.version = self.version;
        slot.busy_until = None;
        slot.state = State::Booting { since: None, origin };
        let life = Life { slot: index, number: slot.life };
        self.actions.push(Action::Start { life, origin });
    }

    /// What nobody waits for any more does not begin.
    ///
    /// ## Booting => (Suspended | Cold)
    fn give_up_starts(&mut self) {
        let (target, mut running, wanted) = (self.target(), self.running(), self.queue.wanted());
        for (index, slot) in self.slots.iter_mut().enumerate().rev() {
            if running <= target {
                return;
            }
            let State::Booting { since: None, origin } = slot.state else { continue };
            // What was being suspended has to be started to be suspended again.
            if origin == Origin::Suspending || slot.comes_back || wanted.contains(&index) {
                continue;
            }
            running -= 1;
            slot.state = if origin == Origin::Suspended { State::Suspended } else { State::Cold };
            self.actions.push(Action::GiveUp(Life { slot: index, number: slot.life }));
        }
    }

    pub(super) fn refuse(&mut self, request: Request, why: Refusal, retry_after: Moment) {
        self.actions.push(Action::Refuse { request, why, retry_after });
    }

    /// Whoever waits for nothing is told so.
    fn refuse_hopeless(&mut self, now: Moment) {
        let why = self.boots.forbids(now).map_or(Refusal::NotStarted, |life| Refusal::StartFailed { life });
        let retry_after = self.boots.due().saturating_sub(now);
        let rests = |slot: &Slot| matches!(slot.state, State::Cold | State::Suspended);
        for index in self.queue.wanted() {
            while self.slots.get(index).is_none_or(&rests)
                && let Some(request) = self.queue.pop_for(index)
            {
                self.refuse(request, why, retry_after);
            }
        }
        let starts_soon = self.limits.auto_start && self.boots.is_short() && self.wants_boot();
        if !self.slots.iter().all(&rests) || starts_soon {
            return;
        }
        while let Some(request) = self.queue.pop() {
            self.refuse(request, why, retry_after);
        }
    }

    /// What was started for its snapshot alone has done its work.
    ///
    /// ## Ready => Draining
    fn rest_prepared(&mut self, now: Moment) {
        if self.limits.auto_stop != AutoStop::Suspend {
            return;
        }
        let needed = self.needed_or_busy();
        let mut ready = self.slots.iter().filter(|slot| slot.routable().is_some()).count() as u32;
        for slot in &mut self.slots {
            if let State::Ready { load, failing: None } = slot.state
                && slot.busy_until.is_none()
                && std::mem::take(&mut slot.is_prepared)
                && ready > needed
            {
                ready -= 1;
                slot.state = State::Draining { since: now, load, reason: Reason::Excess, passes: true };
            }
        }
    }

    /// When fewer machines would have done for long enough, the least loaded ones get no more requests.
    ///
    /// ## Ready => Draining
    fn end_unneeded(&mut self, now: Moment) {
        let ready = self.slots.iter().filter(|slot| slot.routable().is_some()).count() as u32;
        let needed = self.needed_or_busy();
        if self.limits.auto_stop == AutoStop::Off || needed >= ready {
            self.quiet = None;
            return;
        }
        let quiet = self.quiet.get_or_insert(Quiet { since: now, needed });
        quiet.needed = quiet.needed.max(needed);
        if now < quiet.since.saturating_add(self.limits.idle_timeout) {
            return;
        }
        let excess = ready.saturating_sub(quiet.needed);
        self.quiet = None;
        for _ in 0..excess {
            let idle = self.slots.iter_mut().filter(|slot| slot.busy_until.is_none());
            let loads = idle.filter_map(|slot| Some((slot.routable()?, slot)));
            let Some((load, slot)) = loads.min_by_key(|(load, _)| *load) else { return };
            slot.state = State::Draining { since: now, load, reason: Reason::Excess, passes: true };
        }
    }

    /// ## Draining => Suspending
    fn rest_drained(&mut self) {
        let idle_rest = Slot::rest(self.limits.auto_stop);
        for (index, slot) in self.slots.iter_mut().enumerate() {
            let State::Draining { load: 0, reason, .. } = slot.state else { continue };
            if slot.busy_until.is_some() {
                continue;
            }
            let life = Life { slot: index, number: slot.life };
            let is_old = slot.version != self.version;
            let rest = if reason == Reason::Replaced || is_old { Rest::Cold } else { idle_rest };
            slot.state = State::Suspending { rest };
            self.actions.push(match rest {
                Rest::Suspended => Action::Suspend(life),
                Rest::Cold => Action::Stop(life),
            });
        }
    }
}
