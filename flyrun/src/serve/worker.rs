//! What is done to one slot's machine, one thing after another.
//!
//! A start is cut short when its life is over; a suspend is given up when a start comes; all else is waited for.

use std::sync::Arc;
use std::time::{Duration, Instant};

use app::config::model::{Asks, Check};
use app::pool::Life;
use page::What;
use tokio::sync::{Notify, OwnedSemaphorePermit, mpsc, watch};
use tokio::task::{JoinHandle, spawn_blocking};

use super::check::{self, Probe};
use super::group::{Group, Probes, last_start};
use super::host::{Host, Kind, Started};
use super::life::{follow, keep_checking};
use super::limits::Memory;
use super::template::Template;
use crate::error::{Error, Result};
use crate::machine::new_id;

/// How long to wait before a start is told once more that it is over.
const ABORT_POLL: Duration = Duration::from_millis(50);

/// What a worker is told to do.
#[derive(Debug)]
pub enum Order {
    Start(Box<Start>),
    Suspend(Life),
    Stop(Life),
    Kill,
    Discard,
    /// The machine has ended by itself.
    Gone(Life),
}

/// A life that begins.
#[derive(Debug)]
pub struct Start {
    pub life: Life,
    /// Turns true when the life is over, also before the machine runs.
    pub over: watch::Receiver<bool>,
    /// The machine was found to run.
    pub runs: bool,
    /// `[checks]` are to pass too before it is ready: it is of a new version.
    pub is_trial: bool,
    pub template: Arc<Template>,
    pub probes: Arc<Probes>,
}

/// Does what is to be done to a slot's machine.
#[derive(Debug)]
pub struct Worker {
    group: Arc<Group>,
    slot: usize,
    /// The machine that the slot has.
    id: Option<Arc<str>>,
    /// What the life that runs began with.
    begun: Option<Box<Start>>,
    memory: Option<Memory>,
    orders: mpsc::UnboundedReceiver<Order>,
}

impl Worker {
    pub fn new(
        group: Arc<Group>,
        slot: usize,
        id: Option<Arc<str>>,
        orders: mpsc::UnboundedReceiver<Order>,
    ) -> Worker {
        Worker { group, slot, id, begun: None, memory: None, orders }
    }

    /// Until nobody gives orders any more.
    pub async fn work(mut self) {
        let mut next = None;
        loop {
            let order = match next.take() {
                Some(order) => order,
                None => match self.orders.recv().await {
                    Some(order) => order,
                    None => return,
                },
            };
            match order {
                Order::Start(start) => self.start(start).await,
                Order::Suspend(life) => next = self.suspend(life).await,
                Order::Stop(life) => self.stop(life).await,
                Order::Kill => self.kill().await,
                Order::Discard => self.discard().await,
                Order::Gone(life) => {
                    if self.begun.as_ref().is_some_and(|begun| begun.life == life) {
                        self.memory = None;
                    }
                }
            }
        }
    }

    fn host(&self) -> Arc<Host> {
        self.group.shared.host.clone()
    }

    async fn start(&mut self, start: Box<Start>) {
        let begun = Instant::now();
        let mut over = start.over.clone();
        let life = start.life;
        let is_first = self.id.is_none();
        let started = match self.bring_up(&start).await {
            Ok(Some(started)) => started,
            Ok(None) => {
                self.memory = None;
                return;
            }
            Err(error) => {
                self.memory = None;
                self.host().children.left_something();
                if is_first {
                    // What others have begun with is not to be tried again.
                    let (host, template) = (self.host(), start.template.clone());
                    let _ = spawn_blocking(move || host.drop_golden(&template)).await;
                }
                self.group.start_failed(life, &error);
                return;
            }
        };
        if let Some(reason) = &started.reason {
            self.group
                .line_of("not resumed", life)
                .with("machine", &*started.id)
                .with("why", reason.as_str())
                .end();
        }
        let mut gates = gates(&start.probes.gates, started.kind);
        if start.is_trial {
            gates.extend(start.probes.named.iter().map(|(_, probe)| probe.clone()));
        }
        let tell = |why| self.group.troubles(life, why);
        let connected = tokio::select! {
            connected = check::pass(&gates, started.address, &tell) => connected,
            () = is_over(&mut over) => {
                self.begun = Some(start);
                return;
            }
        };
        let took = begun.elapsed();
        if let Some(kind) = started.kind {
            let line =
                self.group.line_of("ready", life).with("machine", &*started.id).with("start", kind.name());
            line.with("ms", (took.as_secs_f64() * 10_000.0).round() / 10.0).end();
        }
        if let Some(stream) = connected {
            started.opened.put(stream);
        }
        if let Some(recheck) = self.group.ready(life, last_start(&started, took)) {
            self.check(&start, &started, start.over.clone(), recheck);
        }
        self.begun = Some(start);
    }

