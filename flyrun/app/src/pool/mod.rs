//! Which machine gets which request, and when machines start and stop. Pure: no clock, no I/O, no lock.
//!
//! A [`Pool`] is the machines of one group of one app. Each is a slot:
//!
//! ```text
//! Cold        a start:                      Booting
//! Booting     its check passes:             Ready
//!             not needed before its turn:   Suspended or Cold, as it was
//!             it fails, dies, takes long:   Cold; a resume that fails goes on as a boot
//! Ready       not needed, or replaced:      Draining
//!             idle, and others want room:   Draining
//!             it dies:                      Cold
//! Draining    no requests are left:         Suspending
//!             it is needed after all:       Ready
//! Suspending  done:                         Suspended or Cold
//!             it is needed after all:       Booting
//!             it cannot be suspended:       Ready
//! Suspended   a start:                      Booting
//!             a deploy:                     Cold
//! ```
//!
//! Its owner tells it what happened and when, and does what it answers, in order. Everything about a machine names its
//! [`Life`]; what is told of a life that is over changes nothing, so that no answer can come too late.
//!
//! What holds, whatever happens (`tests/pool.rs`): a slot has one start at a time, however many requests wait; a request goes only to
//! a machine that is ready and passes its check, and never beyond the hard limit; no more wait than may, and everyone who waits
//! is answered.

mod backoff;
mod before;
mod events;
mod queue;
mod replace;
mod room;
mod settle;
mod slot;

pub use before::Found;
pub use slot::{Life, Origin, Reason, Rest, State};

use std::time::Duration;

use crate::config::model::{App, AutoStop};
use backoff::Backoff;
use queue::Queue;
use slot::Slot;

/// A moment: the time since any fixed one, such as the start of the process.
pub type Moment = Duration;

/// A request, by whatever name its owner gives it.
pub type Request = u64;

/// What a pool goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests on a machine from which on others are preferred, at least 1.
    pub soft_limit: u32,
    /// Requests on a machine that are never exceeded, at least the soft limit.
    pub hard_limit: u32,
    /// Machines that are left running.
    pub min_running: u32,
    /// The most machines.
    pub max_machines: u32,
    /// What happens to machines that are not needed.
    pub auto_stop: AutoStop,
    /// Whether requests start machines.
    pub auto_start: bool,
    /// For so long a machine must not have been needed.
    pub idle_timeout: Duration,
    /// A start takes at most so long from its turn on, and so long a check may fail until its machine is replaced.
    pub start_timeout: Duration,
    /// A machine that is replaced has so long to end its requests.
    pub drain_timeout: Duration,
    /// A request waits at most so long.
    pub queue_timeout: Duration,
    /// So many requests wait at most; at least 1, as one that may not wait starts nothing.
    pub queue_limit: usize,
}

impl Limits {
    /// What the file of an app says for the machines of a group. A group without services has one machine, which runs.
    pub fn new(app: &App, group: &str) -> Limits {
        let services =
            || app.services.iter().filter(|service| service.groups.iter().any(|name| name == group));
        // They agree about starting and stopping; what is too much for one of them is too much for the machine.
        let first = services().next();
        let soft = services().map(|service| service.concurrency.soft_limit).min();
        let hard = services().filter_map(|service| service.concurrency.hard_limit).min().unwrap_or(u32::MAX);
        Limits {
            soft_limit: soft.unwrap_or(u32::MAX).min(hard),
            hard_limit: hard,
            min_running: first.map_or(1, |service| service.min_machines_running),
            max_machines: if first.is_some() { app.max_machines } else { 1 },
            auto_stop: first.map_or(AutoStop::Off, |service| service.auto_stop),
            auto_start: first.is_some_and(|service| service.auto_start),
            idle_timeout: app.idle_timeout,
            start_timeout: app.start_timeout,
            drain_timeout: app.deploy.wait_timeout,
            queue_timeout: app.queue_timeout,
            queue_limit: app.queue_limit as usize,
        }
    }
}

