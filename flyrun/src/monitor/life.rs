//! One life of a machine: from the start of its VMM to the end of its process.

use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use protocol::session::FromSession;
use protocol::{
    ExitStatus, FailureKind, FromGuest, MAX_BUSY_SECONDS, PROTOCOL_VERSION, Renewal, Start, ToGuest, TtySize,
};
use vmm::exit::VmExit;

use super::End;
use super::front::{Front, Response};
use super::suspend::realtime_ns;
use crate::error::{Error, Result};
use crate::exit_code::ExitCode;
use crate::interrupt::SIGKILL;
use crate::terminal;
use crate::trace;
use crate::vm::{Control, Event, Mailbox, Vm};

/// How long a guest may take from its start to guest-init's first word. Hundreds of times what it needs.
const BOOT_LIMIT: Duration = Duration::from_secs(60);
const NOT_STARTED: &str = "the guest has not started within a minute";
/// How long the rest of the output and the guest's own end may take once its process is gone.
const END_LIMIT: Duration = Duration::from_secs(15);
/// How long a restored guest may take to its first word. Thousands of times what it needs: who is given up loses its memory, and a host
/// that has no processor for a guest has none for a boot of it either.
const RESUME_LIMIT: Duration = Duration::from_secs(60);
/// How long a guest may take to let everything stand still, or to let it go on.
const FREEZE_LIMIT: Duration = Duration::from_secs(30);
/// How long a guest may take to end a process that was killed; then the machine itself is ended.
const KILL_LIMIT: Duration = Duration::from_secs(3);

/// A started virtual machine and what has become of it so far.
#[derive(Debug)]
pub struct Life {
    pub vm: Vm,
    control: Option<Control>,
    outputs_open: usize,
    /// Whether the machine's disk outlives it, so that the guest must write everything out first.
    keeps_disk: bool,
    is_started: bool,
    exited: Option<ExitStatus>,
    deadline: Option<Deadline>,
    stopping: Option<Stopping>,
    /// How many streams the workload has.
    streams: usize,
    still: Option<Still>,
    /// Restored from a snapshot that is whole until guest-init is told to go on.
    is_restored: bool,
    /// Guest-init has said why it cannot go on.
    has_told: bool,
    /// The size of the terminal of the client that attached last.
    size: Option<TtySize>,
    /// Signals for a workload that does not run at this moment.
    held: Vec<i32>,
    /// Somebody of this host has ended flyrun-vmm.
    was_killed: bool,
}

#[derive(Clone, Copy, Debug)]
struct Deadline {
    at: Instant,
    late: &'static str,
}

/// How far the workload has been brought to stand still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Still {
    /// Guest-init was asked; the rest of the output is on its way.
    Freezing { frozen: bool },
    /// It stands, and guest-init waits for a word.
    Stands,
    /// Guest-init was told to go on, or does so by itself.
    GoingOn,
}

/// How far the end of the workload has been brought about.
#[derive(Clone, Copy, Debug)]
enum Stopping {
    /// Its stop signal was sent; at this time it is killed.
    Asked { kill_at: Instant },
    /// It was killed; at this time the machine is.
    Killed { give_up_at: Instant },
}

/// What the monitor has to do about an event.
#[derive(Debug)]
pub enum Step {
    Nothing,
    /// The workload runs.
    Started,
    /// Guest-init of a restored machine has connected, and nothing else runs yet.
    Restored,
    /// The workload and all of the guest's disks stand still, and nothing is under way.
    Stands,
    /// It does not stand still, for this reason, and goes on.
    StandsNot(String),
    /// It runs on.
    Resumed,
    /// It says that it is busy for so many seconds.
    Busy(u32),
    /// A snapshot is complete, or why there is none.
    Snapshotted(std::result::Result<(), String>),
    /// A health check was made.
    Checked(crate::machine::health::Check),
    /// Somebody asks for something that concerns more than this life.
    Asked(super::control::Conversation),
    Ended(End),
}

