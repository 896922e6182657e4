//! The pool against everything that can happen in any order.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use app::config::model::AutoStop;
use app::pool::{Action, Found, Life, Limits, Moment, Origin, Pool, Refusal, State, Whom};
use proptest::prelude::*;
use proptest::sample::select;

/// What happens next. Indices select among the machines or requests that it can happen to.
#[derive(Clone, Debug)]
enum Event {
    Request,
    /// Of one slot alone, or rather of it; and one that it must not be if others have room.
    RequestFor(usize, bool, usize),
    Prepare,
    Cancel(usize),
    End(usize),
    Begins(usize),
    MakesRoom,
    Ready(usize),
    StartFails(usize),
    Check(usize, bool),
    Busy(usize, u64),
    Rests(usize),
    RestFails(usize),
    Dies(usize),
    Deploy,
    GiveWay,
    Passes(u64),
    NextTick,
    /// Something is told of a life that is over.
    Late(usize, u8),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        8 => Just(Event::Request),
        3 => any::<(usize, bool, usize)>().prop_map(|(slot, only, not)| Event::RequestFor(slot % 5, only, not % 5)),
        1 => Just(Event::Prepare),
        1 => any::<usize>().prop_map(Event::Cancel),
        5 => any::<usize>().prop_map(Event::End),
        3 => any::<usize>().prop_map(Event::Begins),
        1 => Just(Event::MakesRoom),
        5 => any::<usize>().prop_map(Event::Ready),
        2 => any::<usize>().prop_map(Event::StartFails),
        2 => any::<(usize, bool)>().prop_map(|(index, passed)| Event::Check(index, passed)),
        1 => (any::<usize>(), 0u64..20_000).prop_map(|(index, millis)| Event::Busy(index, millis)),
        4 => any::<usize>().prop_map(Event::Rests),
        1 => any::<usize>().prop_map(Event::RestFails),
        1 => any::<usize>().prop_map(Event::Dies),
        1 => Just(Event::Deploy),
        1 => Just(Event::GiveWay),
        2 => (0u64..20_000).prop_map(Event::Passes),
        4 => Just(Event::NextTick),
        1 => any::<(usize, u8)>().prop_map(|(index, kind)| Event::Late(index, kind)),
    ]
}

prop_compose! {
    fn limits()(
        (soft_limit, more) in (1u32..5, 0u32..5),
        (max_machines, min_running) in (1u32..5, 0u32..5),
        auto_stop in select(vec![AutoStop::Off, AutoStop::Stop, AutoStop::Suspend]),
        auto_start in prop::bool::weighted(0.9),
        queue_limit in 1usize..12,
    ) -> Limits {
        let seconds = Duration::from_secs;
        Limits {
            soft_limit, hard_limit: soft_limit + more, max_machines, min_running: min_running.min(max_machines),
            auto_stop, auto_start, queue_limit,
            idle_timeout: seconds(5), start_timeout: seconds(10), drain_timeout: seconds(20), queue_timeout: seconds(8),
        }
    }
}

/// What the owner of a pool knows, from what it was told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Machine {
    Starts { begun: bool },
    Runs { passes: bool },
    Ends { suspends: bool },
    Suspended,
}

impl Machine {
    fn starts(self) -> bool {
        matches!(self, Machine::Starts { .. })
    }
}

/// A host that does what the pool says, and checks that it can be done.
struct Host {
    pool: Pool,
    limits: Limits,
    now: Moment,
    machines: BTreeMap<Life, Machine>,
    past: Vec<Life>,
    origins: BTreeMap<Life, Origin>,
    waiting: BTreeSet<u64>,
    /// Requests that are for one slot alone.
    choosy: BTreeMap<u64, usize>,
    forwarded: Vec<Life>,
    /// Until when machines say that they work.
    busy: BTreeMap<Life, Moment>,
    requests: u64,
}

impl Host {
    fn new(limits: Limits) -> Host {
        let mut host = Host {
            pool: Pool::new(limits),
            limits,
            now: Duration::ZERO,
            machines: BTreeMap::new(),
            past: Vec::new(),
            origins: BTreeMap::new(),
            waiting: BTreeSet::new(),
            choosy: BTreeMap::new(),
            forwarded: Vec::new(),
            busy: BTreeMap::new(),
            requests: 0,
        };
        let actions = host.pool.tick(host.now);
        host.follow(actions);
        host
    }

    fn is_in(&self, wanted: impl Fn(Machine) -> bool) -> Vec<Life> {
        self.machines.iter().filter(|(_, machine)| wanted(**machine)).map(|(life, _)| *life).collect()
    }

    fn is_busy(&self, life: Life) -> bool {
        self.busy.get(&life).is_some_and(|until| *until > self.now)
    }

    fn over(&mut self, life: Life) -> Option<Machine> {
        self.past.push(life);
        self.machines.remove(&life)
    }

