//! The loop of PID 1 while the workload runs: it relays streams, forwards signals, buries the dead, and sees to it
//! that nothing the workload wrote is lost at its end.
//!
//! ```text
//! Running ── first process gone: all others are killed ──▶ Draining ── streams empty: Exited sent ──▶ Closing
//!    └── host gone: SIGTERM, later SIGKILL ──▶ (the same, nobody listening)
//! ```
//! A suspend waits for copies and questions to end, which are short, and then stops this loop until the machine goes on.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use protocol::{ExitStatus, FromGuest, NetworkConfig, ToGuest, TtySize};
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::{Errno, read},
    process::{Pid, WaitOptions, WaitStatus, wait},
};

use super::{
    cgroup::Cgroup,
    relay::Relay,
    stdio::{self, Stdio},
    suspend::{Still, hostname},
};
use crate::{
    busy::Busy,
    control::{Control, monotonic_ms, timeout},
    session::Sessions,
    sys,
};

/// Dead processes buried in one turn of the loop.
const MAX_REAPED: usize = 64;
/// A host that is gone cannot ask for an orderly end, so the workload gets this long after SIGTERM.
const ORPHAN_GRACE_MS: i64 = 10_000;
/// A killed process closes its pipes at once, unless the kernel holds it; then its streams end without it.
const KILLED_GRACE_MS: i64 = 2_000;
/// How long a suspend waits for sessions that it would break.
const HELPERS_GRACE_MS: i64 = 5_000;
/// How long the host may take to close after it has seen the end of every stream.
const CLOSE_GRACE_MS: i64 = 10_000;

/// What the loop does, with the transitions in the module's documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The workload's first process lives. With a deadline, it is to be killed then.
    Running { kill_at: Option<i64> },
    /// It is gone; what its streams hold is on its way to the host.
    Draining { status: ExitStatus, until: i64 },
    /// The host knows everything and is to close the connection.
    Closing { streams_closed_at: Option<i64> },
}

/// What the workload's machine is made of, as far as it stands still with it.
#[derive(Debug)]
pub struct Ground {
    /// Filesystems that are written to disks.
    pub disks: Vec<OwnedFd>,
    /// The machine's place in the network.
    pub network: Option<NetworkConfig>,
}

/// Which descriptor an event belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Children,
    Control,
    Input,
    Output(usize),
    /// An output that is shut down and waits for the host to close it.
    Finished(usize),
    /// A client asks for a session.
    Sessions,
    Session(usize),
    /// A process of the machine asks about the lease.
    Busy,
    BusyClient(usize),
}

/// The state of the loop.
#[derive(Debug)]
pub struct Supervisor<'a> {
    control: &'a mut Control,
    children: OwnedFd,
    pid: Pid,
    stdio: Stdio,
    cgroup: Cgroup,
    sessions: Sessions,
    busy: Busy,
    ground: &'a mut Ground,
    phase: Phase,
    suspending: Option<Suspending>,
    unburied: bool,
}

/// A suspend that waits for the end of sessions.
#[derive(Clone, Copy, Debug)]
struct Suspending {
    /// Whether it is done at the end of that time all the same.
    force: bool,
    until: i64,
}

impl<'a> Supervisor<'a> {
    /// Takes over a workload that has just been started.
    pub fn new(
        control: &'a mut Control,
        children: OwnedFd,
        pid: Pid,
        stdio: Stdio,
        cgroup: Cgroup,
        (sessions, busy): (Sessions, Busy),
        ground: &'a mut Ground,
    ) -> Self {
        // A child may have ended before SIGCHLD was looked at.
        Self {
            control,
            children,
            pid,
            stdio,
            cgroup,
            sessions,
            busy,
            ground,
            phase: Phase::Running { kill_at: None },
            suspending: None,
            unburied: true,
        }
    }

