//! Sessions with the host beside the workload: commands, figures and copies (see [`protocol::session`]).
//!
//! ```text
//! Greeting ── Exec ──▶ Command ── ended, all output sent ──▶ Farewell ── the client closes ──▶ gone
//!    │                    ▲  ▼ a suspend                        ▲  ▼ a suspend
//!    ├── Rejoin ──────────┴─ its client is away ─────────────────┘
//!    └── anything else ──▶ Helper (a child that has the connection to itself) ── it ends ──▶ gone
//! ```
//! A client that closes early is forgotten at once, and so is one that is away for too long once the machine goes on.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use protocol::{
    FailureKind,
    session::{FromSession, PORT, REJOIN_LIMIT_MS, Request, Ticket},
};
use rustix::{
    event::PollFlags,
    io::Errno,
    process::{Pid, WaitStatus},
};

use self::{
    client::Client,
    exec::{Exec, Started},
};
use crate::{
    control::monotonic_ms,
    failure::{Failure, OrSetup},
    run::{cgroup::Cgroup, supervise::exit_status, user::User},
    sys,
};

pub mod client;
pub mod copy_in;
pub mod copy_out;
pub mod exec;
pub mod figures;
pub mod helper;
pub mod input;

/// The most sessions at a time; more are refused, with these words.
const MAX_SESSIONS: usize = 64;
const SUSPENDED: &str = "the machine was suspended";
const NO_SESSION: &str = "the machine has no such session any more";
const TOO_MANY: &str = "the machine has 64 sessions, which is the most; end one first";
/// Clients that may wait to be accepted.
const BACKLOG: i32 = 128;
/// Connections accepted in one turn.
const MAX_ACCEPTED: usize = 16;
/// How long a client may take to say what it wants.
const REQUEST_LIMIT_MS: i64 = 10_000;
/// How long a client may take to read its last frames and to close.
const FAREWELL_LIMIT_MS: i64 = 10_000;
/// The same when the machine is about to end.
const LAST_FAREWELL_LIMIT_MS: i64 = 2_000;

/// What commands beside the workload share with it.
#[derive(Debug)]
pub struct Beside {
    /// The workload's environment as it was configured.
    pub env: Vec<String>,
    /// The machine's name.
    pub hostname: String,
    /// The workload's working directory.
    pub workdir: String,
    /// The workload's user.
    pub user: User,
}

/// All sessions of the machine.
#[derive(Debug)]
pub struct Sessions {
    listener: Option<OwnedFd>,
    beside: Beside,
    slots: Vec<Option<Session>>,
    /// Kills for want of memory that were commands and not the workload.
    oom_kills: u64,
    last_moment: Option<i64>,
    /// Until when clients may come back.
    away_until: Option<i64>,
}

#[derive(Debug)]
enum Session {
    Greeting { client: Client, until: i64 },
    Command { client: Client, exec: Box<Exec> },
    Farewell { client: Client, until: i64 },
    Helper(Pid),
}

impl Sessions {
    /// Listens. A client may come as soon as this returns, and waits until the loop runs.
    ///
    /// # Errors
    /// [`FailureKind::Setup`].
    pub fn listen(beside: Beside) -> Result<Self, Failure> {
        let listener = sys::vsock_listen(PORT, BACKLOG).or_setup(|| "listen for sessions".into())?;
        Ok(Self::over(Some(listener), beside))
    }

    /// Without a listener, for tests that bring their own connections.
    pub fn over(listener: Option<OwnedFd>, beside: Beside) -> Self {
        Self { listener, beside, slots: Vec::new(), oom_kills: 0, last_moment: None, away_until: None }
    }