impl Life {
    pub fn new(vm: Vm, outputs: usize, keeps_disk: bool) -> Life {
        Life {
            vm,
            control: None,
            outputs_open: outputs,
            keeps_disk,
            is_started: false,
            exited: None,
            deadline: Some(Deadline { at: Instant::now() + BOOT_LIMIT, late: NOT_STARTED }),
            stopping: None,
            streams: outputs,
            still: None,
            is_restored: false,
            has_told: false,
            size: None,
            held: Vec::new(),
            was_killed: false,
        }
    }

    /// A life that goes on from a snapshot.
    pub fn restored(vm: Vm, outputs: usize, keeps_disk: bool) -> Life {
        let late = "the resumed guest has not answered within a minute";
        let deadline = Some(Deadline { at: Instant::now() + RESUME_LIMIT, late });
        Life { is_restored: true, is_started: true, deadline, ..Life::new(vm, outputs, keeps_disk) }
    }

    /// A life that goes on from a base snapshot: it is told what to run when it has connected.
    pub fn from_base(vm: Vm, outputs: usize, keeps_disk: bool) -> Life {
        Life { is_restored: true, ..Life::new(vm, outputs, keeps_disk) }
    }

    /// Tells guest-init, which waits for it, what to run.
    pub fn run(&mut self, start: Start) {
        self.deadline = Some(Deadline { at: Instant::now() + BOOT_LIMIT, late: NOT_STARTED });
        self.send(&ToGuest::Run(Box::new(start)));
    }

    /// Whether it failed before its workload ran, and not for a reason that guest-init tells.
    pub fn is_stillborn(&self) -> bool {
        !self.is_started && !self.has_told
    }

    /// Waits for the next thing that happens, or until `wake`.
    ///
    /// # Errors
    /// The machine failed before its workload could end.
    pub fn step(&mut self, mailbox: &Mailbox, front: &mut Front, wake: Option<Instant>) -> Result<Step> {
        let Ok(event) = mailbox.next(self.next_deadline().into_iter().chain(wake).min()) else {
            return self.on_late();
        };
        let step = match event {
            Event::Connected(control) => {
                self.control = Some(control);
                Step::Nothing
            }
            Event::Guest(message) => self.on_message(message)?,
            Event::ControlClosed(error) => self.on_control_closed(error)?,
            Event::OutputDone => {
                self.outputs_open = self.outputs_open.saturating_sub(1);
                self.stands_now()
            }
            Event::Snapshotted(result) => Step::Snapshotted(result),
            Event::VmmExited(status) => Step::Ended(self.on_vmm_exit(&status)?),
            Event::Signal(signal) => self.on_signal(front.on_signal(signal, self.is_started), signal),
            Event::Asked(conversation) => Step::Asked(conversation),
            Event::Checked(check) => Step::Checked(check),
            Event::Forward(signal) => {
                self.signal(signal);
                Step::Nothing
            }
            Event::Resize(size) => {
                self.resize(size);
                Step::Nothing
            }
        };
        match (step, self.end_if_drained()) {
            (Step::Nothing, Some(end)) => Ok(Step::Ended(end)),
            (step, _) => Ok(step),
        }
    }

    /// Whether the workload's process is gone.
    pub fn has_exited(&self) -> bool {
        self.exited.is_some()
    }

    /// Whether the workload is to stand still, does, or is about to go on.
    pub fn is_still(&self) -> bool {
        self.still.is_some()
    }

    /// Asks guest-init to let the workload stand still; its streams end and begin again meanwhile.
    pub fn freeze(&mut self, force: bool) {
        self.still = Some(Still::Freezing { frozen: false });
        let late = "the guest has not stood still within half a minute";
        self.deadline = Some(Deadline { at: Instant::now() + FREEZE_LIMIT, late });
        self.outputs_open += self.streams;
        self.vm.streams_again();
        self.send(&ToGuest::Suspend { force });
    }