    /// Runs until the workload is gone and the host has everything.
    pub fn run(mut self) {
        loop {
            if self.unburied {
                self.reap();
            }
            self.advance();
            self.sessions.advance(monotonic_ms());
            self.busy.advance(monotonic_ms());
            self.suspend_when_due();
            if self.is_over() {
                return;
            }
            for (source, flags) in self.wait() {
                self.handle(source, flags);
            }
        }
    }

    fn is_over(&self) -> bool {
        match self.phase {
            Phase::Closing { streams_closed_at } => {
                self.control.is_closed() && self.sessions.are_over()
                    || streams_closed_at.is_some_and(|at| monotonic_ms() >= at + CLOSE_GRACE_MS)
            }
            Phase::Running { .. } | Phase::Draining { .. } => false,
        }
    }

    /// Makes the transitions that need no event of their own.
    fn advance(&mut self) {
        let now = monotonic_ms();
        match self.phase {
            // ## Running => (Running with a deadline | Draining, by reap)
            Phase::Running { kill_at: None } if self.control.is_closed() => {
                let _ = sys::kill(self.pid, libc::SIGTERM);
                self.phase = Phase::Running { kill_at: Some(now + ORPHAN_GRACE_MS) };
            }
            Phase::Running { kill_at: Some(at) } if now >= at => {
                let _ = sys::kill(self.pid, libc::SIGKILL);
                self.phase = Phase::Running { kill_at: Some(now + ORPHAN_GRACE_MS) };
            }
            Phase::Running { .. } => {}
            // ## Draining => (Draining | Closing)
            Phase::Draining { status, until } => {
                if self.stdio.outputs.iter().any(Relay::has_pending) {
                    // The host is slow, which is its right; only silence has a limit.
                    self.phase = Phase::Draining { status, until: now + KILLED_GRACE_MS };
                } else if now >= until {
                    self.stdio.outputs.iter_mut().for_each(Relay::end_source);
                }
                if self.stdio.outputs.iter().all(Relay::is_done) || self.control.is_closed() {
                    self.control.send(&FromGuest::Exited(status));
                    self.phase = Phase::Closing { streams_closed_at: None };
                }
            }
            // ## Closing => (Closing | over)
            Phase::Closing { streams_closed_at: None }
                if self.stdio.outputs.iter().all(|relay| relay.finished_socket().is_none()) =>
            {
                self.phase = Phase::Closing { streams_closed_at: Some(now) };
            }
            Phase::Closing { .. } => {}
        }
    }

    fn next_deadline(&self) -> Option<i64> {
        let own = match self.phase {
            Phase::Running { kill_at } => kill_at,
            Phase::Draining { until, .. } if !self.stdio.outputs.iter().any(Relay::has_pending) => {
                Some(until)
            }
            Phase::Draining { .. } => None,
            Phase::Closing { streams_closed_at } => streams_closed_at.map(|at| at + CLOSE_GRACE_MS),
        };
        let suspend = self.suspending.map(|suspending| suspending.until);
        own.into_iter()
            .chain(suspend)
            .chain(self.sessions.next_deadline())
            .chain(self.busy.next_deadline())
            .min()
    }

