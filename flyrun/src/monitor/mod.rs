//! The process that owns a machine, from its first start to its last end: restarts, requests, log, state on disk.
//!
//! In the foreground `flyrun run` is the monitor itself; in the background it is a process of its own ([`spawn`]).

mod control;
mod front;
pub mod health;
mod life;
pub mod log;
pub mod outputs;
mod spawn;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use images::Store;
use protocol::{BootConfig, ExitStatus, TtySize, VolumeConfig};
use vmm::spec::DiskSpec;

pub use control::{Conversation, Reply, Request, ask};
pub use front::Front;
pub use spawn::{Report, spawn};

use self::health::Watch;
use self::life::{Life, Step};
use self::outputs::{Input, Outputs, Own, feed};
use crate::cgroup::Cgroup;
use crate::error::{Context, Error, Result, from_images};
use crate::exit_code::ExitCode;
use crate::interrupt::{Interrupts, SIGKILL};
use crate::machine::restart::{self, Restarts};
use crate::machine::{Changes, Machines, Outcome, Owned, State, now};
use crate::paths::{Library, Part, Paths, RunDir};
use crate::usage::{Ledger, Meter, Sources};
use crate::vm::{Event, Mailbox, Post, Streams, Vm, VmPlan, spawn as spawn_thread};
use crate::volume::{Attached, Volumes};
use crate::{network, terminal, trace};

/// Bytes of the host's randomness that each guest starts with.
const ENTROPY_BYTES: usize = 64;
const DISK: &str = "disk.ext4";

/// How a life of a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The workload ran and ended.
    Workload(ExitStatus),
    /// The workload's command could not be executed.
    NoCommand { code: u8, message: String },
    /// The user gave up.
    Interrupted { signal: i32, started: bool },
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
    let mut monitor = Monitor::new(host, machine, view)?;
    let result = monitor.run(started);
    trace::step("ended");
    monitor.conclude(&result)?;
    result
}

struct Monitor<'a> {
    host: &'a Host<'a>,
    machine: Owned,
    view: View,
    run_dir: Arc<RunDir>,
    mailbox: Mailbox,
    outputs: Arc<Outputs>,
    input: Option<Arc<Input>>,
    /// Holds it to its share of the CPU, if it has such a limit.
    cgroup: Option<Cgroup>,
    /// Those who are told when this life has ended.
    waiting: Vec<Conversation>,
    /// The user has ended the machine, so that it is not started again.
    is_stopped: bool,
}

/// Where a life of a machine takes place.
struct Place {
    network: Option<network::Attached>,
    post: Post,
}

/// What goes along with a machine's process from its start on.
#[derive(Default)]
struct Company {
    meter: Option<Meter>,
    watch: Option<Watch>,
}

impl Company {
    fn due(&self) -> Option<Instant> {
        let meter = self.meter.as_ref().map(Meter::due);
        meter.into_iter().chain(self.watch.as_ref().and_then(Watch::due)).min()
    }

    /// Does what is due. When the process has exited, its figures are soon to be had no more.
    fn tend(&mut self, has_exited: bool) {
        if let Some(meter) = &mut self.meter {
            meter.tick();
            if has_exited {
                meter.look();
            }
        }
        if let Some(watch) = &mut self.watch
            && !has_exited
        {
            watch.check();
        }
    }
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
        control::serve(run_dir.path(), mailbox.post())?;
        front::watch_signals(mailbox.post())?;
        Ok(Monitor {
            host,
            machine,
            view,
            run_dir,
            mailbox,
            outputs,
            input,
            cgroup: None,
            waiting: Vec::new(),
            is_stopped: false,
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
            self.tell_waiting(outcome.exit_code);
            self.try_become(State::Starting, |record| {
                record.restarts += 1;
                record.outcome = Some(outcome);
            });
            if !self.pause(pause) {
                return result;
            }
        }
    }

