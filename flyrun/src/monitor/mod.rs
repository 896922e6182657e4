//! The process that owns a machine, from its first start to its last end: restarts, requests, log, state on disk.
//!
//! In the foreground `flyrun run` is the monitor itself; in the background it is a process of its own ([`spawn`]).

mod base;
mod company;
mod control;
mod front;
pub mod health;
mod learn;
mod lease;
mod life;
pub mod log;
pub mod outputs;
mod plan;
mod requests;
mod snapshot;
mod spawn;
pub mod suspend;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use images::Store;
use protocol::{ExitStatus, TtySize};
use vmm::spec::queue_pairs;

#[cfg(any(test, feature = "fuzzing"))]
pub use control::read_line;
pub use control::{Conversation, Reply, Request, ask, socket};
pub use front::Front;
pub use lease::busy_seconds;
pub use spawn::{ONE_ARENA, Report, spawn};

use self::base::FromBase;
use self::company::{Company, Place};
use self::learn::Learning;
use self::lease::Lease;
use self::life::{Life, Step};
use self::outputs::{Input, Outputs, Own, feed};
use self::snapshot::Taking;
use self::suspend::Suspending;
use crate::cgroup::Cgroup;
use crate::error::{Context, Error, Result, from_images};
use crate::exit_code::ExitCode;
use crate::interrupt::Interrupts;
use crate::machine::restart::{self, Restarts};
use crate::machine::{LastStart, Outcome, Owned, State, now};
use crate::paths::{Library, Paths, RunDir};
use crate::share::Served;
use crate::vm::{Event, Mailbox, Streams, Vm, leave_spare, spawn as spawn_thread};
use crate::{network, random, terminal, trace};

/// Bytes of the host's randomness that each guest starts or goes on with.
const ENTROPY_BYTES: usize = 64;

/// How long a monitor works for a guest at the host's expense, from its life's start on. A start is over by then, and nobody waits
/// for the kernel to move a process to another cgroup.
const JOINS_AFTER: Duration = Duration::from_millis(100);

/// The exit code of a process that was given up with its memory: SIGKILL's.
pub const KILLED: u8 = 137;

/// How a life of a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The workload ran and ended.
    Workload(ExitStatus),
    /// The workload's command could not be executed.
    NoCommand { code: u8, message: String },
    /// The user gave up.
    Interrupted { signal: i32, started: bool },
    /// The machine is on disk.
    Suspended,
}

/// What a monitor works with.
#[derive(Debug)]
pub struct Host<'a> {
    pub paths: &'a Paths,
    pub library: &'a Library,
    pub store: &'a Store,
}

/// How the machine is seen by the one who starts it.
#[derive(Debug)]
pub struct View {
    pub front: Front,
    /// Whether its output also goes to flyrun's own streams.
    pub own_output: bool,
    /// Whether flyrun's own input goes to it.
    pub own_input: bool,
    /// The size of the terminal it gets, if it gets one.
    pub terminal: TtySize,
    /// Whether the guest's console is shown on standard error.
    pub show_console: bool,
}

impl View {
    /// The command that the user waits for is the monitor.
    pub fn of_user(own_input: bool) -> View {
        View {
            front: Front::User { interrupts: Interrupts::default(), raw_mode: None },
            own_output: true,
            own_input,
            terminal: terminal::size(),
            show_console: false,
        }
    }

    /// The monitor is a process of its own.
    pub fn of_nobody(stop_signal: i32, stop_timeout: Duration) -> View {
        View {
            front: Front::Nobody { stop_signal, stop_timeout },
            own_output: false,
            own_input: false,
            terminal: terminal::DEFAULT_SIZE,
            show_console: false,
        }
    }
}

