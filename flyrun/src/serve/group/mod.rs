//! The machines of one group of one app: a [`Pool`] decides, and what it decides is handed on to each slot's worker.
//!
//! All that happens to a group comes through [`Group::happens`]: the pool is told under a lock, and its answers go out before the
//! lock is released, in their order. Nothing in there waits: an order is put into a worker's queue, an answer into a channel.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use app::config::model::{App, Restart};
use app::pool::{Action, Found, Life, Limits, Moment, Pool, Refusal, Request, Whom};
use proxy::Opened;
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc, oneshot, watch};

mod actions;
mod reports;
mod trial;
mod view;

pub use reports::last_start;
use trial::Trial;
pub use trial::{Failure, Standing};
pub use view::{MachineView, View};

use super::check::Probe;
use super::events::Events;
use super::host::{Host, Kind, Started};
use super::limits::HostLimits;
use super::log::Log;
use super::metrics::Counts;
use super::room::Groups;
use super::targets::Scrape;
use super::template::Template;
use super::worker::Order;
use crate::machine::restart::{RestartPolicy, Restarts};

/// A timer that is never due.
const NEVER: Duration = Duration::from_secs(3600);

/// What all groups share.
#[derive(Debug)]
pub struct Shared {
    pub host: Arc<Host>,
    pub limits: HostLimits,
    pub log: Log,
    pub counts: Counts,
    pub events: Events,
    /// For memory that others are to give.
    pub groups: Groups,
    runtime: Handle,
    born: Instant,
}

impl Shared {
    /// Within a runtime, whose tasks do the work.
    pub fn new(host: Host, limits: HostLimits, log: Log) -> Shared {
        let (host, runtime) = (Arc::new(host), Handle::current());
        let (counts, events, groups) = (Counts::default(), Events::default(), Groups::default());
        Shared { host, limits, log, counts, events, groups, runtime, born: Instant::now() }
    }

    /// Does something that takes its time.
    pub fn spawn_blocking(&self, work: impl FnOnce() + Send + 'static) {
        self.runtime.spawn_blocking(work);
    }

    pub fn now(&self) -> Moment {
        self.born.elapsed()
    }
}

/// What a group is to be.
#[derive(Clone, Debug)]
pub struct Wishes {
    pub template: Arc<Template>,
    pub limits: Limits,
    pub probes: Arc<Probes>,
    /// What follows when a process ends by itself, where no requests tell whether it is needed.
    pub restart: Option<RestartPolicy>,
    pub cpus: u8,
    /// Where machines tell Prometheus of themselves.
    pub metrics: Option<Scrape>,
}

/// What machines of a group are asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Probes {
    /// A machine gets requests while all of these pass.
    pub gates: Vec<Probe>,
    /// `[checks]`, by name: they are told of, and nothing else.
    pub named: Vec<(String, Probe)>,
}

impl Wishes {
    /// What an app's file says of one of its groups.
    pub fn new(app: &App, template: Template, counts: &BTreeMap<String, u32>) -> Wishes {
        let name = &*template.group;
        let services =
            || app.services.iter().filter(|service| service.groups.iter().any(|group| group == name));
        let probe = |port, check: &app::config::model::Check| Probe { port, check: check.clone() };
        let gates = services()
            .flat_map(|service| service.checks.iter().map(move |check| probe(service.internal_port, check)))
            .collect();
        let is_ours = |check: &app::config::model::NamedCheck| check.groups.iter().any(|group| group == name);
        let named = app.checks.iter().filter(|(_, check)| is_ours(check));
        let named = named.map(|(name, named)| (name.clone(), probe(named.port, &named.check))).collect();
        let restart =
            app.groups.get(name).filter(|_| services().next().is_none()).map(|group| policy(group.restart));
        let limits = match counts.get(name) {
            Some(count) => Limits::new(app, name).scaled(*count, services().next().is_some()),
            None => Limits::new(app, name),
        };
        let probes = Arc::new(Probes { gates, named });
        let metrics = app.groups.get(name).and_then(|group| group.metrics.as_ref()).map(|metrics| Scrape {
            port: metrics.port,
            path: metrics.path.clone(),
            region: app.primary_region.clone(),
        });
        Wishes { limits, probes, restart, cpus: template.cpus(), metrics, template: Arc::new(template) }
    }
}