    fn check(&self, start: &Start, started: &Started, over: watch::Receiver<bool>, recheck: Arc<Notify>) {
        let (group, probes) = (self.group.clone(), start.probes.clone());
        tokio::spawn(keep_checking(group, start.life, started.address, probes, over, recheck));
    }

    /// A machine that runs; `None` if its life is over already.
    async fn bring_up(&mut self, start: &Start) -> Result<Option<Started>> {
        let mut over = start.over.clone();
        let Some(_turn) = self.turn(start).await? else { return Ok(None) };
        self.group.begins(start.life);
        if *over.borrow() {
            return Ok(None);
        }
        let fresh: Arc<str> = new_id()?.into();
        let (host, template, slot) = (self.host(), start.template.clone(), self.slot);
        let (known, new) = (self.id.clone(), fresh.clone());
        let runs = known.clone().filter(|_| start.runs);
        let mut starting = spawn_blocking(move || match runs {
            Some(id) => host.take_over(&id),
            None => host.start(&template, slot, known.as_deref(), &new),
        });
        let result = tokio::select! {
            done = &mut starting => done,
            () = is_over(&mut over) => self.abort(starting, &fresh).await,
        };
        let result =
            result.map_err(|error| Error::caused("the start was cut off", &error)).and_then(|result| result);
        // What was begun is there, however it ended: another start finds out what it is.
        if self.id.is_none() || result.is_ok() {
            self.id = Some(result.as_ref().map_or(fresh, |started| started.id.clone()));
        }
        let started = match result {
            // Told to end, it says so; nobody waits for that.
            Err(_) if *over.borrow() => return Ok(None),
            result => result?,
        };
        self.group.runs(start.life, started.clone());
        tokio::spawn(follow(self.group.clone(), start.life, started.id.clone()));
        Ok(Some(started))
    }

    /// Waits until the start may begin, with memory for the machine; `None` if its life is over before.
    async fn turn(&mut self, start: &Start) -> Result<Option<Turn>> {
        let mut over = start.over.clone();
        let limits = self.group.shared.limits.clone();
        let mib = start.template.memory_mib();
        if start.runs {
            self.memory = Some(limits.memory_of_running(mib));
            return Ok(Some(Turn(None)));
        }
        // What is being suspended has its memory still, and goes on with it: to give it away would be to have it twice.
        let kept = self.memory.take().filter(|memory| memory.mib() == mib);
        let wanted = async {
            let memory = match kept {
                Some(kept) => kept,
                None => limits.memory(mib).await?,
            };
            Ok::<_, Error>((memory, Turn(Some(limits.start().await?))))
        };
        let why = "it waits for its turn: others start, or have the host's memory";
        self.group.troubles(start.life, why.to_string());
        tokio::select! {
            biased;
            () = is_over(&mut over) => Ok(None),
            wanted = wanted => {
                let (memory, turn) = wanted?;
                self.memory = Some(memory);
                Ok(Some(turn))
            }
        }
    }

    /// Ends a machine that is being started.
    async fn abort(
        &self,
        mut starting: JoinHandle<Result<Started>>,
        fresh: &Arc<str>,
    ) -> std::result::Result<Result<Started>, tokio::task::JoinError> {
        loop {
            for id in self.id.iter().chain([fresh]) {
                let (host, id) = (self.host(), id.clone());
                // There may be none of this id yet.
                let _ = spawn_blocking(move || host.kill(&id)).await;
            }
            tokio::select! {
                done = &mut starting => return done,
                () = tokio::time::sleep(ABORT_POLL) => {}
            }
        }
    }

    /// Brings the machine to disk. Gives the order that came meanwhile.
    async fn suspend(&mut self, life: Life) -> Option<Order> {
        let id = self.id.clone()?;
        let begun = Instant::now();
        let host = self.host();
        let own = id.clone();
        let mut suspending = spawn_blocking(move || host.suspend(&own));
        let (mut next, mut is_open) = (None, true);
        let result = loop {
            tokio::select! {
                biased;
                done = &mut suspending => break done,
                order = self.orders.recv(), if next.is_none() && is_open => {
                    is_open = order.is_some();
                    if matches!(order, Some(Order::Start(_))) {
                        let (host, own) = (self.host(), id.clone());
                        spawn_blocking(move || host.go_on(&own));
                    }
                    next = order;
                }
            }
        };
        let result =
            result.map_err(|error| Error::caused("it was cut off", &error)).and_then(|result| result);
        if matches!(next, Some(Order::Start(_))) {
            // Whether it is on disk or runs on, the start finds out.
            return next;
        }
        match result {
            Ok(()) => {
                let ms = (begun.elapsed().as_secs_f64() * 10_000.0).round() / 10.0;
                self.group.line_of("suspended", life).with("machine", &*id).with("ms", ms).end();
                self.shows(&id, What::Suspended, Some(begun.elapsed()));
                self.memory = None;
                self.group.at_rest(life);
                self.keep_golden(&id).await;
            }
            Err(error) => self.stays(life, &id, &error).await,
        }
        next
    }