/// Runs a machine until it is not started again, and removes it then if it is to go by itself. `started` is called when
/// its process runs for the first time.
///
/// # Errors
/// The last life failed, or could not begin.
pub fn run(host: &Host, machine: Owned, view: View, started: &mut dyn FnMut()) -> Result<End> {
    // Its threads pass on what others have, and there may be hundreds of monitors.
    vmm::heap::share();
    let mut monitor = Monitor::new(host, machine, view)?;
    let result = monitor.run(started);
    trace::step("ended");
    monitor.conclude(&result)?;
    // It may have been too short for that to be done meanwhile.
    leave_spare();
    result
}

struct Monitor<'a> {
    host: &'a Host<'a>,
    machine: Owned,
    view: View,
    run_dir: Arc<RunDir>,
    mailbox: Mailbox,
    /// Requests and signals, which wait until somebody [listens](Monitor::listen): the threads for that are begun when the first guest
    /// is under way.
    unheard: Option<(control::Door, front::Watch)>,
    outputs: Arc<Outputs>,
    input: Option<Arc<Input>>,
    /// Holds it to its share of the CPU, if it has such a limit.
    cgroup: Option<Cgroup>,
    /// When this process joins the cgroup.
    joins_at: Option<Instant>,
    /// Those who are told when this life has ended.
    waiting: Vec<Conversation>,
    /// The user has ended the machine, so that it is not started again.
    is_stopped: bool,
    suspending: Option<Suspending>,
    /// A snapshot that is being taken of the machine, which goes on.
    taking: Option<Taking>,
    /// Why the snapshot that this life was to go on from was not used.
    restore_failed: Option<String>,
    /// The base snapshot that this life went on from.
    base: Option<FromBase>,
    /// This life and those behind it do without one: one could not be gone on from.
    without_base: bool,
    /// Why there is none for this life.
    no_base: Option<String>,
    /// What it has touched of its memory's file is to be written down.
    learning: Option<Learning>,
    cold_reason: Option<String>,
    lease: Lease,
}