    /// Whether guest-init was asked to let everything stand still, and has not said that it does.
    pub fn is_freezing(&self) -> bool {
        matches!(self.still, Some(Still::Freezing { .. }))
    }

    /// Tells guest-init to go on.
    pub fn go_on(&mut self, renewal: Renewal) {
        self.still = Some(Still::GoingOn);
        let late = "the guest has not gone on within half a minute";
        self.deadline = Some(Deadline { at: Instant::now() + FREEZE_LIMIT, late });
        self.send(&ToGuest::Resume(Box::new(renewal)));
    }

    fn stands_now(&mut self) -> Step {
        if self.still != Some(Still::Freezing { frozen: true }) || self.outputs_open > self.streams {
            return Step::Nothing;
        }
        self.still = Some(Still::Stands);
        self.deadline = None;
        Step::Stands
    }

    /// Asks the workload to end, and sees to it that it does.
    pub fn stop(&mut self, signal: i32, patience: Duration) {
        if signal == SIGKILL || patience.is_zero() || !self.is_started {
            return self.kill();
        }
        let kill_at = Instant::now() + patience;
        self.stopping = match self.stopping {
            // Whoever is in more of a hurry decides.
            Some(Stopping::Asked { kill_at: earlier }) => {
                Some(Stopping::Asked { kill_at: earlier.min(kill_at) })
            }
            Some(killed) => Some(killed),
            None => Some(Stopping::Asked { kill_at }),
        };
        self.pass(signal);
    }

    /// Sends the workload a signal.
    pub fn signal(&mut self, signal: i32) {
        if signal == SIGKILL {
            return self.kill();
        }
        self.pass(signal);
    }

    /// Kills the workload, and soon the machine if that is not enough.
    fn kill(&mut self) {
        self.pass(SIGKILL);
        let patience = if self.is_started { KILL_LIMIT } else { Duration::ZERO };
        self.stopping.get_or_insert(Stopping::Killed { give_up_at: Instant::now() + patience });
        if let Some(Stopping::Asked { .. }) = self.stopping {
            self.stopping = Some(Stopping::Killed { give_up_at: Instant::now() + patience });
        }
    }

    /// A signal waits for a workload that does not run, once however often it was sent, as a stopped process has it.
    fn pass(&mut self, signal: i32) {
        if self.hears() {
            self.send(&ToGuest::Signal { signal });
        } else if !self.held.contains(&signal) {
            self.held.push(signal);
        }
    }

    fn resize(&mut self, size: TtySize) {
        self.size = Some(size);
        if self.hears() {
            self.send(&ToGuest::Resize(size));
        }
    }

    /// The size of the terminal of the client that attached last.
    pub fn size(&self) -> Option<TtySize> {
        self.size
    }

    /// Whether somebody of this host has ended flyrun-vmm, and not what it was doing.
    pub fn was_killed(&self) -> bool {
        self.was_killed
    }

    /// Whether guest-init does at once what it is told of the workload.
    fn hears(&self) -> bool {
        self.control.is_some() && self.is_started && !self.is_restored && self.still.is_none()
    }

