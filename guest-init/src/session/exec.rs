//! A command beside the workload, and its client.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use protocol::{
    ExitStatus, FailureKind,
    session::{ExecConfig, FromSession, MAX_CHUNK, ToSession},
};
use rustix::{
    event::PollFlags,
    io::{Errno, read},
    process::Pid,
};

use super::{Beside, client::Client, input::Input};
use crate::{
    failure::{Failure, OrSetup},
    run::{account_file, cgroup::Cgroup, command, spawn, stdio, user},
    sys,
};

/// Chunks of each output in one turn, so that a busy process does not keep the loop from the others.
const TURN: usize = 4;
/// How long others may hold the streams of a process that is gone, as something it left in the background does.
const BACKGROUND_GRACE_MS: i64 = 1_000;
/// More than pipes hold: what is read beyond it after that time was not written by the process itself.
const MAX_REST_BYTES: usize = 1 << 20;

/// A command with its client.
#[derive(Debug)]
pub struct Exec {
    pid: Pid,
    oom_kills_before: u64,
    terminal: Option<OwnedFd>,
    input: Input,
    outputs: [Option<OwnedFd>; 2],
    ended: Option<Ended>,
}

#[derive(Debug)]
struct Ended {
    status: ExitStatus,
    until: i64,
    rest: usize,
}

/// What has become of a request.
#[derive(Debug)]
pub enum Started {
    /// It runs.
    Attached(Box<Exec>),
    /// It runs, and nobody waits for it.
    Detached(Pid),
}

impl Exec {
    /// Starts the command.
    ///
    /// # Errors
    /// As [`spawn::spawn`], and when the user does not exist.
    pub fn start(config: &ExecConfig, beside: &Beside, cgroup: &Cgroup) -> Result<Started, Failure> {
        if config.argv.is_empty() {
            return Err(Failure::new(FailureKind::BadConfig, "there is no command"));
        }
        let user = match &config.user {
            Some(spec) => user::resolve(spec, &account_file("/etc/passwd"), &account_file("/etc/group"))?,
            None => beside.user.clone(),
        };
        let has_terminal = config.tty.is_some();
        let uid = user.uid;
        let command = spawn::Workload {
            argv: config.argv.clone(),
            env: command::environment_beside(&beside.env, &config.env, &user, &beside.hostname, has_terminal),
            workdir: config.workdir.clone().unwrap_or_else(|| beside.workdir.clone()),
            user,
        };
        let oom_kills_before = cgroup.oom_kills();
        if config.detach {
            let stdio = stdio::nowhere().or_setup(|| "open /dev/null".into())?;
            return spawn::spawn(&command, stdio, cgroup).map(Started::Detached);
        }
        let (terminal, input, outputs, child) = match config.tty {
            Some(size) => {
                let open = || {
                    let (master, child) = stdio::terminal(size, uid)?;
                    let (writer, reader) = (stdio::duplicate(&master)?, stdio::duplicate(&master)?);
                    Ok((Some(master), config.stdin.then_some(writer), [Some(reader), None], child))
                };
                open().or_setup(|| "make a terminal".into())?
            }
            None => {
                let (ours, child) =
                    stdio::pipes(uid, config.stdin).or_setup(|| "make the standard streams".into())?;
                (None, ours.stdin, [Some(ours.stdout), Some(ours.stderr)], child)
            }
        };
        let pid = spawn::spawn(&command, child, cgroup)?;
        let input = Input::new(input);
        Ok(Started::Attached(Box::new(Self { pid, oom_kills_before, terminal, input, outputs, ended: None })))
    }

    /// The process.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Tells each descriptor that is to be waited for.
    pub fn interests<'a>(&'a self, client: &Client, mut tell: impl FnMut(BorrowedFd<'a>, PollFlags)) {
        if let Some(sink) = self.input.interest() {
            tell(sink, PollFlags::OUT);
        }
        if client.has_room() {
            self.outputs.iter().flatten().for_each(|output| tell(output.as_fd(), PollFlags::IN));
        }
    }

    /// When a turn is due although nothing happens.
    pub fn deadline(&self, client: &Client) -> Option<i64> {
        self.ended.as_ref().filter(|_| client.has_room()).map(|ended| ended.until)
    }

    /// The process has ended. True if the kernel killed it for want of memory.
    pub fn ended(&mut self, now: i64, status: impl FnOnce(u64) -> ExitStatus) -> bool {
        let status = status(self.oom_kills_before);
        self.ended = Some(Ended { status, until: now + BACKGROUND_GRACE_MS, rest: MAX_REST_BYTES });
        status == ExitStatus::OutOfMemory
    }

    /// Does what the client says.
    pub fn obey(&mut self, frame: ToSession, client: &mut Client) {
        match frame {
            ToSession::Stdin(bytes) => {
                if !self.input.push(&bytes) {
                    client.close();
                }
            }
            ToSession::StdinEnd => self.input.end(),
            ToSession::CloseStdout => self.close_output(0),
            ToSession::CloseStderr => self.close_output(1),
            ToSession::Signal { signal } => self.signal(signal),
            ToSession::Resize(size) => {
                if let Some(terminal) = &self.terminal {
                    let _ = stdio::resize(terminal, size);
                }
            }
            // Of a client that has no ticket: there is nothing to count.
            ToSession::Received { .. } => {}
        }
    }

    fn close_output(&mut self, index: usize) {
        if let Some(output) = self.outputs.get_mut(index) {
            *output = None;
        }
    }

    fn signal(&self, signal: i32) {
        if self.ended.is_some() {
            return;
        }
        let by_keyboard = matches!(signal, libc::SIGINT | libc::SIGQUIT | libc::SIGTSTP);
        // The process may be ending at this moment, and there is nobody to tell.
        let _ = match &self.terminal {
            Some(terminal) if by_keyboard => sys::signal_terminal(terminal.as_fd(), signal),
            _ if signal > 0 => sys::kill(self.pid, signal),
            _ => Ok(()),
        };
    }

    /// Moves bytes both ways, and says how it ended when everything is over.
    pub fn pump(&mut self, client: &mut Client, now: i64) {
        self.input.pump();
        if client.has_room()
            && let Some(bytes) = self.input.acknowledge()
        {
            client.send(&FromSession::StdinTaken { bytes });
        }
        client.tell_received();
        for _ in 0..TURN {
            self.collect(client, now);
        }
        client.flush();
        if let Some(ended) = &self.ended
            && self.outputs.iter().all(Option::is_none)
            && !client.is_finished()
        {
            client.send_last(&FromSession::Exited(ended.status));
        }
    }

    /// Reads once from each output.
    fn collect(&mut self, client: &mut Client, now: i64) {
        for (index, output) in self.outputs.iter_mut().enumerate() {
            let Some(fd) = output.as_ref().filter(|_| client.has_room()) else { continue };
            let mut chunk = vec![0; MAX_CHUNK];
            let has_time = self.ended.as_ref().is_none_or(|ended| now < ended.until);
            match read(fd, &mut chunk[..]) {
                Ok(0) => *output = None,
                Ok(count) => {
                    chunk.truncate(count);
                    client.send(&match index {
                        0 => FromSession::Stdout(chunk),
                        _ => FromSession::Stderr(chunk),
                    });
                    if let Some(ended) = self.ended.as_mut().filter(|_| !has_time) {
                        ended.rest = ended.rest.saturating_sub(count);
                        if ended.rest == 0 {
                            *output = None;
                        }
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if has_time => {}
                // A terminal says EIO when the last process has closed it.
                Err(_) => *output = None,
            }
        }
    }
}