    /// The listening socket.
    pub fn listener(&self) -> Option<BorrowedFd<'_>> {
        self.listener.as_ref().map(AsFd::as_fd)
    }

    /// How many kills for want of memory were of commands and not of the workload.
    pub fn oom_kills(&self) -> u64 {
        self.oom_kills
    }

    /// The machine is about to end: no more clients, and little time for those there are.
    pub fn stop_listening(&mut self) {
        self.listener = None;
        self.last_moment = Some(monotonic_ms() + LAST_FAREWELL_LIMIT_MS);
        self.slots.iter_mut().for_each(|slot| {
            slot.take_if(|session| matches!(session, Session::Greeting { .. }) || session.is_away());
        });
    }

    /// The machine may have another name than before.
    pub fn machine_is_called(&mut self, hostname: String) {
        let old = format!("HOSTNAME={}", self.beside.hostname);
        for entry in self.beside.env.iter_mut().filter(|entry| **entry == old) {
            *entry = format!("HOSTNAME={hostname}");
        }
        self.beside.hostname = hostname;
    }

    /// How many sessions there are that a suspend cannot interrupt and go on with.
    pub fn count_helpers(&self) -> usize {
        self.slots.iter().flatten().filter(|session| matches!(session, Session::Helper(_))).count()
    }

    /// The machine is about to stand still, and no connection will survive that: those who can come back are waited for from
    /// [`Sessions::go_on`] on, all others are sent away.
    pub fn interrupt(&mut self) {
        for slot in &mut self.slots {
            let ends = match slot {
                Some(Session::Command { client, .. }) => {
                    let stays = client.part();
                    if !stays {
                        client.send_last(&failed(&Failure::new(FailureKind::Setup, SUSPENDED)));
                    }
                    !stays
                }
                Some(Session::Farewell { client, .. }) => {
                    client.part();
                    false
                }
                // It may be writing to a filesystem that stands still, and goes as soon as it can.
                Some(Session::Helper(pid)) => {
                    let _ = sys::kill(*pid, libc::SIGKILL);
                    false
                }
                Some(Session::Greeting { .. }) | None => false,
            };
            slot.take_if(|_| ends);
        }
    }

    /// The machine runs again.
    pub fn go_on(&mut self, now: i64) {
        let is_awaited = self.slots.iter().flatten().any(Session::is_away);
        self.away_until = is_awaited.then_some(now + i64::from(REJOIN_LIMIT_MS));
        for slot in &mut self.slots {
            if let Some(Session::Farewell { client, until }) = slot
                && client.is_away()
            {
                *until = now + i64::from(REJOIN_LIMIT_MS);
            }
        }
    }

    /// Whether no client is left.
    pub fn are_over(&self) -> bool {
        self.slots.iter().all(Option::is_none)
    }

    /// Tells each descriptor that is to be waited for, with the number of its session.
    pub fn interests<'a>(&'a self, mut tell: impl FnMut(usize, BorrowedFd<'a>, PollFlags)) {
        for (index, slot) in self.slots.iter().enumerate() {
            match slot {
                Some(Session::Greeting { client, .. } | Session::Farewell { client, .. }) => {
                    client.fd().into_iter().for_each(|fd| tell(index, fd, client.interest()));
                }
                Some(Session::Command { client, exec }) => {
                    client.fd().into_iter().for_each(|fd| tell(index, fd, client.interest()));
                    exec.interests(client, |fd, flags| tell(index, fd, flags));
                }
                Some(Session::Helper(_)) | None => {}
            }
        }
    }

    /// When [`Sessions::advance`] has something to do although nothing happens.
    pub fn next_deadline(&self) -> Option<i64> {
        let own = self.slots.iter().flatten().filter_map(|session| match session {
            Session::Greeting { until, .. } | Session::Farewell { until, .. } => Some(*until),
            Session::Command { client, exec } => exec.deadline(client),
            Session::Helper(_) => None,
        });
        own.chain(self.last_moment.filter(|_| !self.are_over())).chain(self.away_until).min()
    }

    /// Does what is due.
    pub fn advance(&mut self, now: i64) {
        if self.last_moment.is_some_and(|at| now >= at) {
            self.slots.clear();
        }
        if self.away_until.take_if(|at| now >= *at).is_some() {
            self.slots.iter_mut().for_each(|slot| _ = slot.take_if(|session| session.is_away()));
        }
        let away_until = self.away_until;
        for slot in &mut self.slots {
            let is_late = |session: &mut Session| match session {
                Session::Greeting { until, .. } | Session::Farewell { until, .. } => now >= *until,
                Session::Command { client, exec } => {
                    if exec.deadline(client).is_some_and(|at| now >= at) {
                        exec.pump(client, now);
                    }
                    false
                }
                Session::Helper(_) => false,
            };
            slot.take_if(is_late);
            let finished = matches!(slot, Some(Session::Command { client, .. }) if client.is_finished());
            if finished && let Some(Session::Command { client, .. }) = slot.take() {
                let until = away_until.filter(|_| client.is_away()).unwrap_or(now + FAREWELL_LIMIT_MS);
                *slot = Some(Session::Farewell { client, until });
            }
        }
    }

    /// Takes new clients. Only the host's: a process of the machine could come by vsock's loopback.
    pub fn accept(&mut self) {
        for _ in 0..MAX_ACCEPTED {
            let Some(listener) = &self.listener else { return };
            match sys::vsock_accept(listener.as_fd()) {
                Ok((socket, true)) => self.welcome(socket),
                Ok((_, false)) | Err(Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }

    /// Begins a session, or refuses it when there are too many.
    pub fn welcome(&mut self, socket: OwnedFd) {
        let mut client = Client::new(socket);
        let until = monotonic_ms() + REQUEST_LIMIT_MS;
        let free = self.slots.iter().position(Option::is_none).unwrap_or(self.slots.len());
        if free >= MAX_SESSIONS {
            return client.send_last(&failed(&Failure::new(FailureKind::LimitExceeded, TOO_MANY)));
        }
        let session = Some(Session::Greeting { client, until });
        match self.slots.get_mut(free) {
            Some(slot) => *slot = session,
            None => self.slots.push(session),
        }
    }

    /// Something happened at one of a session's descriptors.
    pub fn turn(&mut self, index: usize, cgroup: &Cgroup) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        let Some(session) = slot.take() else { return };
        *slot = match session {
            Session::Greeting { mut client, until } => {
                client.receive();
                match client.next_frame::<Request>() {
                    Some(Request::Rejoin { ticket, received }) => {
                        return self.rejoin(client, &ticket, received);
                    }
                    Some(request) => begin(request, client, &self.beside, cgroup),
                    None => Some(Session::Greeting { client, until }),
                }
            }
            Session::Command { mut client, mut exec } => {
                client.flush();
                client.receive();
                while let Some(frame) = client.next_order() {
                    exec.obey(frame, &mut client);
                }
                exec.pump(&mut client, monotonic_ms());
                Some(Session::Command { client, exec })
            }
            Session::Farewell { mut client, until } => {
                client.flush();
                client.discard();
                Some(Session::Farewell { client, until })
            }
            helper @ Session::Helper(_) => Some(helper),
        };
        slot.take_if(|session| session.client().is_some_and(Client::is_closed));
    }

    /// A client has come back over a new connection. Its old one, if that is still there, has broken.
    fn rejoin(&mut self, mut client: Client, ticket: &Ticket, received: u64) {
        let now = monotonic_ms();
        for session in self.slots.iter_mut().flatten().filter(|session| session.has(ticket)) {
            let own = match session {
                Session::Command { client, .. } => client,
                Session::Farewell { client, until } => {
                    *until = now + FAREWELL_LIMIT_MS;
                    client
                }
                Session::Greeting { .. } | Session::Helper(_) => continue,
            };
            if own.rejoin(&mut client, received) {
                if let Session::Command { client, exec } = session {
                    // What it has sent with its request waits in the decoder, and makes no event.
                    while let Some(frame) = client.next_order() {
                        exec.obey(frame, client);
                    }
                    exec.pump(client, now);
                }
                return;
            }
        }
        client.send_last(&failed(&Failure::new(FailureKind::NoSession, NO_SESSION)));
        self.part_from(client);
    }

    /// Waits until the client has read its last frame.
    fn part_from(&mut self, client: Client) {
        let farewell = Some(Session::Farewell { client, until: monotonic_ms() + FAREWELL_LIMIT_MS });
        if let Some(slot) = self.slots.iter_mut().find(|slot| slot.is_none()) {
            *slot = farewell;
        }
    }

    /// A child has ended, which may be one of a session's.
    pub fn ended(&mut self, pid: Pid, status: WaitStatus, cgroup: &Cgroup) {
        let now = monotonic_ms();
        for slot in &mut self.slots {
            match slot {
                Some(Session::Helper(helper)) if *helper == pid => *slot = None,
                Some(Session::Command { client, exec }) if exec.pid() == pid => {
                    let status = |before| exit_status(status, || cgroup.oom_kills() > before);
                    self.oom_kills += u64::from(exec.ended(now, status));
                    exec.pump(client, now);
                }
                _ => {}
            }
        }
    }
}

impl Session {
    fn is_away(&self) -> bool {
        self.client().is_some_and(Client::is_away)
    }

    fn has(&self, ticket: &Ticket) -> bool {
        self.client().is_some_and(|client| client.has(ticket))
    }

    fn client(&self) -> Option<&Client> {
        match self {
            Session::Greeting { client, .. }
            | Session::Command { client, .. }
            | Session::Farewell { client, .. } => Some(client),
            Session::Helper(_) => None,
        }
    }
}

/// Does what a client asks for.
fn begin(request: Request, mut client: Client, beside: &Beside, cgroup: &Cgroup) -> Option<Session> {
    let until = monotonic_ms() + FAREWELL_LIMIT_MS;
    let started = |pid: Pid| FromSession::Started { pid: pid.as_raw_nonzero().get().unsigned_abs() };
    let failure = match request {
        Request::Exec(config) => match Exec::start(&config, beside, cgroup) {
            Ok(Started::Attached(mut exec)) => {
                config.ticket.into_iter().for_each(|ticket| client.outlast(ticket));
                client.send(&started(exec.pid()));
                // What the client has sent with its request waits in the decoder, and makes no event.
                while let Some(frame) = client.next_order() {
                    exec.obey(frame, &mut client);
                }
                exec.pump(&mut client, monotonic_ms());
                return Some(Session::Command { client, exec });
            }
            Ok(Started::Detached(pid)) => {
                client.send_last(&started(pid));
                return Some(Session::Farewell { client, until });
            }
            Err(failure) => failure,
        },
        other => match helper::start(other, &client, cgroup) {
            Ok(pid) => return Some(Session::Helper(pid)),
            Err(failure) => failure,
        },
    };
    client.send_last(&failed(&failure));
    Some(Session::Farewell { client, until })
}

/// A failure as the frame that tells it.
pub fn failed(failure: &Failure) -> FromSession {
    FromSession::Failed { kind: failure.kind, message: failure.one_line() }
}