    /// Waits for the time of the next life; `false` if there is to be none.
    fn pause(&mut self, pause: Duration) -> bool {
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
        let record = self.machine.record();
        let wishes = &record.config.network;
        let mut network = network::set_up(self.host.paths, &record.id, &record.name, wishes)?;
        trace::step("network made");
        if let Some(network) = &network {
            let told = "cannot write down the machine's network";
            network.facts().write(self.run_dir.path()).context(told)?;
        }
        let plan = self.plan(lease.path(), &attached, network.as_ref())?;
        let post = self.mailbox.begin_life();
        let vm = Vm::start(&plan, self.run_dir.clone(), &post)?;
        // The host's rules are made while the guest boots.
        if let Some(network) = &mut network {
            network.wait_ready()?;
        }
        let config = &self.machine.record().config;
        // Without input for the workload, the keyboard stays the user's: Ctrl-C then is a signal, not a byte.
        if config.tty && config.run.stdin && self.view.own_input {
            self.view.front.enter_raw_mode()?;
        }
        // A trace is written when the VMM ends by itself, so that is waited for too.
        let keeps_own = !config.auto_remove && config.disk.is_some();
        let keeps_volume = config.volumes.iter().any(|used| !used.read_only);
        let keeps_disk = keeps_own || keeps_volume || trace::vmm_file().is_some();
        let streams = plan.streams.as_ref().map_or(0, Streams::count);
        // Before the life, so that it is taken away after it.
        let mut place = Place { network, post };
        let mut life = Life::new(vm, streams, keeps_disk);
        let mut company = Company::default();
        let result = self.follow(&mut life, &mut company, &mut place, started);
        if let Some(meter) = company.meter {
            meter.end();
        }
        health::forget(self.machine.directory());
        if keeps_disk {
            // The next life writes to the same disk.
            life.vm.end();
        }
        result
    }

    fn follow(
        &mut self,
        life: &mut Life,
        company: &mut Company,
        place: &mut Place,
        started: &mut dyn FnMut(),
    ) -> Result<End> {
        loop {
            let step = life.step(&self.mailbox, &mut self.view.front, company.due())?;
            company.tend(life.has_exited());
            match step {
                Step::Nothing => {}
                Step::Started => {
                    self.begin_company(company, place, life.vm.pid());
                    self.try_become(State::Started, |record| record.started_at = Some(now()));
                    started();
                }
                Step::Asked(conversation) => {
                    self.answer(conversation, Some(life));
                    self.tell_company(company, place);
                }
                Step::Checked(check) => {
                    if let Some(watch) = &mut company.watch {
                        watch.learn(check);
                    }
                }
                Step::Ended(end) => return Ok(end),
            }
        }
    }

    fn begin_company(&self, company: &mut Company, place: &Place, process: u32) {
        let (record, paths) = (self.machine.record(), self.host.paths);
        let facts = place.network.as_ref().map(network::Attached::facts).unwrap_or_default();
        let interface = (!facts.interface.is_empty()).then_some(facts.interface);
        let sources = Sources { process, interface };
        company.meter = Some(Meter::begin(Ledger::new(paths.usage()), record, sources));
        let directory = self.machine.directory();
        company.watch = Watch::begin(paths, record, directory, facts.ipv4, place.post.clone());
    }

    /// The record may be another than before.
    fn tell_company(&self, company: &mut Company, place: &mut Place) {
        let record = self.machine.record();
        if let Some(meter) = &mut company.meter {
            meter.change(record);
        }
        if let Some(network) = &mut place.network
            && let Err(error) = network.rename(&record.name)
        {
            eprintln!("flyrun: {error}");
        }
    }