    /// Other slots begin where this one was suspended.
    async fn keep_golden(&self, id: &Arc<str>) {
        let template = self.group.template();
        let is_current = self.begun.as_ref().is_none_or(|begun| begun.template.version == template.version);
        // One that is replaced would take the place of what the next version has left.
        if !is_current || !self.group.scales_out() || self.group.is_retired() {
            return;
        }
        let (host, id) = (self.host(), id.clone());
        if let Ok(Err(error)) = spawn_blocking(move || host.keep_golden(&template, &id)).await {
            self.group.line("no snapshot for further machines").with("why", error.to_string()).end();
        }
    }

    /// A machine was not suspended: it runs on, or has ended.
    async fn stays(&mut self, life: Life, id: &Arc<str>, error: &Error) {
        let (host, own) = (self.host(), id.clone());
        let record = spawn_blocking(move || host.context.machines().find(&own).ok()).await.ok().flatten();
        if record.as_ref().is_some_and(|record| record.state.needs_monitor()) {
            let renewed = self.group.rest_failed(life, &error.to_string());
            let machine = self.group.machine(life);
            if let (Some((over, recheck)), Some(machine), Some(begun)) = (renewed, machine, &self.begun) {
                self.check(begun, &machine, over, recheck);
            }
        } else {
            self.memory = None;
            self.group.died(life, record.as_ref(), Duration::ZERO);
        }
    }

    async fn stop(&mut self, life: Life) {
        let begun = Instant::now();
        if let Some(id) = self.id.clone() {
            self.end(id.clone()).await;
            self.group.line_of("stopped", life).with("machine", &*id).end();
            self.shows(&id, What::Stopped, Some(begun.elapsed()));
            let is_old = |start: &Start| start.template.version != self.group.template().version;
            let is_old = self.begun.as_deref().is_some_and(is_old);
            let is_beyond = self.slot >= self.group.max_machines() as usize;
            if ((is_old || is_beyond) && !self.group.is_leaving()) || self.group.is_retired() {
                self.discard().await;
            }
        }
        self.memory = None;
        self.group.at_rest(life);
    }

    async fn kill(&mut self) {
        if let Some(id) = self.id.clone() {
            let host = self.host();
            let killed = spawn_blocking(move || host.kill(&id)).await;
            self.tell_failure(killed.ok());
        }
        self.memory = None;
    }

    /// Stops the machine; at once, if it takes longer than it may.
    async fn end(&self, id: Arc<str>) {
        let host = self.host();
        let stopped = spawn_blocking(move || host.stop(&id, None).or_else(|_| host.kill(&id))).await;
        self.tell_failure(stopped.ok());
    }

    fn tell_failure(&self, result: Option<Result<()>>) {
        if let Some(Err(error)) = result {
            self.group.line("stop failed").with("slot", self.slot).with("why", error.to_string()).end();
        }
    }

    async fn discard(&mut self) {
        let Some(id) = self.id.take() else { return };
        let (host, own) = (self.host(), id.clone());
        match spawn_blocking(move || host.remove(&own)).await {
            Ok(Err(error)) => {
                self.group.line("removal failed").with("machine", &*id).with("why", error.to_string()).end();
                self.id = Some(id);
            }
            Ok(Ok(())) => self.shows(&id, What::Destroyed, None),
            Err(_) => {}
        }
    }

    /// Keeps for the page what has happened to a machine.
    fn shows(&self, id: &str, what: What, took: Option<Duration>) {
        self.group.shared.events.add(&self.group.app, id, what, took);
    }
}

/// A start's turn, until this is dropped.
struct Turn(#[expect(dead_code, reason = "it is held")] Option<OwnedSemaphorePermit>);

/// Returns when a life is over.
pub async fn is_over(over: &mut watch::Receiver<bool>) {
    // A sender that is gone has begun another life.
    let _ = over.wait_for(|over| *over).await;
}

/// What a machine is asked when it has started. One that goes on where it was has passed its checks before: it is asked only
/// whether it can be connected to.
fn gates(probes: &[Probe], kind: Option<Kind>) -> Vec<Probe> {
    if kind != Some(Kind::Resumed) {
        return probes.to_vec();
    }
    let mut gates: Vec<Probe> = Vec::new();
    for probe in probes {
        if gates.iter().all(|gate| gate.port != probe.port) {
            let check = Check { asks: Asks::Tcp, ..probe.check.clone() };
            gates.push(Probe { port: probe.port, check });
        }
    }
    gates
}