fn policy(restart: Restart) -> RestartPolicy {
    match restart {
        Restart::Never => RestartPolicy::No,
        Restart::OnFailure { retries } => RestartPolicy::OnFailure(Some(retries)),
        Restart::Always => RestartPolicy::Always,
    }
}

/// A machine that was there before its group.
#[derive(Clone, Debug)]
pub struct Before {
    pub slot: usize,
    pub id: Arc<str>,
    /// `None` if it neither runs nor is on disk.
    pub found: Option<Found>,
    /// Whether its process has done its work, where that has ended and is of the current version.
    pub succeeded: Option<bool>,
}

/// Machines that are equal, and those who wait for one.
#[derive(Debug)]
pub struct Group {
    pub app: Arc<str>,
    pub name: Arc<str>,
    pub shared: Arc<Shared>,
    /// The number of its first slot's machine, which stays.
    first: usize,
    inner: Mutex<Inner>,
    /// Something is due sooner than the timer knows.
    sooner: Notify,
    /// Told whenever something has happened.
    changed: watch::Sender<()>,
}

#[derive(Debug)]
struct Inner {
    pool: Pool,
    wishes: Wishes,
    waiting: HashMap<Request, oneshot::Sender<Answer>>,
    slots: Vec<Slot>,
    requests: Request,
    /// When the timer goes off.
    timer: Moment,
    restarts: Restarts,
    /// How many processes have ended that are not to start again.
    finished: u32,
    ending: Ending,
    /// It is being found out whether its machines do their work: what fails ends the trial.
    trial: Option<Trial>,
}

/// Whether a group is at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    No,
    /// The app is served no more: its machines end and stay.
    Stays,
    /// Another group has taken its place: its machines end and go.
    Goes,
}

/// What is known of a slot, beside what its pool knows.
#[derive(Debug)]
pub struct Slot {
    orders: mpsc::UnboundedSender<Order>,
    life: u64,
    /// The machine that it has.
    id: Option<Arc<str>>,
    /// Its end was ordered.
    is_ending: bool,
    over: watch::Sender<bool>,
    /// Raised whenever connections of before are used no more.
    epoch: u64,
    machine: Option<Arc<Started>>,
    last_start: Option<LastStart>,
    /// Until then its workload works, as it says, whether it has requests or not.
    busy_until: Option<Instant>,
    /// What the last check that failed said.
    trouble: Option<String>,
    /// Why the last life failed, by the id of the line in the log.
    failure: Option<(u64, String)>,
    recheck: Arc<Notify>,
    /// `[checks]` that fail, with what they said.
    named: Vec<(String, String)>,
}

/// How a machine came to run the last time.
#[derive(Clone, Debug)]
pub struct LastStart {
    pub kind: Kind,
    pub at: SystemTime,
    /// Until it was ready.
    pub took: Duration,
}

/// What a request is answered.
#[derive(Debug)]
enum Answer {
    Granted(Grant),
    Refused { why: Refusal, retry_after: Duration, id: Option<String> },
}

/// A machine for a request.
#[derive(Debug)]
pub struct Grant {
    pub life: Life,
    pub epoch: u64,
    pub id: Arc<str>,
    pub address: IpAddr,
    pub opened: Arc<Opened>,
    pub over: watch::Receiver<bool>,
}

/// Why there is none.
#[derive(Clone, Debug)]
pub struct Denied {
    pub why: Refusal,
    pub retry_after: Duration,
    /// Of the line in the log, where there is one already.
    pub id: Option<String>,
}

/// The use of a machine, until it is dropped.
#[derive(Debug)]
pub struct InUse {
    pub group: Arc<Group>,
    pub life: Life,
}