impl Limits {
    /// For another number of machines. Where no request starts them, all run.
    pub fn scaled(self, count: u32, has_service: bool) -> Limits {
        let min_running = if has_service { self.min_running.min(count) } else { count };
        Limits { max_machines: count, min_running, ..self }
    }
}

/// What the owner of a pool must do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Give a request to a machine; [`Pool::ended`] tells that it is over.
    Forward {
        /// The request.
        request: Request,
        /// The machine.
        life: Life,
    },
    /// Answer a request with 503.
    Refuse {
        /// The request.
        request: Request,
        /// Why.
        why: Refusal,
        /// `Retry-After`.
        retry_after: Duration,
    },
    /// Start a machine. The answer is [`Pool::begun`] when its turn has come, if it must wait for that, and then [`Pool::ready`], when
    /// its check passes, or [`Pool::start_failed`].
    Start {
        /// The life that begins. A life of this slot before it is over.
        life: Life,
        /// What there is to start from.
        origin: Origin,
    },
    /// Do not begin a start whose turn has not come: nobody waits for it. What is on disk stays there. There is no answer.
    GiveUp(Life),
    /// Suspend a machine that has no requests. The answer is [`Pool::at_rest`] or [`Pool::rest_failed`].
    Suspend(Life),
    /// Stop a machine, with the requests that it still has. The answer is [`Pool::at_rest`].
    Stop(Life),
    /// Stop a machine whose start takes too long, or of a version that is gone. There is no answer.
    Kill(Life),
    /// Remove what a suspended machine left: it is of a version that is gone. There is no answer.
    Discard(Life),
}

/// Which machine a request is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Whom {
    /// Any.
    #[default]
    Any,
    /// This slot's if it can be had at once, else any.
    Rather(usize),
    /// This slot's alone, which is started for it.
    Only(usize),
}

/// Why a request gets no machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// As many wait as may.
    QueueFull,
    /// It waited as long as it may.
    TimedOut,
    /// The last start failed, and the next one is not due.
    StartFailed {
        /// Whose log tells why.
        life: Life,
    },
    /// Nothing runs, and requests start nothing here.
    NotStarted,
    /// There is no such slot.
    NoSuchSlot,
}

/// The machines of a group.
#[derive(Clone, Debug)]
pub struct Pool {
    limits: Limits,
    slots: Vec<Slot>,
    queue: Queue,
    boots: Backoff,
    /// Raised by each deploy.
    version: u64,
    quiet: Option<Quiet>,
    actions: Vec<Action>,
}

/// A time in which fewer machines would have done.
#[derive(Clone, Copy, Debug)]
struct Quiet {
    since: Moment,
    /// The most that were needed at any moment of it.
    needed: u32,
}

impl Pool {
    /// A pool without machines; [`Pool::tick`] starts those that are always to run.
    pub fn new(limits: Limits) -> Pool {
        Pool {
            limits,
            slots: Vec::new(),
            queue: Queue::default(),
            boots: Backoff::default(),
            // What is of another version is of the one before.
            version: 1,
            quiet: None,
            actions: Vec::new(),
        }
    }

    /// How many requests wait.
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// Each slot's current life and state.
    pub fn slots(&self) -> impl Iterator<Item = (Life, State)> {
        self.slots
            .iter()
            .enumerate()
            .map(|(index, slot)| (Life { slot: index, number: slot.life }, slot.state))
    }

    /// When [`Pool::tick`] is next to be called, if nothing else happens.
    pub fn next_tick(&self) -> Option<Moment> {
        let slots = self.slots.iter().filter_map(|slot| slot.deadline(&self.limits));
        let idle = self.quiet.map(|quiet| quiet.since.saturating_add(self.limits.idle_timeout));
        let boot = self.wants_boot().then(|| self.boots.due());
        let busy = self.slots.iter().filter(|slot| slot.is_alive()).filter_map(|slot| slot.busy_until);
        slots.chain(self.queue.deadline()).chain(idle).chain(boot).chain(busy).min()
    }
}