impl<'a> Monitor<'a> {
    fn new(host: &'a Host<'a>, machine: Owned, view: View) -> Result<Monitor<'a>> {
        let run_dir = Arc::new(host.paths.make_run_dir(&machine.record().id)?);
        let config = &machine.record().config;
        let own = if view.own_output { Some(Own::streams()?) } else { None };
        let log = config.log.map(|limits| log::Writer::new(machine.directory(), limits));
        let outputs = Arc::new(Outputs::new(own, log));
        let input = config.run.stdin.then(|| Arc::new(Input::default()));
        let mailbox = Mailbox::new();
        let unheard = Some((control::Door::new(run_dir.path())?, front::Watch::new()?));
        Ok(Monitor {
            host,
            machine,
            view,
            run_dir,
            mailbox,
            unheard,
            outputs,
            input,
            cgroup: None,
            joins_at: None,
            waiting: Vec::new(),
            is_stopped: false,
            suspending: None,
            taking: None,
            restore_failed: None,
            base: None,
            without_base: false,
            no_base: None,
            learning: None,
            cold_reason: None,
            lease: Lease::default(),
        })
    }

    /// One life after another, as the restart policy has it.
    fn run(&mut self, started: &mut dyn FnMut()) -> Result<End> {
        if self.machine.record().state != State::Starting {
            self.machine.become_state(State::Starting, |record| record.restarts = 0)?;
        }
        if let Some(input) = self.input.clone().filter(|_| self.view.own_input) {
            let stdin =
                rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3).context("cannot use standard input")?;
            spawn_thread("stdin", move || feed(stdin, &input)).context("cannot start a thread")?;
        }
        let mut restarts = Restarts::default();
        loop {
            let born = Instant::now();
            let result = self.live(started);
            if let Some(reason) = self.restore_failed.take() {
                self.fall_back(reason)?;
                self.forget_suspend(outcome(&result).exit_code);
                continue;
            }
            if let (Err(error), Some(base)) = (&result, self.base.take_if(|base| base.has_failed)) {
                self.give_up_base(&base, error.to_string());
                continue;
            }
            if matches!(result, Ok(End::Suspended)) || self.machine.record().snapshot.is_some() {
                // Not an end: there is a snapshot to go on from.
                self.outputs.finish(&life::last_frame(&result));
                return result;
            }
            self.outputs.finish(&life::last_frame(&result));
            if let Some(input) = &self.input {
                input.disconnect();
            }
            let succeeded = matches!(&result, Ok(end) if end.code().number() == 0);
            let interrupted = matches!(result, Ok(End::Interrupted { .. }));
            let stopped = self.is_stopped || interrupted;
            let ended = restart::Life { succeeded, stopped, lasted: born.elapsed() };
            let Some(pause) = restarts.after(self.machine.record().config.restart, ended) else {
                return result;
            };
            let outcome = outcome(&result);
            let exit_code = outcome.exit_code;
            self.tell_waiting(exit_code);
            self.try_become(State::Starting, |record| {
                record.restarts += 1;
                record.outcome = Some(outcome);
            });
            self.forget_suspend(exit_code);
            self.listen()?;
            if !self.rest(pause) {
                return result;
            }
        }
    }

    /// Waits for the time of the next life; `false` if there is to be none.
    fn rest(&mut self, pause: Duration) -> bool {
        let until = Instant::now() + pause;
        while let Ok(event) = self.mailbox.next(Some(until)) {
            match event {
                Event::Asked(conversation) => self.answer(conversation, None),
                Event::Signal(signal) => match self.view.front.on_signal(signal, false) {
                    front::Response::Kill | front::Response::Stop(..) => self.is_stopped = true,
                    _ => {}
                },
                _ => {}
            }
            if self.is_stopped {
                return false;
            }
        }
        true
    }

    /// Has requests and signals in the mailbox, those too that wait already.
    fn listen(&mut self) -> Result<()> {
        if let Some((requests, signals)) = self.unheard.take() {
            requests.open(self.mailbox.post())?;
            signals.begin(self.mailbox.post())?;
        }
        Ok(())
    }

    fn live(&mut self, started: &mut dyn FnMut()) -> Result<End> {
        // Held as long as the machine runs: nobody may remove what it stands on.
        let chain_id = self.machine.record().chain_id.parse().context("the machine's record is damaged")?;
        let lease = self.host.store.hold_rootfs(&chain_id).map_err(|error| from_images(&error))?;
        let Some(lease) = lease else {
            let told = format!("the root filesystem of {} is gone", self.machine.record().image);
            return Err(
                Error::new(told).advice("Pull the image again with `flyrun run`, or remove the machine.")
            );
        };
        let attached = self.attach_volumes()?;
        self.limit(None)?;
        // Before the machine, so that they end after it.
        let served = self.serve_shares()?;
        let record = self.machine.record();
        let wishes = &record.config.network;
        let card = network::Card {
            queue_pairs: queue_pairs(record.config.cpus),
            number: record.snapshot.as_ref().and_then(|snapshot| snapshot.network_number),
        };
        let mut network = network::set_up(self.host.paths, &record.id, &record.name, wishes, card)?;
        trace::step("network made");
        if let Some(network) = &network {
            let told = "cannot write down the machine's network";
            network.facts().write(self.run_dir.path()).context(told)?;
        }
        let mut plan = self.plan(lease.path(), &attached, &served, network.as_ref())?;
        self.learning = None;
        self.base = self.find_base(&plan, network.as_mut())?;
        if let Some(disk) = &plan.new_disk {
            self.make_disk(disk)?;
        }
        if let Some(base) = &self.base {
            plan.restore = Some(base.snapshot.directory.clone());
        }
        let post = self.mailbox.begin_life();
        let vm = Vm::start(&mut plan, self.run_dir.clone(), &post)?;
        // The host's rules are made while the guest boots.
        if let Some(network) = &mut network {
            network.wait_ready()?;
        }
        vm.wait_for_guest();
        let vm = vm.attend()?;
        self.listen()?;
        let config = &self.machine.record().config;
        // Without input for the workload, the keyboard stays the user's: Ctrl-C then is a signal, not a byte.
        if config.tty && config.run.stdin && self.view.own_input {
            self.view.front.enter_raw_mode()?;
        }
        // A trace is written when the VMM ends by itself, so that is waited for too.
        let keeps_own = !config.auto_remove && config.disk.is_some();
        let keeps_volume = config.volumes.iter().any(|used| !used.read_only)
            || config.shares.iter().any(|share| !share.read_only);
        let keeps_disk = keeps_own || keeps_volume || trace::vmm_file().is_some();
        let streams = plan.streams.as_ref().map_or(0, Streams::count);
        // Before the life, so that it is taken away after it.
        let mut place = Place { network, post };
        let is_restored = self.machine.record().snapshot.is_some();
        let mut life = match (&self.base, is_restored) {
            (Some(_), _) => Life::from_base(vm, streams, keeps_disk),
            (None, true) => Life::restored(vm, streams, keeps_disk),
            (None, false) => Life::new(vm, streams, keeps_disk),
        };
        let mut company = Company::default();
        let mut started = || {
            served.iter().for_each(Served::begin);
            started();
        };
        self.joins_at = Some(Instant::now() + JOINS_AFTER);
        let result = self.follow(&mut life, &mut company, &mut place, &mut started);
        self.leave_cgroup();
        if let Some(network) = &mut place.network
            && (matches!(result, Ok(End::Suspended)) || self.machine.record().comes_back())
        {
            network.will_come_back();
        }
        self.forget_snapshot();
        let result = result.or_else(|error| self.settle_on_disk(&life, error));
        if let Some(meter) = company.meter {
            let snapshot = self.machine.record().snapshot.as_ref();
            meter.end(snapshot.filter(|_| matches!(result, Ok(End::Suspended))).map(|it| it.taken_at_ms));
        }
        if let Err(error) = &result
            && is_restored
            && self.machine.record().snapshot.is_some()
            && !self.is_stopped
            && !life.was_killed()
        {
            self.restore_failed = Some(error.to_string());
        }
        if let (Err(_), Some(base)) = (&result, &mut self.base) {
            base.has_failed = life.is_stillborn() && !self.is_stopped;
        }
        health::forget(self.machine.directory());
        if keeps_disk {
            // The next life writes to the same disk.
            life.vm.end();
        }
        result.map_err(|error| blame(&served, error))
    }

    fn follow(
        &mut self,
        life: &mut Life,
        company: &mut Company,
        place: &mut Place,
        started: &mut dyn FnMut(),
    ) -> Result<End> {
        loop {
            let lease = self.lease.due(Instant::now());
            let learning = self.learning.as_ref().map(Learning::due);
            let wake = [company.due(), learning, lease, self.joins_at].into_iter().flatten().min();
            let step = life.step(&self.mailbox, &mut self.view.front, wake)?;
            self.join_cgroup_when_due();
            self.learn(life);
            self.tell_lease();
            let paused = self.machine.record().state == State::Paused || life.is_still();
            if self.machine.record().state == State::Paused && life.has_exited() {
                // Its last word was under way when it was paused.
                self.unpause(life)?;
            }
            company.tend(self.host.paths, life.has_exited(), paused);
            match step {
                Step::Nothing => {}
                Step::Busy(seconds) => {
                    self.is_busy(seconds);
                    self.tell_lease();
                }
                Step::Started => {
                    self.begin_company(company, place, life.vm.pid());
                    let reason = self.cold_reason.take();
                    let last_start = match &self.base {
                        Some(base) => {
                            self.learning = Learning::for_base(&base.snapshot.directory);
                            LastStart::Base
                        }
                        None => LastStart::ColdBoot { reason, no_base: self.no_base.take() },
                    };
                    self.try_become(State::Started, |record| {
                        record.started_at = Some(now());
                        record.last_start = Some(last_start);
                    });
                    started();
                }
                Step::Restored => {
                    // While the guest waits for what it is to do.
                    life.vm.read_ahead();
                    if !self.run_from_base(life)? {
                        self.commit_resume(life, place)?;
                    }
                }
                Step::Stands if self.taking.is_some() => self.on_stands_for_snapshot(life, place),
                Step::Stands => self.on_stands(life, place),
                Step::StandsNot(why) => {
                    self.on_no_snapshot(&why);
                    self.on_stands_not(&why);
                }
                Step::Resumed if company.meter.is_none() => {
                    self.begin_company(company, place, life.vm.pid());
                    self.learning = Some(Learning::new(self.snapshot_directory()));
                    started();
                }
                Step::Resumed if self.taking.is_some() => self.on_went_on_from_snapshot(life),
                Step::Resumed => self.on_went_on(life),
                Step::Snapshotted(result) if self.taking.is_some() => self.on_snapshot(result, life)?,
                Step::Snapshotted(result) => {
                    if self.on_snapshotted(result, life, place)? {
                        return Ok(End::Suspended);
                    }
                }
                Step::Asked(conversation) if company.is_checking() && conversation.request.is_suspend() => {
                    // A check is a session, and soon over.
                    company.deferred.push(conversation);
                }
                Step::Asked(conversation) => {
                    self.answer(conversation, Some(life));
                    self.tell_company(company, place);
                }
                Step::Checked(check) => {
                    if let Some(watch) = &mut company.watch {
                        watch.learn(check);
                    }
                    for conversation in std::mem::take(&mut company.deferred) {
                        self.answer(conversation, Some(life));
                    }
                }
                Step::Ended(end) => return Ok(end),
            }
        }
    }

    /// Holds the machine, or the process that it is already, to its share of the CPU.
    fn limit(&mut self, process: Option<u32>) -> Result<()> {
        let record = self.machine.record();
        match &self.cgroup {
            Some(cgroup) => cgroup.limit(record.config.limits)?,
            None => {
                let cgroup = Cgroup::make_if_wanted(self.host.paths, &record.id, &record.config)?;
                if let (Some(cgroup), Some(process)) = (&cgroup, process) {
                    cgroup.add(process)?;
                }
                self.cgroup = cgroup;
                // Now, if it would be there already.
                self.joins_at = process.and(Some(self.joins_at.unwrap_or_else(Instant::now)));
            }
        }
        match (&self.cgroup, process) {
            (Some(cgroup), None) => cgroup.bound(&record.config),
            _ => Ok(()),
        }
    }

    /// From now on what this process does for the guest counts as the guest's.
    fn join_cgroup_when_due(&mut self) {
        if self.joins_at.take_if(|due| *due <= Instant::now()).is_some()
            && let Some(Err(error)) = self.cgroup.as_mut().map(Cgroup::join)
        {
            eprintln!("flyrun: the machine's monitor is not held to the machine's share: {error}");
        }
    }

    fn leave_cgroup(&mut self) {
        self.joins_at = None;
        if let Some(cgroup) = &mut self.cgroup {
            cgroup.leave();
        }
    }

    /// A state that cannot be written, as on a full disk, does not end a machine that runs.
    fn try_become(&mut self, state: State, change: impl FnOnce(&mut crate::machine::Record)) {
        if let Err(error) = self.machine.become_state(state, change) {
            eprintln!("flyrun: {error}");
        }
    }

    fn tell_waiting(&mut self, exit_code: u8) {
        self.end_lease();
        for mut conversation in self.waiting.drain(..) {
            conversation.reply(&Reply::Ended { exit_code });
        }
    }

    /// Writes down how the machine ended, or removes it, and tells those who wait.
    fn conclude(mut self, result: &Result<End>) -> Result<()> {
        let mut outcome = outcome(result);
        if self.is_stopped && result.is_err() && self.machine.record().snapshot.is_some() {
            // Its user has given up what it had in memory; that it could not be resumed is no news.
            outcome = Outcome { exit_code: KILLED, error: None, ..outcome };
        }
        let exit_code = outcome.exit_code;
        let state = if outcome.error.is_some() { State::Failed } else { State::Stopped };
        let mut waiting = std::mem::take(&mut self.waiting);
        if matches!(result, Ok(End::Suspended)) {
            let message = "it was suspended".to_string();
            for conversation in &mut waiting {
                conversation.reply(&Reply::Failed { message: message.clone() });
            }
            return Ok(());
        }
        let concluded = if outcome.error.is_some() && self.machine.record().snapshot.is_some() {
            // It could not even be tried, or was cut off: the snapshot is as good as before.
            self.machine.become_state(State::Suspended, |record| {
                record.outcome = Some(outcome);
                record.resuming_in_boot = None;
            })
        } else if self.machine.record().config.auto_remove {
            self.machine.remove()
        } else {
            self.machine
                .become_state(state, |record| {
                    record.outcome = Some(outcome);
                    record.snapshot = None;
                    record.resuming_in_boot = None;
                })
                .and_then(|()| suspend::discard(self.machine.directory()))
        };
        for conversation in &mut waiting {
            conversation.reply(&Reply::Ended { exit_code });
        }
        concluded
    }
}

