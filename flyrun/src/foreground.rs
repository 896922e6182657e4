//! A machine in the foreground: from the start of its VMM to the end of its process, with the user's streams,
//! terminal and signals.

use std::sync::mpsc::{RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use protocol::{ExitStatus, FailureKind, FromGuest, PROTOCOL_VERSION, ToGuest};
use signal_hook::iterator::Signals;

use crate::error::{Context, Error, Result};
use crate::exit_code::ExitCode;
use crate::interrupt::{self, Interrupts, Response};
use crate::machine::Outcome;
use crate::paths::RunDir;
use crate::terminal::{self, RawMode};
use crate::trace;
use crate::vm::{Control, Event, Input, Output, Vm, VmPlan};

/// How long a guest may take from its start to guest-init's first word. Hundreds of times what it needs.
const BOOT_LIMIT: Duration = Duration::from_secs(60);
/// How long the rest of the output and the guest's own end may take once its process is gone.
const END_LIMIT: Duration = Duration::from_secs(15);

/// A started machine that this process waits for.
#[derive(Debug)]
pub struct Foreground {
    vm: Vm,
    control: Option<Control>,
    interrupts: Interrupts,
    outputs_open: usize,
    /// Whether the machine's disk outlives it, so that the guest must write everything out first.
    keeps_disk: bool,
    exited: Option<ExitStatus>,
    deadline: Option<(Instant, &'static str)>,
    _raw_mode: Option<RawMode>,
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The workload ran and ended.
    Workload(ExitStatus),
    /// The workload's command could not be executed.
    NoCommand { code: u8, message: String },
    /// The user gave up.
    Interrupted { signal: i32, started: bool },
}

/// Starts the machine and takes over terminal and signals.
///
/// # Errors
/// The VMM cannot be started, or the terminal not be used.
pub fn start(plan: &VmPlan, run_dir: RunDir, keeps_disk: bool) -> Result<Foreground> {
    let streams = plan.streams.as_ref();
    // Without input for the workload, the keyboard stays the user's: Ctrl-C then is a signal, not a byte.
    let raw =
        streams.is_some_and(|streams| streams.output == Output::Terminal && streams.input == Input::Own);
    let vm = Vm::start(plan, run_dir)?;
    watch_signals(vm.sender()).context("cannot watch for signals")?;
    let raw_mode = if raw { RawMode::enter().context("cannot use the terminal")? } else { None };
    Ok(Foreground {
        vm,
        control: None,
        interrupts: Interrupts::default(),
        outputs_open: streams.map_or(0, |streams| streams.outputs()),
        keeps_disk,
        exited: None,
        deadline: Some((Instant::now() + BOOT_LIMIT, "the guest has not started within a minute")),
        _raw_mode: raw_mode,
    })
}

fn watch_signals(events: Sender<Event>) -> std::io::Result<()> {
    use interrupt::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH])?;
    std::thread::Builder::new().name("signals".into()).stack_size(64 * 1024).spawn(move || {
        for signal in signals.forever() {
            if events.send(Event::Signal(signal)).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}

impl Foreground {
    /// Waits for the end of the workload and of its streams.
    ///
    /// # Errors
    /// The machine failed before its workload could end.
    pub fn wait(mut self) -> Result<End> {
        loop {
            let end = match self.next_event()? {
                Event::Connected(control) => {
                    self.control = Some(control);
                    None
                }
                Event::Guest(message) => self.on_message(message)?,
                Event::ControlClosed(error) => self.on_control_closed(error)?,
                Event::OutputDone => {
                    self.outputs_open = self.outputs_open.saturating_sub(1);
                    None
                }
                Event::VmmExited(status) => self.on_vmm_exit(&status)?,
                Event::Signal(signal) => self.on_signal(signal),
            };
            if let Some(end) = end.or_else(|| self.end_if_drained()) {
                return Ok(end);
            }
        }
    }

    fn next_event(&self) -> Result<Event> {
        let Some((deadline, late)) = self.deadline else {
            return self.vm.events().recv().context("all watchers are gone");
        };
        match self.vm.events().recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(event) => Ok(event),
            Err(RecvTimeoutError::Timeout) => Err(Error::new(late).advice(
                "`flyrun run --init-log` shows the guest's console; `flyrun doctor` checks the host.",
            )),
            Err(error) => Err(Error::caused("all watchers are gone", &error)),
        }
    }

    fn on_message(&mut self, message: FromGuest) -> Result<Option<End>> {
        match message {
            FromGuest::Hello { version } if version != PROTOCOL_VERSION => {
                let both =
                    format!("guest-init speaks version {version} of the protocol, flyrun {PROTOCOL_VERSION}");
                Err(Error::new(both).advice("Install flyrun and its parts from one build."))
            }
            FromGuest::Hello { .. } => {
                trace::step("guest-init connected");
                self.deadline = None;
                Ok(None)
            }
            FromGuest::Started { .. } => {
                trace::step("workload started");
                self.interrupts.workload_started();
                Ok(None)
            }
            FromGuest::Exited(status) => {
                trace::step("workload ended");
                self.exited = Some(status);
                self.deadline =
                    Some((Instant::now() + END_LIMIT, "the guest has not ended its output in time"));
                Ok(None)
            }
            FromGuest::Failed { kind, message } => failure(kind, message).map(Some),
            FromGuest::Unpacking { .. } | FromGuest::Unpacked { .. } => {
                Err(Error::new("the guest reports on unpacking, which it was not asked to do"))
            }
        }
    }

    fn on_control_closed(&mut self, error: Option<String>) -> Result<Option<End>> {
        self.control = None;
        match error {
            Some(error) if self.exited.is_none() => Err(Error::new(format!("lost the guest: {error}"))),
            _ => Ok(None),
        }
    }

    fn on_vmm_exit(&mut self, status: &std::io::Result<std::process::ExitStatus>) -> Result<Option<End>> {
        match (self.exited, self.vm.failure(status)) {
            (_, Some(failure)) => Err(failure),
            (Some(exited), None) => Ok(Some(End::Workload(exited))),
            (None, None) => Err(Error::new("the guest restarted itself before its process ended")
                .advice("`flyrun run --init-log` shows the guest's console.")),
        }
    }

    fn on_signal(&mut self, signal: i32) -> Option<End> {
        match self.interrupts.on_signal(signal) {
            Response::Forward(signal) => self.send(&ToGuest::Signal { signal }),
            Response::ForwardAndTell(signal, told) => {
                anstream::eprintln!("flyrun: {told}");
                self.send(&ToGuest::Signal { signal });
            }
            Response::Resize => self.send(&ToGuest::Resize(terminal::size())),
            Response::Kill => {
                self.vm.kill();
                return Some(End::Interrupted { signal, started: self.interrupts.has_started() });
            }
        }
        None
    }

    fn send(&mut self, message: &ToGuest) {
        if let Some(control) = &mut self.control {
            control.send(message);
        }
    }

    /// With the process gone and all its output copied, only the guest's disk is left to wait for. Closing the control
    /// connection lets guest-init unmount it and end the machine; a disk that goes anyway needs neither.
    fn end_if_drained(&mut self) -> Option<End> {
        let exited = self.exited.filter(|_| self.outputs_open == 0)?;
        self.control = None;
        if self.keeps_disk { None } else { Some(End::Workload(exited)) }
    }
}

fn failure(kind: FailureKind, message: String) -> Result<End> {
    match kind {
        FailureKind::CommandNotFound => Ok(End::NoCommand { code: ExitCode::NotFound.number(), message }),
        FailureKind::CommandNotExecutable => {
            Ok(End::NoCommand { code: ExitCode::NotExecutable.number(), message })
        }
        FailureKind::UnknownUser => {
            Err(Error::new(message).advice("Choose another with --user, by name or number."))
        }
        FailureKind::NoSpace => Err(Error::new(message).advice("Give the machine a larger --disk.")),
        FailureKind::BadConfig => {
            Err(Error::new(message).advice("Install flyrun and its parts from one build."))
        }
        FailureKind::BadLayer | FailureKind::LimitExceeded | FailureKind::Setup => {
            Err(Error::new(message).advice("`flyrun run --init-log` shows the guest's console."))
        }
    }
}

impl End {
    /// Tells the user what the exit code alone does not, and gives it.
    pub fn report(self) -> Result<ExitCode> {
        match self {
            End::Workload(status) => {
                if status == ExitStatus::OutOfMemory {
                    anstream::eprintln!(
                        "flyrun: the machine ran out of memory, and the kernel killed its process"
                    );
                    anstream::eprintln!("  Give it more with --memory.");
                }
                Ok(ExitCode::Workload(status.code()))
            }
            End::NoCommand { code, message } => Err(Error::new(message).code(match code {
                126 => ExitCode::NotExecutable,
                _ => ExitCode::NotFound,
            })),
            End::Interrupted { signal, started } => {
                let when = if started { "" } else { " before its process ran" };
                anstream::eprintln!("flyrun: ended the machine{when}");
                Ok(interrupted(signal))
            }
        }
    }

    /// What is kept of it.
    pub fn outcome(&self, finished_at: u64) -> Outcome {
        let (exit_code, oom_killed, error) = match self {
            End::Workload(status) => (status.code(), *status == ExitStatus::OutOfMemory, None),
            End::NoCommand { code, message } => (*code, false, Some(message.clone())),
            End::Interrupted { signal, .. } => (interrupted(*signal).number(), false, None),
        };
        Outcome { exit_code, oom_killed, error, finished_at }
    }
}

fn interrupted(signal: i32) -> ExitCode {
    match u8::try_from(signal) {
        Ok(signal) if signal != interrupt::SIGINT as u8 => ExitCode::Workload(128u8.saturating_add(signal)),
        _ => ExitCode::Interrupted,
    }
}

/// What is kept of a machine that failed.
pub fn outcome_of_error(error: &Error, finished_at: u64) -> Outcome {
    let exit_code = error.exit_code().number();
    Outcome { exit_code, oom_killed: false, error: Some(error.to_string()), finished_at }
}