    /// The workload runs: what waited for that is sent.
    fn catch_up(&mut self) {
        if let Some(size) = self.size {
            self.send(&ToGuest::Resize(size));
        }
        for signal in std::mem::take(&mut self.held) {
            self.send(&ToGuest::Signal { signal });
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let stopping = self.stopping.map(|stopping| match stopping {
            Stopping::Asked { kill_at } => kill_at,
            Stopping::Killed { give_up_at } => give_up_at,
        });
        self.deadline.map(|deadline| deadline.at).into_iter().chain(stopping).min()
    }

    fn on_late(&mut self) -> Result<Step> {
        let now = Instant::now();
        match self.stopping {
            Some(Stopping::Asked { kill_at }) if kill_at <= now => {
                self.kill();
                Ok(Step::Nothing)
            }
            Some(Stopping::Killed { give_up_at }) if give_up_at <= now => {
                self.vm.kill();
                Ok(Step::Ended(End::Workload(self.exited.unwrap_or(ExitStatus::Signal(SIGKILL as u8)))))
            }
            _ => match self.deadline {
                Some(deadline)
                    if deadline.at <= now && matches!(self.still, Some(Still::Freezing { .. })) =>
                {
                    self.go_on(Renewal::default());
                    Ok(Step::StandsNot(deadline.late.to_string()))
                }
                Some(deadline) if deadline.at <= now => Err(Error::new(deadline.late).advice(
                    "`flyrun run --init-log` shows the guest's console; `flyrun doctor` checks the host.",
                )),
                _ => Ok(Step::Nothing),
            },
        }
    }

    fn on_message(&mut self, message: FromGuest) -> Result<Step> {
        match message {
            FromGuest::Hello { version } if version != PROTOCOL_VERSION => {
                let both =
                    format!("guest-init speaks version {version} of the protocol, flyrun {PROTOCOL_VERSION}");
                Err(Error::new(both).advice("Install flyrun and its parts from one build."))
            }
            FromGuest::Hello { .. } => {
                trace::step("guest-init connected");
                self.deadline = None;
                Ok(if std::mem::take(&mut self.is_restored) { Step::Restored } else { Step::Nothing })
            }
            FromGuest::Frozen => {
                if let Some(Still::Freezing { frozen }) = &mut self.still {
                    *frozen = true;
                }
                Ok(self.stands_now())
            }
            FromGuest::NotFrozen { message } => {
                if !matches!(self.still, Some(Still::Freezing { .. })) {
                    return Ok(Step::Nothing);
                }
                self.still = Some(Still::GoingOn);
                Ok(Step::StandsNot(message))
            }
            FromGuest::Resumed => {
                if self.still != Some(Still::GoingOn) {
                    return Ok(Step::Nothing);
                }
                trace::step("workload went on");
                (self.still, self.deadline) = (None, None);
                self.catch_up();
                Ok(Step::Resumed)
            }
            FromGuest::Busy { seconds } => Ok(Step::Busy(seconds.min(MAX_BUSY_SECONDS))),
            FromGuest::AskTime => {
                self.send(&ToGuest::Time { realtime_ns: realtime_ns() });
                Ok(Step::Nothing)
            }
            FromGuest::Started { .. } => {
                trace::step("workload started");
                self.is_started = true;
                self.deadline = None;
                self.catch_up();
                Ok(Step::Started)
            }
            FromGuest::Exited(status) => {
                trace::step("workload ended");
                self.exited = Some(status);
                self.stopping = None;
                let late = "the guest has not ended its output in time";
                self.deadline = Some(Deadline { at: Instant::now() + END_LIMIT, late });
                Ok(Step::Nothing)
            }
            FromGuest::Failed { kind, message } => {
                self.has_told = true;
                failure(kind, message).map(Step::Ended)
            }
            FromGuest::Ready => Err(Error::new("the guest waits, which it was not asked to do")),
            FromGuest::Unpacking { .. } | FromGuest::Unpacked { .. } => {
                Err(Error::new("the guest reports on unpacking, which it was not asked to do"))
            }
        }
    }

    fn on_control_closed(&mut self, error: Option<String>) -> Result<Step> {
        self.control = None;
        match error {
            Some(error) if self.exited.is_none() => Err(Error::new(format!("lost the guest: {error}"))),
            _ => Ok(Step::Nothing),
        }
    }

    fn on_vmm_exit(&mut self, status: &std::io::Result<std::process::ExitStatus>) -> Result<End> {
        self.was_killed = status.as_ref().is_ok_and(was_killed);
        match (self.exited, self.vm.failure(status)) {
            (_, Some(failure)) => Err(failure),
            (Some(exited), None) => Ok(End::Workload(exited)),
            (None, None) => Err(Error::new("the guest restarted itself before its process ended")
                .advice("`flyrun run --init-log` shows the guest's console.")),
        }
    }

    fn on_signal(&mut self, response: Response, signal: i32) -> Step {
        match response {
            Response::Forward(signal) => self.signal(signal),
            Response::ForwardAndTell(signal, told) => {
                anstream::eprintln!("flyrun: {told}");
                self.signal(signal);
            }
            Response::Resize => self.resize(terminal::size()),
            Response::Stop(signal, patience) => self.stop(signal, patience),
            Response::Kill => {
                self.vm.kill();
                return Step::Ended(End::Interrupted { signal, started: self.is_started });
            }
            Response::Nothing => {}
        }
        Step::Nothing
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

/// Whether a process was ended from outside, and not by what it did.
fn was_killed(status: &std::process::ExitStatus) -> bool {
    let is_terminated = status.code().and_then(VmExit::from_code) == Some(VmExit::Terminated);
    is_terminated || status.signal() == Some(SIGKILL)
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
        FailureKind::BadLayer | FailureKind::LimitExceeded | FailureKind::Setup | FailureKind::NoSession => {
            Err(Error::new(message).advice("`flyrun run --init-log` shows the guest's console."))
        }
    }
}

/// The last frame for those who are attached when a life ends.
pub fn last_frame(result: &Result<End>) -> FromSession {
    match result {
        Ok(End::Workload(status)) => FromSession::Exited(*status),
        Ok(end @ (End::NoCommand { .. } | End::Interrupted { .. })) => {
            FromSession::Exited(ExitStatus::Code(end.code().number()))
        }
        Ok(End::Suspended) => FromSession::Suspended,
        Err(error) => FromSession::Failed { kind: FailureKind::Setup, message: error.to_string() },
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use protocol::frame;

    use super::*;
    use crate::paths::Paths;
    use crate::vm::Post;

    const HOUR: Duration = Duration::from_secs(3600);
    const SIZE: TtySize = TtySize { rows: 51, cols: 133 };

    /// A life, and the guest that a test plays.
    struct Played {
        life: Life,
        mailbox: Mailbox,
        post: Post,
        front: Front,
        guest: UnixStream,
        ours: Option<UnixStream>,
        _vmm: UnixStream,
        _directory: tempfile::TempDir,
    }

    impl Played {
        fn new(make: fn(Vm, usize, bool) -> Life) -> Played {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().to_path_buf();
            let paths = Paths { root: path.join("root"), run: path.join("run") };
            let (vm, _vmm) = Vm::example(paths.make_run_dir("m").unwrap());
            let (guest, ours) = UnixStream::pair().unwrap();
            let mut mailbox = Mailbox::new();
            let post = mailbox.begin_life();
            let front = Front::Nobody { stop_signal: 15, stop_timeout: HOUR };
            let life = make(vm, 0, false);
            Played { life, mailbox, post, front, guest, ours: Some(ours), _vmm, _directory: directory }
        }

        fn step(&mut self, event: Event) -> Step {
            assert!(self.post.send(event));
            self.life.step(&self.mailbox, &mut self.front, None).unwrap()
        }

        fn connect(&mut self) -> Step {
            let control = Control::over(self.ours.take().unwrap());
            assert!(matches!(self.step(Event::Connected(control)), Step::Nothing));
            self.says(FromGuest::Hello { version: PROTOCOL_VERSION })
        }

        fn says(&mut self, message: FromGuest) -> Step {
            self.step(Event::Guest(message))
        }

        fn started() -> Played {
            let mut played = Played::new(Life::new);
            played.connect();
            assert!(matches!(played.says(FromGuest::Started { pid: 7 }), Step::Started));
            played
        }

        /// All that the guest has been told and not read yet.
        fn heard(&mut self) -> Vec<ToGuest> {
            let mut heard = Vec::new();
            self.guest.set_nonblocking(true).unwrap();
            while let Ok(Some(message)) = frame::read(&mut self.guest) {
                heard.push(message);
            }
            heard
        }
    }

    fn signal(signal: i32) -> ToGuest {
        ToGuest::Signal { signal }
    }

    fn resume() -> ToGuest {
        ToGuest::Resume(Box::default())
    }

    #[test]
    fn what_a_resumed_workload_was_told_before_it_runs_it_hears_when_it_does() {
        // Before the guest has connected, and when it has but does not run yet.
        for before in [true, false] {
            let mut played = Played::new(Life::restored);
            let tell = |played: &mut Played| {
                played.life.stop(15, HOUR);
                played.step(Event::Forward(1));
                played.step(Event::Forward(1));
                played.step(Event::Resize(SIZE));
            };
            if before {
                tell(&mut played);
            }
            assert!(matches!(played.connect(), Step::Restored));
            played.life.go_on(Renewal::default());
            if !before {
                tell(&mut played);
            }
            assert_eq!(played.heard(), [resume()]);
            assert!(matches!(played.says(FromGuest::Resumed), Step::Resumed));
            assert_eq!(played.heard(), [ToGuest::Resize(SIZE), signal(15), signal(1)]);
            // From now on at once.
            played.step(Event::Forward(1));
            assert_eq!(played.heard(), [signal(1)]);
        }
    }

    #[test]
    fn a_workload_that_is_killed_before_it_runs_has_no_time_left() {
        let mut played = Played::new(Life::restored);
        played.life.stop(9, HOUR);
        assert!(played.life.next_deadline().unwrap() < Instant::now() + HOUR);
        played.connect();
        played.life.go_on(Renewal::default());
        played.says(FromGuest::Resumed);
        assert_eq!(played.heard(), [resume(), signal(9)]);
    }

    #[test]
    fn a_signal_that_comes_during_the_boot_is_heard_by_the_workload() {
        let mut played = Played::new(Life::new);
        played.step(Event::Forward(10));
        played.connect();
        assert_eq!(played.heard(), []);
        played.says(FromGuest::Started { pid: 7 });
        assert_eq!(played.heard(), [signal(10)]);
    }

    #[test]
    fn signals_wait_while_a_workload_is_frozen() {
        let mut played = Played::started();
        played.life.freeze(false);
        played.step(Event::Forward(1));
        played.says(FromGuest::NotFrozen { message: "busy".into() });
        played.step(Event::Forward(2));
        assert_eq!(played.heard(), [ToGuest::Suspend { force: false }]);
        assert!(matches!(played.says(FromGuest::Resumed), Step::Resumed));
        assert_eq!(played.heard(), [signal(1), signal(2)]);
    }

    #[test]
    fn a_change_of_mind_during_the_freezing_and_the_word_that_it_is_done_may_cross() {
        for crossing in [FromGuest::Frozen, FromGuest::NotFrozen { message: "late".into() }] {
            let mut played = Played::started();
            played.life.freeze(true);
            assert!(played.life.is_freezing());
            played.life.go_on(Renewal::default());
            assert!(!played.life.is_freezing() && played.life.is_still());
            assert!(matches!(played.says(crossing), Step::Nothing));
            assert!(matches!(played.says(FromGuest::Resumed), Step::Resumed));
            assert!(!played.life.is_still());
            assert_eq!(played.heard(), [ToGuest::Suspend { force: true }, resume()]);
            // A word too many changes nothing.
            assert!(matches!(played.says(FromGuest::Resumed), Step::Nothing));
        }
    }

    #[test]
    fn an_end_from_outside_is_told_from_one_of_its_own() {
        use std::process::ExitStatus;
        let of = |status: i32| was_killed(&ExitStatus::from_raw(status));
        // As wait(2) has it: a signal's number, or an exit code in the second byte.
        let exit = |exit: VmExit| i32::from(exit.code()) << 8;
        assert!(of(9) && of(exit(VmExit::Terminated)));
        assert!([11, 6, 7, exit(VmExit::Refused), exit(VmExit::Reset)].into_iter().all(|status| !of(status)));
    }
}