/// Fresh bytes of the host's randomness, as many as a guest is given at a time.
fn entropy() -> Result<Vec<u8>> {
    let mut entropy = vec![0; ENTROPY_BYTES];
    random::fill(&mut entropy)?;
    Ok(entropy)
}

/// A VMM that gets no answer from a virtiofsd knows less of the reason than is written down here.
fn blame(served: &[Served], error: Error) -> Error {
    let told = error.to_string();
    served.iter().find_map(|served| served.blame(&told)).unwrap_or(error)
}

/// What is kept of a life.
fn outcome(result: &Result<End>) -> Outcome {
    let (exit_code, oom_killed, error) = match result {
        Ok(end @ End::Workload(status)) => (end.code().number(), *status == ExitStatus::OutOfMemory, None),
        Ok(end @ End::NoCommand { message, .. }) => (end.code().number(), false, Some(message.clone())),
        Ok(end @ (End::Interrupted { .. } | End::Suspended)) => (end.code().number(), false, None),
        Err(error) => (error.exit_code().number(), false, Some(error.to_string())),
    };
    Outcome { exit_code, oom_killed, error, finished_at: now() }
}

impl End {
    /// The exit code of a flyrun that waited for this end.
    pub fn code(&self) -> ExitCode {
        match self {
            End::Workload(status) => ExitCode::Workload(status.code()),
            End::NoCommand { code: 126, .. } => ExitCode::NotExecutable,
            End::NoCommand { .. } => ExitCode::NotFound,
            End::Interrupted { signal, .. } => front::interrupted(*signal),
            End::Suspended => ExitCode::Success,
        }
    }

    /// Tells the user what the exit code alone does not, and gives it.
    pub fn report(self) -> Result<ExitCode> {
        let code = self.code();
        match self {
            End::Workload(ExitStatus::OutOfMemory) => {
                anstream::eprintln!(
                    "flyrun: the machine ran out of memory, and the kernel killed its process"
                );
                anstream::eprintln!("  Give it more with --memory.");
            }
            End::Workload(_) => {}
            End::Suspended => {
                anstream::eprintln!("flyrun: the machine is suspended; `flyrun resume` goes on")
            }
            End::NoCommand { message, .. } => return Err(Error::new(message).code(code)),
            End::Interrupted { started, .. } => {
                let when = if started { "" } else { " before its process ran" };
                anstream::eprintln!("flyrun: ended the machine{when}");
            }
        }
        Ok(code)
    }
}