impl Drop for InUse {
    fn drop(&mut self) {
        let life = self.life;
        self.group.happens(|pool, now| pool.ended(now, life));
        self.group.shared.limits.may_have_room();
    }
}

/// A request that may still wait. Dropped before its answer, it does not wait any more.
struct Asking {
    group: Arc<Group>,
    request: Request,
    answer: oneshot::Receiver<Answer>,
    is_answered: bool,
}

impl Drop for Asking {
    fn drop(&mut self) {
        if self.is_answered {
            return;
        }
        let request = self.request;
        let group = self.group.clone();
        let mut inner = group.lock();
        let now = self.group.shared.now();
        let actions = match (inner.waiting.remove(&request), self.answer.try_recv()) {
            (Some(_), _) => inner.pool.cancelled(now, request),
            (None, Ok(Answer::Granted(grant))) => inner.pool.ended(now, grant.life),
            (None, _) => return,
        };
        group.follow(&mut inner, actions);
    }
}

impl Group {
    /// A group, with the machines that were there before. Its tasks end with the runtime.
    pub fn open(shared: Arc<Shared>, wishes: Wishes, found: &[Before]) -> Arc<Group> {
        let limits = wishes.limits;
        let group = Group::new(shared, wishes, limits);
        group.take_over(found);
        group.shared.runtime.spawn(group.clone().keep_time());
        group
    }

    fn new(shared: Arc<Shared>, wishes: Wishes, limits: Limits) -> Arc<Group> {
        let pool = Pool::new(limits);
        let group = Arc::new(Group {
            app: wishes.template.app.clone(),
            name: wishes.template.group.clone(),
            shared,
            first: wishes.template.first,
            inner: Mutex::new(Inner {
                pool,
                wishes,
                waiting: HashMap::new(),
                slots: Vec::new(),
                requests: 0,
                timer: Moment::ZERO,
                restarts: Restarts::default(),
                finished: 0,
                ending: Ending::No,
                trial: None,
            }),
            sooner: Notify::new(),
            changed: watch::Sender::new(()),
        });
        group.shared.groups.add(&group);
        group
    }

    fn take_over(self: &Arc<Self>, found: &[Before]) {
        let mut inner = self.lock();
        let now = self.shared.now();
        let count = found.iter().map(|before| before.slot + 1).max().unwrap_or(0);
        for number in 0..count.min(inner.wishes.limits.max_machines as usize) {
            let before = found.iter().find(|before| before.slot == number);
            let slot = self.new_slot(number, before.map(|before| before.id.clone()));
            inner.slots.push(slot);
            let Some(what) = before.and_then(|before| before.found) else { continue };
            let Some(life) = inner.pool.found(now, number, what) else { continue };
            match (what, inner.slots.get_mut(number)) {
                // Started again, it is found to run.
                (Found::Running { .. }, _) => self.order_start(&mut inner, life, true),
                (Found::Suspended, Some(slot)) => slot.life = life.number,
                (Found::Suspended, None) => {}
            }
        }
        for beyond in found.iter().filter(|before| before.slot >= inner.wishes.limits.max_machines as usize) {
            let (host, id) = (self.shared.host.clone(), beyond.id.clone());
            self.line("machine beyond max_machines is removed").with("machine", &*id).end();
            self.shared.runtime.spawn_blocking(move || host.stop(&id, None).and_then(|()| host.remove(&id)));
        }
        for succeeded in found.iter().filter_map(|before| before.succeeded) {
            if !inner.starts_again(succeeded, Duration::ZERO) {
                let actions = inner.finish(now);
                self.follow(&mut inner, actions);
            }
        }
        let actions = inner.pool.tick(now);
        self.follow(&mut inner, actions);
        let actions = inner.pool.prepare(now);
        self.follow(&mut inner, actions);
    }