    /// Waits for events; each descriptor comes at most once per direction.
    fn wait(&self) -> Vec<(Source, PollFlags)> {
        let mut interests: Vec<(Source, BorrowedFd<'_>, PollFlags)> = vec![
            (Source::Children, self.children.as_fd(), PollFlags::IN),
            (Source::Control, self.control.as_fd(), self.control.interest()),
        ];
        if self.control.is_closed() {
            interests.pop();
        }
        for (source, relay) in self.relays() {
            let both = [relay.source_interest(), relay.sink_interest()];
            interests.extend(both.into_iter().flatten().map(|(fd, flags)| (source, fd, flags)));
        }
        if matches!(self.phase, Phase::Closing { streams_closed_at: None }) {
            let finished = self.stdio.outputs.iter().enumerate();
            let hang_ups = finished.filter_map(|(index, relay)| Some((index, relay.finished_socket()?)));
            interests.extend(hang_ups.map(|(index, fd)| (Source::Finished(index), fd, PollFlags::empty())));
        }
        // Whoever comes while a suspend waits would only have to go.
        let listener = self.sessions.listener().filter(|_| self.suspending.is_none());
        interests.extend(listener.map(|fd| (Source::Sessions, fd, PollFlags::IN)));
        self.sessions.interests(|index, fd, flags| interests.push((Source::Session(index), fd, flags)));
        let (listener, clients) = (self.busy.listener(), self.busy.clients());
        interests.extend(listener.map(|fd| (Source::Busy, fd, PollFlags::IN)));
        interests.extend(clients.map(|(index, fd)| (Source::BusyClient(index), fd, PollFlags::IN)));

        let mut fds: Vec<PollFd<'_>> =
            interests.iter().map(|(_, fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)).collect();
        let left = match self.next_deadline() {
            _ if self.unburied => Some(0),
            deadline => deadline.map(|at| (at - monotonic_ms()).max(0)),
        };
        if poll(&mut fds, left.map(timeout).as_ref()).is_err() {
            return Vec::new();
        }
        let ready = interests.iter().zip(&fds).map(|((source, ..), fd)| (*source, fd.revents()));
        let mut ready: Vec<_> = ready.filter(|(_, flags)| !flags.is_empty()).collect();
        // A session has several descriptors, and one turn sees to them all.
        ready.dedup_by_key(|(source, _)| *source);
        ready
    }

    fn relays(&self) -> impl Iterator<Item = (Source, &Relay)> {
        let outputs = self.stdio.outputs.iter().enumerate();
        let input = self.stdio.input.iter().filter(|_| self.suspending.is_none());
        let input = input.map(|relay| (Source::Input, relay));
        input.chain(outputs.map(|(index, relay)| (Source::Output(index), relay)))
    }