    /// Holds the machine, or the process that it is already, to its share of the CPU.
    fn limit(&mut self, process: Option<u32>) -> Result<()> {
        let record = self.machine.record();
        let limits = record.config.limits;
        match &self.cgroup {
            Some(cgroup) => cgroup.limit(limits),
            None if limits.needs_cgroup() => {
                let cgroup = Cgroup::make(self.host.paths, &record.id, limits)?;
                if let Some(process) = process {
                    cgroup.add(process)?;
                }
                self.cgroup = Some(cgroup);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Held as long as the machine runs, as the root filesystem is.
    fn attach_volumes(&self) -> Result<Vec<Attached>> {
        let volumes = Volumes::new(self.host.paths.volumes());
        self.machine.record().config.volumes.iter().map(|used| volumes.attach(used)).collect()
    }

    fn plan(
        &self,
        rootfs: &std::path::Path,
        attached: &[Attached],
        network: Option<&network::Attached>,
    ) -> Result<VmPlan> {
        let config = &self.machine.record().config;
        let mut disks = vec![DiskSpec { files: vec![rootfs.to_path_buf()], read_only: true }];
        if let Some(size) = config.disk {
            let disk = self.machine.directory().join(DISK);
            if !disk.exists() {
                self.make_disk(size.0, &disk)?;
            }
            disks.push(DiskSpec { files: vec![disk], read_only: false });
        }
        trace::step("disk made");
        let kernel = if config.cpus == 1 { Part::Kernel } else { Part::KernelSmp };
        let library = self.host.library;
        let mut entropy = vec![0; ENTROPY_BYTES];
        getrandom::fill(&mut entropy).context("the host has no random numbers")?;
        let mut run = config.run.clone();
        run.entropy = entropy;
        run.tty = config.tty.then_some(self.view.terminal);
        run.init_log = self.view.show_console;
        run.pids_limit = config.limits.pids;
        run.network = network.map(|network| network.config.clone());
        for (used, attached) in config.volumes.iter().zip(attached) {
            run.volumes.push(VolumeConfig {
                device: device_name(disks.len()),
                path: used.path.clone(),
                read_only: used.read_only,
            });
            disks.push(DiskSpec { files: vec![attached.data.clone()], read_only: used.read_only });
        }
        Ok(VmPlan {
            vmm: library.path(Part::Vmm),
            kernel: config.kernel.clone().unwrap_or_else(|| library.path(kernel)),
            initramfs: library.path(Part::InitramfsRun),
            cpus: config.cpus,
            memory_mib: u32::try_from(config.memory.to_mib()).unwrap_or(u32::MAX),
            disks,
            nets: network.iter().map(|network| network.card.clone()).collect(),
            boot: BootConfig::Run(Box::new(run)),
            console: (!self.view.show_console).then(|| self.machine.directory().join("console.log")),
            cgroup: self.cgroup.as_ref().map(|cgroup| cgroup.path().to_path_buf()),
            streams: Some(Streams {
                outputs: self.outputs.clone(),
                input: self.input.clone(),
                terminal: config.tty,
            }),
        })
    }

    /// Under another name first: half a disk must not be taken for the machine's.
    fn make_disk(&self, bytes: u64, disk: &std::path::Path) -> Result<()> {
        let draft = self.machine.directory().join("disk.new");
        let _ = std::fs::remove_file(&draft);
        let made = self.host.store.copy_template(images::TemplateKind::Disk, bytes, &draft);
        made.map_err(|error| from_images(&error))?;
        std::fs::rename(&draft, disk).context("cannot make the machine's disk")
    }

    /// Does what another flyrun asks for.
    fn answer(&mut self, mut conversation: Conversation, life: Option<&mut Life>) {
        let config = &self.machine.record().config;
        match conversation.request.clone() {
            Request::Stop { timeout_s } => {
                let patience = Duration::from_secs(timeout_s.unwrap_or(config.stop_timeout_s).into());
                let signal = config.stop_signal;
                self.is_stopped = true;
                self.waiting.push(conversation);
                if let Some(life) = life {
                    life.stop(signal, patience);
                    if self.machine.record().state == State::Started {
                        self.try_become(State::Stopping, |_| {});
                    }
                }
            }
            Request::Signal { signal } => {
                let Some(life) = life.filter(|_| (1..=64).contains(&signal)) else {
                    return conversation
                        .reply(&Reply::Failed { message: "its process does not run now".into() });
                };
                // Whoever ends a machine so does not want it started again.
                self.is_stopped |= signal == SIGKILL || signal == config.stop_signal;
                life.signal(signal);
                conversation.reply(&Reply::Done);
            }
            Request::Wait => self.waiting.push(conversation),
            Request::Attach => {
                conversation.reply(&Reply::Attached { terminal: config.tty });
                self.attach(conversation);
            }
            Request::Update(changes) => {
                conversation.reply(&match self.update(&changes, life.as_deref()) {
                    Ok(later) => Reply::Updated { later },
                    Err(error) => Reply::Failed { message: error.to_string() },
                });
            }
            Request::Rename { name } => {
                let machines = Machines::new(self.host.paths.machines());
                conversation.reply(&match self.machine.rename(&machines, &name) {
                    Ok(()) => Reply::Done,
                    Err(error) => Reply::Failed { message: error.to_string() },
                });
            }
        }
    }

    /// Changes how the machine is run; what could not take effect yet is returned.
    fn update(&mut self, changes: &Changes, life: Option<&Life>) -> Result<Vec<String>> {
        let before = self.machine.record().config.clone();
        let mut config = before.clone();
        let later = changes.apply(&mut config).map_err(Error::new)?;
        self.machine.update(|record| record.config = config)?;
        if let Err(error) = self.limit(life.map(|life| life.vm.pid())) {
            self.machine.update(|record| record.config = before)?;
            return Err(error);
        }
        let config = &self.machine.record().config;
        self.view.front.stop_with(config.stop_signal, Duration::from_secs(config.stop_timeout_s.into()));
        Ok(if life.is_some() { later } else { vec![] })
    }

    fn attach(&self, conversation: Conversation) {
        let (outputs, input) = (self.outputs.clone(), self.input.clone());
        if let Err(error) = control::attach(conversation.into_stream(), outputs, input, self.mailbox.post()) {
            eprintln!("flyrun: a client could not attach: {error}");
        }
    }

    /// A state that cannot be written, as on a full disk, does not end a machine that runs.
    fn try_become(&mut self, state: State, change: impl FnOnce(&mut crate::machine::Record)) {
        if let Err(error) = self.machine.become_state(state, change) {
            eprintln!("flyrun: {error}");
        }
    }

    fn tell_waiting(&mut self, exit_code: u8) {
        for mut conversation in self.waiting.drain(..) {
            conversation.reply(&Reply::Ended { exit_code });
        }
    }

    /// Writes down how the machine ended, or removes it, and tells those who wait.
    fn conclude(mut self, result: &Result<End>) -> Result<()> {
        let outcome = outcome(result);
        let exit_code = outcome.exit_code;
        let state = if outcome.error.is_some() { State::Failed } else { State::Stopped };
        let mut waiting = std::mem::take(&mut self.waiting);
        let concluded = if self.machine.record().config.auto_remove {
            self.machine.remove()
        } else {
            self.machine.become_state(state, |record| record.outcome = Some(outcome))
        };
        for conversation in &mut waiting {
            conversation.reply(&Reply::Ended { exit_code });
        }
        concluded
    }
}

/// What Linux calls a virtio disk (drivers/block/virtio_blk.c, virtblk_name_format).
fn device_name(index: usize) -> String {
    let letter = |index: usize| char::from(b'a' + (index % 26) as u8);
    match index {
        0..26 => format!("/dev/vd{}", letter(index)),
        _ => format!("/dev/vd{}{}", letter(index / 26 - 1), letter(index)),
    }
}

/// What is kept of a life.
fn outcome(result: &Result<End>) -> Outcome {
    let (exit_code, oom_killed, error) = match result {
        Ok(end @ End::Workload(status)) => (end.code().number(), *status == ExitStatus::OutOfMemory, None),
        Ok(end @ End::NoCommand { message, .. }) => (end.code().number(), false, Some(message.clone())),
        Ok(end @ End::Interrupted { .. }) => (end.code().number(), false, None),
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
            End::NoCommand { message, .. } => return Err(Error::new(message).code(code)),
            End::Interrupted { started, .. } => {
                let when = if started { "" } else { " before its process ran" };
                anstream::eprintln!("flyrun: ended the machine{when}");
            }
        }
        Ok(code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_named_as_the_kernel_does() {
        assert_eq!(
            [0, 1, 25, 26, 27, 52].map(device_name),
            ["a", "b", "z", "aa", "ab", "ba"].map(|end| format!("/dev/vd{end}"))
        );
    }
}