    fn follow(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Forward { request, life } => {
                    assert!(self.waiting.remove(&request), "{action:?}: it does not wait");
                    let only = self.choosy.remove(&request);
                    assert!(
                        only.is_none_or(|slot| slot == life.slot),
                        "{action:?}: it is for {only:?} alone"
                    );
                    let machine = self.machines.get(&life);
                    assert_eq!(machine, Some(&Machine::Runs { passes: true }), "{action:?}");
                    self.forwarded.push(life);
                    let load = self.forwarded.iter().filter(|other| **other == life).count();
                    assert!(load <= self.limits.hard_limit as usize, "{action:?}: beyond the hard limit");
                }
                Action::Refuse { request, why, .. } => {
                    assert!(self.waiting.remove(&request), "{action:?}: it does not wait");
                    if why == Refusal::NotStarted {
                        assert!(!self.limits.auto_start);
                    }
                }
                Action::Start { life, origin } => self.starts(life, origin),
                Action::GiveUp(life) => {
                    let (before, from) = (self.over(life), self.origins.get(&life));
                    assert_eq!(before, Some(Machine::Starts { begun: false }), "{action:?}");
                    if from == Some(&Origin::Suspended) {
                        self.past.retain(|past| *past != life);
                        self.machines.insert(life, Machine::Suspended);
                    }
                }
                Action::Suspend(life) => {
                    assert!(!self.forwarded.contains(&life), "{action:?}: it has requests");
                    let before = self.machines.insert(life, Machine::Ends { suspends: true });
                    assert!(matches!(before, Some(Machine::Runs { .. })), "{action:?} of {before:?}");
                    assert_eq!(self.limits.auto_stop, AutoStop::Suspend);
                    assert!(!self.is_busy(life), "{action:?}: it is busy");
                }
                Action::Stop(life) => {
                    let before = self.machines.insert(life, Machine::Ends { suspends: false });
                    assert!(matches!(before, Some(Machine::Runs { .. })), "{action:?} of {before:?}");
                    self.forwarded.retain(|other| *other != life);
                }
                Action::Kill(life) => {
                    let before = self.over(life);
                    assert!(matches!(before, Some(Machine::Starts { .. })), "{action:?} of {before:?}");
                }
                Action::Discard(life) => assert_eq!(self.over(life), Some(Machine::Suspended), "{action:?}"),
            }
        }
    }

    fn starts(&mut self, life: Life, origin: Origin) {
        let before = self.machines.keys().find(|other| other.slot == life.slot).copied();
        let wanted = match origin {
            Origin::Cold => None,
            Origin::Suspended => Some(Machine::Suspended),
            Origin::Suspending => Some(Machine::Ends { suspends: true }),
        };
        let before = before.and_then(|before| self.over(before));
        assert_eq!(before, wanted, "{life:?} starts from {origin:?}");
        assert!(!self.past.contains(&life), "{life:?} is not new");
        self.machines.insert(life, Machine::Starts { begun: origin == Origin::Suspending });
        self.origins.insert(life, origin);
        assert!(self.machines.len() <= self.limits.max_machines as usize);
    }

    fn happens(&mut self, event: &Event) {
        let choose =
            |index: &usize, lives: Vec<Life>| (!lives.is_empty()).then(|| lives[index % lives.len()]);
        let actions = match event {
            Event::Request => {
                self.requests += 1;
                self.waiting.insert(self.requests);
                self.pool.request(self.now, self.requests)
            }
            Event::RequestFor(slot, only, not) => {
                self.requests += 1;
                self.waiting.insert(self.requests);
                if *only {
                    self.choosy.insert(self.requests, *slot);
                }
                let whom = if *only { Whom::Only(*slot) } else { Whom::Rather(*slot) };
                self.pool.request_for(self.now, self.requests, whom, &[*not])
            }
            Event::Prepare => self.pool.prepare(self.now),
            Event::Cancel(index) if !self.waiting.is_empty() => {
                let nth = self.waiting.iter().nth(index % self.waiting.len());
                let request = *nth.expect("it is among them");
                self.waiting.remove(&request);
                self.pool.cancelled(self.now, request)
            }
            Event::End(index) if !self.forwarded.is_empty() => {
                let life = self.forwarded.swap_remove(index % self.forwarded.len());
                self.pool.ended(self.now, life)
            }
            Event::Begins(index) => {
                let Some(life) = choose(index, self.is_in(Machine::starts)) else { return };
                self.machines.insert(life, Machine::Starts { begun: true });
                self.pool.begun(self.now, life)
            }
            Event::MakesRoom => {
                let Some((since, life)) = self.pool.idle() else { return };
                assert!(since <= self.now && !self.forwarded.contains(&life));
                let waits_for_another =
                    |request| self.choosy.get(request).is_some_and(|slot| *slot != life.slot);
                assert!(self.waiting.iter().all(waits_for_another), "somebody misses it");
                let actions = self.pool.make_room(self.now, life);
                assert!(
                    matches!(actions[..], [Action::Suspend(ended) | Action::Stop(ended)] if ended == life)
                );
                let running = self.is_in(|machine| matches!(machine, Machine::Runs { passes: true })).len();
                assert!(running > self.limits.min_running as usize, "too few are left");
                actions
            }
            Event::Ready(index) => {
                let Some(life) = choose(index, self.is_in(Machine::starts)) else {
                    return;
                };
                self.machines.insert(life, Machine::Runs { passes: true });
                self.pool.ready(self.now, life)
            }
            Event::StartFails(index) => {
                let Some(life) = choose(index, self.is_in(Machine::starts)) else {
                    return;
                };
                self.over(life);
                self.pool.start_failed(self.now, life)
            }
            Event::Check(index, passed) => {
                let running = self.is_in(|machine| matches!(machine, Machine::Runs { .. }));
                let Some(life) = choose(index, running) else { return };
                self.machines.insert(life, Machine::Runs { passes: *passed });
                self.pool.checked(self.now, life, *passed)
            }
            Event::Busy(index, millis) => {
                let runs = |machine| matches!(machine, Machine::Runs { .. } | Machine::Ends { .. });
                let Some(life) = choose(index, self.is_in(runs)) else { return };
                let time = Duration::from_millis(*millis);
                self.busy.insert(life, self.now + time);
                self.pool.busy(self.now, life, time)
            }
            Event::Rests(index) => {
                let ending = self.is_in(|machine| matches!(machine, Machine::Ends { .. }));
                let Some(life) = choose(index, ending) else { return };
                match self.machines.get(&life) {
                    Some(Machine::Ends { suspends: true }) => {
                        self.machines.insert(life, Machine::Suspended);
                    }
                    _ => {
                        self.over(life);
                    }
                }
                self.pool.at_rest(self.now, life)
            }
            Event::RestFails(index) => {
                let ending = self.is_in(|machine| machine == Machine::Ends { suspends: true });
                let Some(life) = choose(index, ending) else { return };
                self.machines.insert(life, Machine::Runs { passes: true });
                self.pool.rest_failed(self.now, life)
            }
            Event::Dies(index) => {
                let Some(life) = choose(index, self.machines.keys().copied().collect()) else { return };
                self.over(life);
                self.forwarded.retain(|other| *other != life);
                self.pool.died(self.now, life)
            }
            Event::Deploy => self.pool.deploy(self.now),
            Event::GiveWay => self.pool.give_way(self.now),
            Event::Passes(millis) => {
                self.now += Duration::from_millis(*millis);
                self.pool.tick(self.now)
            }
            Event::NextTick => {
                let Some(at) = self.pool.next_tick() else { return };
                assert!(at > self.now, "what was due at {at:?} is not done at {:?}", self.now);
                self.now = at;
                self.pool.tick(self.now)
            }
            Event::Late(index, kind) => {
                let Some(life) = choose(index, self.past.clone()) else { return };
                match kind % 6 {
                    0 => self.pool.ready(self.now, life),
                    1 => self.pool.start_failed(self.now, life),
                    2 => self.pool.at_rest(self.now, life),
                    3 => self.pool.died(self.now, life),
                    4 => self.pool.ended(self.now, life),
                    _ => self.pool.checked(self.now, life, false),
                }
            }
            Event::Cancel(_) | Event::End(_) => return,
        };
        self.follow(actions);
        self.agrees();
    }

    /// Both sides know the same.
    fn agrees(&self) {
        assert_eq!(self.pool.waiting(), self.waiting.len());
        assert!(self.waiting.len() <= self.limits.queue_limit, "more wait than may");
        if let Some(at) = self.pool.next_tick() {
            assert!(at > self.now, "{at:?} is past at {:?}", self.now);
        }
        for (life, state) in self.pool.slots() {
            let machine = self.machines.get(&life).copied();
            let load = self.forwarded.iter().filter(|other| **other == life).count() as u32;
            let agrees = match (state, machine) {
                (State::Cold, None) | (State::Booting { .. }, Some(Machine::Starts { .. })) => true,
                (State::Ready { load: known, failing }, Some(Machine::Runs { passes })) => {
                    known == load && passes == failing.is_none()
                }
                (State::Draining { load: known, .. }, Some(Machine::Runs { .. })) => {
                    known == load && (load > 0 || self.is_busy(life))
                }
                (State::Suspending { .. }, Some(Machine::Ends { .. })) => true,
                (State::Suspended, Some(Machine::Suspended)) => true,
                _ => false,
            };
            assert!(agrees, "{life:?}: {state:?} is {machine:?} with {load}");
        }
        let hopeful = self.limits.auto_start || !self.machines.is_empty();
        assert!(self.waiting.is_empty() || hopeful, "they wait for nothing");
    }

    /// Everything goes well from now on, and time passes.
    fn calms_down(&mut self) {
        for _ in 0..200 {
            for event in [Event::Ready(0), Event::Rests(0), Event::Check(0, true)] {
                for _ in 0..self.limits.max_machines {
                    self.happens(&event);
                }
            }
            for life in self.is_in(|machine| machine == Machine::Runs { passes: false }) {
                self.machines.insert(life, Machine::Runs { passes: true });
                let actions = self.pool.checked(self.now, life, true);
                self.follow(actions);
            }
            while !self.forwarded.is_empty() {
                self.happens(&Event::End(0));
            }
            self.happens(&Event::Passes(2000));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_the_rules_hold(limits in limits(), events in prop::collection::vec(event(), 0..120)) {
        let mut host = Host::new(limits);
        events.iter().for_each(|event| host.happens(event));
    }

    #[test]
    fn who_waits_is_answered_even_if_nothing_ever_starts(limits in limits(), events in prop::collection::vec(event(), 0..60)) {
        let mut host = Host::new(limits);
        events.iter().for_each(|event| host.happens(event));
        host.happens(&Event::Passes(8_000));
        prop_assert!(host.waiting.is_empty());
    }

    #[test]
    fn when_all_goes_well_as_many_run_as_are_to_and_are_new(limits in limits(), events in prop::collection::vec(event(), 0..80)) {
        let mut host = Host::new(limits);
        events.iter().for_each(|event| host.happens(event));
        let old: BTreeSet<Life> = host.machines.keys().copied().collect();
        host.happens(&Event::Deploy);
        host.calms_down();
        prop_assert!(host.waiting.is_empty());
        let running = host.is_in(|machine| matches!(machine, Machine::Runs { .. }));
        prop_assert!(running.iter().all(|life| !old.contains(life)), "{old:?} were to be replaced: {running:?}");
        if limits.auto_stop == AutoStop::Off {
            prop_assert!(running.len() >= limits.min_running as usize);
        } else {
            prop_assert_eq!(running.len(), limits.min_running as usize);
        }
    }
}

fn one_machine() -> Limits {
    Limits {
        soft_limit: 20,
        hard_limit: u32::MAX,
        min_running: 0,
        max_machines: 1,
        auto_stop: AutoStop::Suspend,
        auto_start: true,
        idle_timeout: Duration::from_secs(60),
        start_timeout: Duration::from_secs(60),
        drain_timeout: Duration::from_secs(300),
        queue_timeout: Duration::from_secs(60),
        queue_limit: 1024,
    }
}

const FIRST: Life = Life { slot: 0, number: 1 };
const SECOND: Life = Life { slot: 0, number: 2 };
const ZERO: Moment = Duration::ZERO;

#[test]
fn a_thousand_requests_start_one_machine() {
    let mut pool = Pool::new(one_machine());
    let actions: Vec<_> = (0..1000).flat_map(|request| pool.request(ZERO, request)).collect();
    assert_eq!(actions, [Action::Start { life: FIRST, origin: Origin::Cold }]);
    assert_eq!(pool.ready(ZERO, FIRST).len(), 1000, "and all are forwarded");
}

#[test]
fn a_machine_that_is_idle_is_suspended_and_comes_back_with_a_request() {
    let mut pool = Pool::new(one_machine());
    pool.request(ZERO, 1);
    pool.ready(ZERO, FIRST);
    pool.ended(ZERO, FIRST);
    let minute = pool.next_tick().expect("it is idle");
    assert_eq!(minute, Duration::from_secs(60));
    assert_eq!(pool.tick(minute), [Action::Suspend(FIRST)]);
    pool.at_rest(minute, FIRST);
    assert_eq!(pool.request(minute, 2), [Action::Start { life: SECOND, origin: Origin::Suspended }]);
    assert_eq!(pool.ready(minute, SECOND), [Action::Forward { request: 2, life: SECOND }]);
}

#[test]
fn a_start_that_waits_for_its_turn_loses_no_time_and_does_not_begin_for_nobody() {
    let mut pool = Pool::new(Limits { queue_timeout: Duration::from_secs(300), ..one_machine() });
    pool.request(ZERO, 1);
    let late = Duration::from_secs(200);
    assert_eq!(pool.tick(late), [], "others had their turn");
    assert_eq!(pool.begun(late, FIRST), []);
    assert_eq!(pool.next_tick(), Some(late + Duration::from_secs(60)), "so long it may take");
    pool.ready(late, FIRST);
    pool.ended(late, FIRST);
    let idle = late + Duration::from_secs(60);
    pool.tick(idle);
    pool.at_rest(idle, FIRST);
    pool.request(idle, 2);
    assert_eq!(pool.cancelled(idle, 2), [Action::GiveUp(SECOND)]);
    assert_eq!(pool.begun(idle, SECOND), [], "it was too late");
    let third = Action::Start { life: Life { slot: 0, number: 3 }, origin: Origin::Suspended };
    assert_eq!(pool.request(idle, 3), [third], "the snapshot is there");
    assert_eq!(pool.begun(idle, Life { slot: 0, number: 3 }), []);
    assert_eq!(pool.cancelled(idle, 3), [], "what has begun goes on");
}

#[test]
fn a_machine_that_is_idle_makes_room_unless_it_is_always_to_run() {
    let mut pool = Pool::new(one_machine());
    assert_eq!(pool.idle(), None);
    pool.request(ZERO, 1);
    pool.ready(ZERO, FIRST);
    assert_eq!(pool.idle(), None, "it has a request");
    let now = Duration::from_secs(7);
    pool.ended(now, FIRST);
    assert_eq!(pool.idle(), Some((now, FIRST)));
    assert_eq!(pool.make_room(now, SECOND), [], "that is another life");
    assert_eq!(pool.make_room(now, FIRST), [Action::Suspend(FIRST)]);
    assert_eq!((pool.idle(), pool.ending()), (None, 1));
    for limits in
        [Limits { min_running: 1, ..one_machine() }, Limits { auto_stop: AutoStop::Off, ..one_machine() }]
    {
        let mut pool = Pool::new(limits);
        pool.request(ZERO, 1);
        pool.ready(ZERO, FIRST);
        pool.ended(ZERO, FIRST);
        assert_eq!(pool.idle(), None);
        assert_eq!(pool.make_room(ZERO, FIRST), []);
    }
}

/// A pool with two machines, of which each has a request; the second's life.
fn two_at_work() -> (Pool, Life) {
    let mut pool = Pool::new(Limits { soft_limit: 1, hard_limit: 1, max_machines: 2, ..one_machine() });
    pool.request(ZERO, 1);
    pool.request(ZERO, 2);
    let other = Life { slot: 1, number: 1 };
    pool.ready(ZERO, FIRST);
    pool.ready(ZERO, other);
    (pool, other)
}

#[test]
fn the_one_that_is_idle_for_longest_makes_room_first() {
    let (mut pool, other) = two_at_work();
    pool.ended(Duration::from_secs(1), other);
    pool.ended(Duration::from_secs(2), FIRST);
    assert_eq!(pool.idle(), Some((Duration::from_secs(1), other)));
}

#[test]
fn one_whose_workload_says_that_it_works_makes_no_room() {
    let (mut pool, other) = two_at_work();
    pool.ended(ZERO, FIRST);
    pool.ended(ZERO, other);
    pool.busy(ZERO, FIRST, Duration::from_secs(60));
    assert_eq!(pool.idle(), Some((ZERO, other)));
    assert_eq!(pool.make_room(ZERO, FIRST), [], "it was named before it said so");
    assert_eq!(pool.make_room(ZERO, other), [Action::Suspend(other)]);
    assert_eq!(pool.idle(), None);
    pool.busy(ZERO, FIRST, Duration::ZERO);
    assert_eq!(pool.idle(), Some((ZERO, FIRST)));
}

#[test]
fn a_snapshot_is_made_at_once_where_there_is_none() {
    let mut pool = Pool::new(one_machine());
    assert_eq!(pool.prepare(ZERO), [Action::Start { life: FIRST, origin: Origin::Cold }]);
    assert_eq!(pool.prepare(ZERO), [], "it is under way");
    assert_eq!(pool.start_failed(ZERO, FIRST), []);
    let again = pool.next_tick().expect("it is tried again");
    assert_eq!(pool.tick(again), [Action::Start { life: SECOND, origin: Origin::Cold }]);
    assert_eq!(pool.ready(again, SECOND), [Action::Suspend(SECOND)], "nobody needs it");
    pool.at_rest(again, SECOND);
    assert_eq!(pool.prepare(again), []);
    // One that a request has come for meanwhile stays.
    assert_eq!(pool.deploy(again), [Action::Discard(SECOND)]);
    let third = Life { slot: 0, number: 3 };
    assert_eq!(pool.prepare(again), [Action::Start { life: third, origin: Origin::Cold }]);
    assert_eq!(pool.request(again, 1), []);
    assert_eq!(pool.ready(again, third), [Action::Forward { request: 1, life: third }]);
    assert_eq!(pool.ended(again, third), []);
}

#[test]
fn machines_that_were_there_before_are_taken_over() {
    let mut pool = Pool::new(Limits { max_machines: 3, hard_limit: 1, soft_limit: 1, ..one_machine() });
    let other = Life { slot: 2, number: 1 };
    assert_eq!(pool.found(ZERO, 0, Found::Running { is_old: true }), Some(FIRST));
    assert_eq!(pool.found(ZERO, 2, Found::Suspended), Some(other));
    assert_eq!(pool.found(ZERO, 3, Found::Suspended), None, "there may be three");
    assert_eq!(pool.request(ZERO, 1), [], "one runs already");
    let forward = Action::Forward { request: 1, life: FIRST };
    assert_eq!(pool.ready(ZERO, FIRST), [forward], "and is replaced, when that is answered");
    let goes_on = Action::Start { life: Life { slot: 2, number: 2 }, origin: Origin::Suspended };
    assert_eq!(pool.request(ZERO, 2), [goes_on]);
    assert_eq!(pool.ended(ZERO, FIRST), [Action::Stop(FIRST)]);
}

#[test]
fn a_request_for_one_machine_waits_for_it_alone() {
    let mut pool = Pool::new(Limits { max_machines: 2, soft_limit: 1, hard_limit: 1, ..one_machine() });
    pool.request(ZERO, 1);
    pool.request(ZERO, 2);
    let other = Life { slot: 1, number: 1 };
    pool.ready(ZERO, FIRST);
    pool.ready(ZERO, other);
    assert_eq!(pool.request_for(ZERO, 3, Whom::Only(1), &[]), []);
    assert_eq!(pool.ended(ZERO, FIRST), [], "that is not the one");
    assert_eq!(pool.ended(ZERO, other), [Action::Forward { request: 3, life: other }]);
    assert_eq!(
        pool.request_for(ZERO, 4, Whom::Rather(1), &[]),
        [Action::Forward { request: 4, life: FIRST }]
    );
    let refused = pool.request_for(ZERO, 5, Whom::Only(7), &[]);
    let why = Refusal::NoSuchSlot;
    assert_eq!(refused, [Action::Refuse { request: 5, why, retry_after: ZERO }]);
    // One that is on disk is started for it.
    pool.ended(ZERO, other);
    let minute = Duration::from_secs(60);
    assert_eq!(pool.tick(minute), [Action::Suspend(other)]);
    pool.at_rest(minute, other);
    let start = Action::Start { life: Life { slot: 1, number: 2 }, origin: Origin::Suspended };
    assert_eq!(pool.request_for(minute, 6, Whom::Only(1), &[]), [start]);
}

#[test]
fn a_request_that_failed_on_one_machine_gets_another_if_there_is_one() {
    let mut pool = Pool::new(Limits { min_running: 2, max_machines: 2, ..one_machine() });
    pool.tick(ZERO);
    let other = Life { slot: 1, number: 1 };
    pool.ready(ZERO, FIRST);
    assert_eq!(pool.request_for(ZERO, 1, Whom::Any, &[0]), [Action::Forward { request: 1, life: FIRST }]);
    pool.ready(ZERO, other);
    for request in 2..5 {
        let told = pool.request_for(ZERO, request, Whom::Any, &[0]);
        assert_eq!(told, [Action::Forward { request, life: other }]);
    }
}

#[test]
fn with_fewer_machines_allowed_those_beyond_end() {
    let two = Limits { min_running: 2, max_machines: 2, ..one_machine() };
    let mut pool = Pool::new(two);
    pool.tick(ZERO);
    let other = Life { slot: 1, number: 1 };
    pool.ready(ZERO, FIRST);
    pool.ready(ZERO, other);
    let one = Limits { min_running: 1, max_machines: 1, ..two };
    assert_eq!(pool.limit(ZERO, one), [Action::Stop(other)]);
    assert_eq!(pool.at_rest(ZERO, other), [], "and it does not come back");
    let start = Action::Start { life: Life { slot: 1, number: 2 }, origin: Origin::Cold };
    assert_eq!(pool.limit(ZERO, two), [start], "until it may");
    assert_eq!(pool.limit(ZERO, one), [Action::Kill(Life { slot: 1, number: 2 })]);
}

#[test]
fn a_request_gives_a_suspend_up() {
    let mut pool = Pool::new(one_machine());
    pool.request(ZERO, 1);
    pool.ready(ZERO, FIRST);
    pool.ended(ZERO, FIRST);
    pool.tick(Duration::from_secs(60));
    let start = Action::Start { life: SECOND, origin: Origin::Suspending };
    assert_eq!(pool.request(Duration::from_secs(60), 2), [start]);
    assert_eq!(pool.at_rest(Duration::from_secs(61), FIRST), [], "that comes too late");
}

#[test]
fn what_does_not_resume_is_booted_and_what_does_not_boot_is_told() {
    let mut pool = Pool::new(one_machine());
    pool.request(ZERO, 1);
    pool.ready(ZERO, FIRST);
    pool.ended(ZERO, FIRST);
    let now = Duration::from_secs(60);
    pool.tick(now);
    pool.at_rest(now, FIRST);
    pool.request(now, 2);
    let third = Life { slot: 0, number: 3 };
    assert_eq!(pool.start_failed(now, SECOND), [Action::Start { life: third, origin: Origin::Cold }]);
    let why = Refusal::StartFailed { life: third };
    let retry_after = Duration::from_millis(100);
    assert_eq!(pool.start_failed(now, third), [Action::Refuse { request: 2, why, retry_after }]);
    assert_eq!(
        pool.request(now, 3),
        [Action::Refuse { request: 3, why, retry_after }],
        "nor is the next one kept"
    );
    let start = Action::Start { life: Life { slot: 0, number: 4 }, origin: Origin::Cold };
    assert_eq!(pool.request(now + retry_after, 4), [start]);
}

#[test]
fn a_machine_that_dies_early_is_waited_for_unless_it_does_so_again_and_again() {
    let mut pool = Pool::new(one_machine());
    pool.request(ZERO, 1);
    let mut now = ZERO;
    for number in 1..=4 {
        let life = Life { slot: 0, number };
        pool.ready(now, life);
        assert_eq!(pool.died(now, life), []);
        assert_eq!(pool.request(now, 1 + number), [], "it waits");
        now = pool.next_tick().expect("it starts again");
        let start = Action::Start { life: Life { slot: 0, number: number + 1 }, origin: Origin::Cold };
        assert_eq!(pool.tick(now), [start]);
    }
    let life = Life { slot: 0, number: 5 };
    pool.ready(now, life);
    pool.died(now, life);
    let why = Refusal::StartFailed { life };
    let retry_after = Duration::from_millis(1600);
    assert_eq!(pool.request(now, 6), [Action::Refuse { request: 6, why, retry_after }]);
}

#[test]
fn a_start_that_succeeds_ends_the_pause_of_the_others() {
    let mut pool = Pool::new(Limits { min_running: 2, max_machines: 2, ..one_machine() });
    pool.tick(ZERO);
    assert_eq!(pool.start_failed(ZERO, FIRST), []);
    let start = Action::Start { life: SECOND, origin: Origin::Cold };
    assert_eq!(pool.ready(ZERO, Life { slot: 1, number: 1 }), [start]);
}

#[test]
fn a_file_says_what_a_group_goes_by() {
    let text = "app = 'a'\nbuild.image = 'b'\nprocesses = { web = '', worker = '' }\n\
        [http_service]\nprocesses = ['web']\nauto_stop_machines = 'suspend'\n[http_service.concurrency]\nhard_limit = 7\n\
        [flyrun]\nmax_machines = 3\nqueue_limit = 5";
    let file = app::config::read("fly.toml", text.as_bytes()).expect("it is fine");
    let web = Limits::new(&file.app, "web");
    assert_eq!((web.soft_limit, web.hard_limit, web.queue_limit), (7, 7, 5));
    assert_eq!((web.min_running, web.max_machines, web.auto_stop), (0, 3, AutoStop::Suspend));
    let worker = Limits::new(&file.app, "worker");
    assert_eq!((worker.min_running, worker.max_machines, worker.auto_stop), (1, 1, AutoStop::Off));
    let started = Pool::new(worker).tick(ZERO);
    assert_eq!(started, [Action::Start { life: FIRST, origin: Origin::Cold }], "without being asked");
}

#[test]
fn more_than_the_soft_limit_starts_another_and_the_least_loaded_gets_the_next() {
    let mut pool = Pool::new(Limits { soft_limit: 2, max_machines: 3, ..one_machine() });
    pool.request(ZERO, 1);
    pool.ready(ZERO, FIRST);
    assert_eq!(pool.request(ZERO, 2), [Action::Forward { request: 2, life: FIRST }]);
    let other = Life { slot: 1, number: 1 };
    let both =
        [Action::Forward { request: 3, life: FIRST }, Action::Start { life: other, origin: Origin::Cold }];
    assert_eq!(pool.request(ZERO, 3), both, "nobody waits while there is room below the hard limit");
    pool.ready(ZERO, other);
    assert_eq!(pool.request(ZERO, 4), [Action::Forward { request: 4, life: other }]);
}

#[test]
fn a_machine_whose_check_fails_gets_nothing_and_is_replaced() {
    let mut pool = Pool::new(one_machine());
    pool.request(ZERO, 1);
    pool.ready(ZERO, FIRST);
    pool.ended(ZERO, FIRST);
    pool.checked(ZERO, FIRST, false);
    assert_eq!(pool.request(ZERO, 2), []);
    let minute = Duration::from_secs(60);
    let told = pool.tick(minute);
    assert!(told.contains(&Action::Stop(FIRST)), "{told:?}");
    assert_eq!(pool.at_rest(minute, FIRST), [Action::Start { life: SECOND, origin: Origin::Cold }]);
}

#[test]
fn a_deploy_replaces_one_machine_after_another_and_stops_where_the_new_one_does_not_start() {
    let mut pool = Pool::new(Limits { min_running: 2, max_machines: 2, ..one_machine() });
    pool.tick(ZERO);
    let other = Life { slot: 1, number: 1 };
    pool.ready(ZERO, FIRST);
    pool.ready(ZERO, other);
    assert_eq!(pool.deploy(ZERO), [Action::Stop(FIRST)]);
    assert_eq!(pool.at_rest(ZERO, FIRST), [Action::Start { life: SECOND, origin: Origin::Cold }]);
    assert_eq!(pool.start_failed(ZERO, SECOND), []);
    let third = Life { slot: 0, number: 3 };
    let later = pool.next_tick().expect("it is tried again");
    assert_eq!(pool.tick(later), [Action::Start { life: third, origin: Origin::Cold }]);
    assert_eq!(pool.ready(later, third), [Action::Stop(other)], "only now");
}

#[test]
fn a_machine_that_is_busy_is_not_ended_until_it_is_no_more() {
    let second = Duration::from_secs;
    let mut pool = Pool::new(one_machine());
    pool.request(ZERO, 1);
    pool.ready(ZERO, FIRST);
    pool.ended(ZERO, FIRST);
    pool.busy(ZERO, FIRST, second(100));
    assert_eq!(pool.tick(second(61)), []);
    let over = pool.next_tick().expect("it runs out");
    assert_eq!(over, second(100));
    assert_eq!(pool.tick(over), []);
    let idle = pool.next_tick().expect("it is idle from now on");
    assert_eq!(idle, second(160));
    assert_eq!(pool.tick(idle), [Action::Suspend(FIRST)]);
    // One that says so in this moment goes on.
    let goes_on = Action::Start { life: SECOND, origin: Origin::Suspending };
    assert_eq!(pool.busy(idle, FIRST, second(10)), [goes_on]);
    pool.ready(idle, SECOND);
    // And one that takes it back is idle again.
    pool.busy(idle, SECOND, second(1000));
    assert_eq!(pool.tick(second(300)), []);
    assert_eq!(pool.busy(second(300), SECOND, ZERO), []);
    assert_eq!(pool.tick(second(360)), [Action::Suspend(SECOND)]);
}

#[test]
fn a_machine_that_is_busy_is_replaced_when_its_time_to_drain_is_over() {
    let mut pool = Pool::new(one_machine());
    pool.request(ZERO, 1);
    pool.ready(ZERO, FIRST);
    pool.ended(ZERO, FIRST);
    pool.busy(ZERO, FIRST, Duration::from_secs(3600));
    assert_eq!(pool.retire(ZERO), [], "it has its time");
    assert_eq!(pool.tick(Duration::from_secs(300)), [Action::Stop(FIRST)]);
    assert_eq!(pool.at_rest(Duration::from_secs(300), FIRST), []);
    assert_eq!(pool.alive(), 0);
}

#[test]
fn a_pool_gives_way_one_by_one_and_comes_back_if_it_must() {
    let limits = Limits { min_running: 2, max_machines: 2, ..one_machine() };
    let mut pool = Pool::new(limits);
    pool.tick(ZERO);
    let other = Life { slot: 1, number: 1 };
    pool.ready(ZERO, FIRST);
    pool.ready(ZERO, other);
    pool.request(ZERO, 1);
    assert_eq!(pool.freeze(ZERO), [], "nothing ends by itself, and nothing starts");
    assert_eq!(pool.give_way(ZERO), [Action::Stop(other)], "the one without a request");
    assert_eq!(pool.at_rest(ZERO, other), []);
    assert_eq!(pool.alive(), 1);
    assert_eq!(pool.give_way(ZERO), [], "a request is on its way");
    assert_eq!(pool.ended(ZERO, FIRST), [Action::Stop(FIRST)]);
    assert_eq!(pool.at_rest(ZERO, FIRST), []);
    let again = |slot| Action::Start { life: Life { slot, number: 2 }, origin: Origin::Cold };
    assert_eq!(pool.bring_back(ZERO, limits, 2), [again(0), again(1)]);
}

#[test]
fn a_pool_that_retires_refuses_who_waits_and_keeps_nothing() {
    let mut pool = Pool::new(Limits { hard_limit: 1, soft_limit: 1, ..one_machine() });
    pool.request(ZERO, 1);
    pool.ready(ZERO, FIRST);
    assert_eq!(pool.request(ZERO, 2), []);
    let why = Refusal::NotStarted;
    assert_eq!(pool.retire(ZERO), [Action::Refuse { request: 2, why, retry_after: ZERO }]);
    assert_eq!(pool.alive(), 1, "a request is on its way");
    assert_eq!(pool.ended(ZERO, FIRST), [Action::Stop(FIRST)]);
    assert_eq!(pool.at_rest(ZERO, FIRST), []);
    assert_eq!(pool.request(ZERO, 3), [Action::Refuse { request: 3, why, retry_after: ZERO }]);
    // What is on disk goes too.
    let mut pool = Pool::new(one_machine());
    pool.found(ZERO, 0, Found::Suspended);
    assert_eq!(pool.retire(ZERO), [Action::Discard(FIRST)]);
}

#[test]
fn a_new_pool_has_as_many_as_are_wanted_and_then_as_many_as_are_needed() {
    let mut pool = Pool::new(Limits { max_machines: 0, ..one_machine() });
    let target = Limits { max_machines: 1, min_running: 1, auto_stop: AutoStop::Off, ..one_machine() };
    assert_eq!(pool.limit(ZERO, target), [Action::Start { life: FIRST, origin: Origin::Cold }]);
    assert_eq!(pool.ready(ZERO, FIRST), []);
    let mut other = pool.clone();
    assert_eq!(pool.settle_down(ZERO, one_machine(), true), [Action::Suspend(FIRST)]);
    assert_eq!(other.settle_down(ZERO, one_machine(), false), []);
    assert_eq!(other.tick(Duration::from_secs(60)), [Action::Suspend(FIRST)]);
}