    fn handle(&mut self, source: Source, flags: PollFlags) {
        match source {
            Source::Children => {
                let _ = read(&self.children, &mut [0; 128][..]);
                self.unburied = true;
            }
            Source::Control => {
                if flags.contains(PollFlags::OUT) {
                    self.control.flush();
                }
                if flags.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
                    self.control.receive();
                }
                while let Some(frame) = self.control.next_frame() {
                    self.obey(frame);
                }
            }
            // The end that the host makes of it for a suspend is not the end of the input.
            Source::Input if self.suspending.is_some() => {}
            Source::Input => {
                if let Some(relay) = &mut self.stdio.input {
                    relay.pump();
                }
                self.stdio.input.take_if(|relay| relay.is_done());
            }
            Source::Output(index) => {
                if let Some(relay) = self.stdio.outputs.get_mut(index) {
                    relay.pump();
                }
            }
            Source::Finished(index) => {
                if let Some(relay) = self.stdio.outputs.get_mut(index) {
                    relay.close();
                }
            }
            Source::Sessions => self.sessions.accept(),
            Source::Session(index) => self.sessions.turn(index, &self.cgroup),
            Source::Busy => self.busy.accept(monotonic_ms()),
            Source::BusyClient(index) => {
                if self.busy.turn(index, monotonic_ms()) {
                    self.tell_busy();
                }
            }
        }
    }

    /// What the host knows of the lease is renewed with each word about it.
    fn tell_busy(&mut self) {
        self.control.send_droppable(&FromGuest::Busy { seconds: self.busy.left(monotonic_ms()) });
    }

    fn obey(&mut self, frame: ToGuest) {
        match frame {
            ToGuest::Signal { signal } => self.signal(signal),
            ToGuest::Resize(size) => self.resize(size),
            ToGuest::Suspend { force } => {
                self.suspending = Some(Suspending { force, until: monotonic_ms() + HELPERS_GRACE_MS });
            }
            // For a machine that stands still, or is about to.
            ToGuest::Resume(_) => {
                if self.suspending.take().is_some() {
                    self.decline("the host has thought better of it".into());
                }
            }
            // For a machine that stands still, or has nothing to run yet.
            ToGuest::Run(_) | ToGuest::Time { .. } => {}
        }
    }

    fn suspend_when_due(&mut self) {
        let Some(Suspending { force, until }) = self.suspending else { return };
        let helpers = self.sessions.count_helpers();
        if !matches!(self.phase, Phase::Running { kill_at: None }) {
            self.decline("its process is ending".into());
        } else if helpers == 0 || force && monotonic_ms() >= until {
            self.suspend();
        } else if monotonic_ms() >= until {
            self.decline(format!("it has open sessions (cp, top, stats): {helpers}"));
        }
    }

    fn suspend(&mut self) {
        self.suspending = None;
        self.sessions.interrupt();
        self.still(|still, control| still.suspend(control));
        self.sessions.machine_is_called(hostname());
        self.sessions.go_on(monotonic_ms());
        if self.busy.left(monotonic_ms()) > 0 {
            self.tell_busy();
        }
        // Nobody's end was noticed meanwhile.
        self.unburied = true;
    }

    fn decline(&mut self, message: String) {
        self.suspending = None;
        self.still(|still, control| still.decline(message, control));
    }

    fn still(&mut self, act: impl FnOnce(&mut Still<'_>, &mut Control)) {
        let Ground { disks, network } = &mut *self.ground;
        let mut still =
            Still { cgroup: &self.cgroup, stdio: &mut self.stdio, disks, network, frozen: Vec::new() };
        act(&mut still, self.control);
    }

    fn signal(&self, signal: i32) {
        if !matches!(self.phase, Phase::Running { .. }) {
            return;
        }
        let by_keyboard = matches!(signal, libc::SIGINT | libc::SIGQUIT | libc::SIGTSTP);
        let result = match &self.stdio.terminal {
            Some(terminal) if by_keyboard => sys::signal_terminal(terminal.as_fd(), signal),
            // 0 only asks whether the process exists. Other numbers the kernel refuses itself.
            _ if signal > 0 => sys::kill(self.pid, signal),
            _ => Ok(()),
        };
        // The workload may be ending at this moment, and there is nobody to tell.
        let _ = result;
    }

    fn resize(&self, size: TtySize) {
        if let Some(terminal) = &self.stdio.terminal {
            let _ = stdio::resize(terminal, size);
        }
    }

    /// Buries the dead, as many as one turn allows.
    fn reap(&mut self) {
        self.unburied = false;
        for _ in 0..MAX_REAPED {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) if pid == self.pid => self.first_process_ended(status),
                Ok(Some((pid, status))) => self.sessions.ended(pid, status, &self.cgroup),
                Err(Errno::INTR) => {}
                Ok(None) | Err(_) => return,
            }
        }
        self.unburied = true;
    }

    fn first_process_ended(&mut self, status: WaitStatus) {
        let status = exit_status(status, || self.cgroup.oom_kills() > self.sessions.oom_kills());
        // As in a container: nothing of the workload outlives its first process, or holds its streams open.
        sys::kill_all_others();
        self.sessions.stop_listening();
        self.stdio.input = None;
        self.phase = Phase::Draining { status, until: monotonic_ms() + KILLED_GRACE_MS };
    }
}

/// What a process's end is called; `has_oom_kill` tells whether a SIGKILL may be the kernel's, for want of memory.
pub fn exit_status(status: WaitStatus, has_oom_kill: impl FnOnce() -> bool) -> ExitStatus {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => ExitStatus::Code(code as u8),
        (None, Some(libc::SIGKILL)) if has_oom_kill() => ExitStatus::OutOfMemory,
        (None, signal) => ExitStatus::Signal(signal.unwrap_or(libc::SIGKILL) as u8),
    }
}