    /// Follows a file that has changed. Machines are replaced if others would be made now.
    pub fn change(self: &Arc<Self>, wishes: Wishes) {
        let mut inner = self.lock();
        let now = self.shared.now();
        let is_new = wishes.template.version != inner.wishes.template.version;
        inner.wishes = wishes;
        inner.ending = Ending::No;
        if is_new {
            inner.finished = 0;
        }
        let limits = inner.limits();
        let actions = inner.pool.limit(now, limits);
        self.follow(&mut inner, actions);
        inner.discard_resting(limits.max_machines as usize);
        if is_new {
            inner.restarts = Restarts::default();
            self.line("deploy").with("version", &*inner.wishes.template.version).end();
            let actions = inner.pool.deploy(now);
            self.follow(&mut inner, actions);
        }
        let actions = inner.pool.prepare(now);
        self.follow(&mut inner, actions);
    }

    /// The app is served no more: requests end, machines stop one after another, and stay.
    pub fn leave(self: &Arc<Self>) {
        let mut inner = self.lock();
        inner.ending = Ending::Stays;
        let limits = Limits { max_machines: 0, min_running: 0, auto_start: false, ..inner.wishes.limits };
        let now = self.shared.now();
        let actions = inner.pool.limit(now, limits);
        self.follow(&mut inner, actions);
    }

    /// The use of a machine for a request. Slots in `not` have failed it.
    ///
    /// # Errors
    /// There is none.
    pub async fn ask(self: &Arc<Self>, whom: Whom, not: &[usize]) -> Result<Grant, Denied> {
        let (sender, answer) = oneshot::channel();
        let request = {
            let mut inner = self.lock();
            inner.requests += 1;
            let request = inner.requests;
            inner.waiting.insert(request, sender);
            let now = self.shared.now();
            let actions = inner.pool.request_for(now, request, whom, not);
            self.follow(&mut inner, actions);
            request
        };
        let mut asking = Asking { group: self.clone(), request, answer, is_answered: false };
        let answer = (&mut asking.answer).await;
        asking.is_answered = true;
        match answer {
            Ok(Answer::Granted(grant)) => Ok(grant),
            Ok(Answer::Refused { why, retry_after, id }) => Err(Denied { why, retry_after, id }),
            Err(_) => Err(Denied { why: Refusal::NotStarted, retry_after: Duration::ZERO, id: None }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the pool what has happened, and does what it answers.
    pub fn happens(self: &Arc<Self>, event: impl FnOnce(&mut Pool, Moment) -> Vec<Action>) {
        let mut inner = self.lock();
        let now = self.shared.now();
        let actions = event(&mut inner.pool, now);
        self.follow(&mut inner, actions);
    }

    /// The machine that is idle for longest, if it may end.
    pub fn idle(&self) -> Option<(Moment, Life)> {
        self.lock().pool.idle()
    }

    /// Ends an idle machine before its time.
    pub fn make_room(self: &Arc<Self>, life: Life) {
        self.line_of("makes room", life).end();
        self.happens(|pool, now| pool.make_room(now, life));
    }

    /// What each of its machines takes.
    pub fn memory_mib(&self) -> u64 {
        self.lock().wishes.template.memory_mib()
    }

    /// What machines that are ending will give back.
    pub fn ending_mib(&self) -> u64 {
        let inner = self.lock();
        inner.pool.ending() as u64 * inner.wishes.template.memory_mib()
    }

    async fn keep_time(self: Arc<Self>) {
        loop {
            let due = {
                let mut inner = self.lock();
                if inner.ending == Ending::Goes && inner.pool.alive() == 0 {
                    // Workers do what they are told still, and end.
                    inner.slots.clear();
                    return;
                }
                let now = self.shared.now();
                let actions = inner.pool.tick(now);
                self.follow(&mut inner, actions);
                let due = inner.pool.next_tick().unwrap_or(now + NEVER);
                inner.timer = due;
                due.saturating_sub(now)
            };
            tokio::select! {
                () = tokio::time::sleep(due) => {}
                () = self.sooner.notified() => {}
            }
        }
    }
}
