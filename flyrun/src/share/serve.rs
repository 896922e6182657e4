//! The virtiofsd processes of a machine's life.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use protocol::ShareConfig;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use vmm::spec::ShareSpec;

use super::{Daemon, Use};
use crate::error::{Context, Error, Result};
use crate::paths::RunDir;
use crate::vm::spawn as spawn_thread;

/// How long the kernel may take to end a process that was killed.
const END_LIMIT: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

/// A directory that is served. Dropping it ends its virtiofsd; drop the machine first.
#[derive(Debug)]
pub struct Served {
    tag: String,
    share: Use,
    socket: PathBuf,
    log: PathBuf,
    pid: u32,
    process: OwnedFd,
    /// Whether the machine runs, and would miss it.
    is_needed: Arc<AtomicBool>,
}

impl Served {
    /// Starts a virtiofsd for a machine's directory with this number. The VMM can connect as soon as this returns.
    ///
    /// # Errors
    /// A file or socket cannot be made, or a process not started.
    pub fn start(
        daemon: &Daemon,
        share: &Use,
        number: usize,
        run_dir: &RunDir,
        cgroup: Option<&Path>,
    ) -> Result<Served> {
        let tag = format!("fs{number}");
        let at = |end: &str| run_dir.path().join(format!("{tag}{end}"));
        let (socket, log) = (at(""), at(".log"));
        // An earlier life of the machine may have left it.
        let _ = std::fs::remove_file(&socket);
        let listener =
            UnixListener::bind(&socket).context(format!("cannot listen on {}", socket.display()))?;
        let log_file = File::create(&log).context(format!("cannot write {}", log.display()))?;
        let mut command = Command::new("/proc/self/exe");
        command.args(["share", "--owner", &std::process::id().to_string()]);
        if let Some(cgroup) = cgroup {
            command.arg("--cgroup").arg(cgroup);
        }
        if share.read_only {
            let view = at(".ro");
            // One that is there is an earlier life's, and as empty.
            let _ = std::fs::create_dir(&view);
            command.arg("--read-only-at").arg(view);
        }
        let kind = clap::ValueEnum::to_possible_value(&daemon.kind);
        command.arg("--kind").args(kind.as_ref().map(|kind| kind.get_name()));
        command.arg("--program").arg(&daemon.program).arg(&share.source);
        let child = command.stdin(OwnedFd::from(listener)).stdout(Stdio::null()).stderr(log_file).spawn();
        let child = child.context("cannot start a process for virtiofsd")?;
        let process =
            pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).context("cannot watch virtiofsd")?;
        let (pid, is_needed) = (child.id(), Arc::new(AtomicBool::new(false)));
        let served = Served { tag, share: share.clone(), socket, log, pid, process, is_needed };
        served.watch(child)?;
        Ok(served)
    }

    /// What the VMM is told.
    pub fn spec(&self) -> ShareSpec {
        ShareSpec { tag: self.tag.clone(), socket: self.socket.clone() }
    }

    /// What guest-init is told.
    pub fn config(&self) -> ShareConfig {
        ShareConfig { tag: self.tag.clone(), path: self.share.path.clone(), read_only: self.share.read_only }
    }

    /// The machine runs: from now on the user is told when this ends.
    pub fn begin(&self) {
        self.is_needed.store(true, Ordering::Release);
    }

    /// The reason of a VMM's failure, where that was this directory's virtiofsd.
    pub fn blame(&self, told: &str) -> Option<Error> {
        let (_, reason) = told.split_once(&format!("shared directory {}: ", self.tag))?;
        let own = std::fs::read_to_string(&self.log).unwrap_or_default();
        let reason = own.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or(reason);
        let source = self.share.source.display();
        Some(Error::new(format!("cannot share {source}: {}", reason.trim_start_matches("flyrun: "))))
    }

    /// Tells the user when it ends before the machine; it ends well when the VMM does.
    fn watch(&self, mut child: Child) -> Result<()> {
        let (is_needed, log) = (Arc::clone(&self.is_needed), self.log.clone());
        let source = self.share.source.display().to_string();
        spawn_thread("virtiofsd", move || {
            let how = match child.wait() {
                Ok(status) if status.success() || !is_needed.load(Ordering::Acquire) => return,
                Ok(status) => status.to_string(),
                Err(error) => error.to_string(),
            };
            let told = std::fs::read_to_string(log).unwrap_or_default();
            let told = told.lines().last().map(|line| format!(": {line}")).unwrap_or_default();
            anstream::eprintln!("flyrun: the machine has lost {source}: virtiofsd has ended ({how}){told}");
        })
        .context("cannot start a thread")
    }

    /// Its children, if it still runs.
    fn children(&self) -> Vec<OwnedFd> {
        let list = format!("/proc/{pid}/task/{pid}/children", pid = self.pid);
        let list = std::fs::read_to_string(list).unwrap_or_default();
        let pids = list.split_whitespace().filter_map(|word| Pid::from_raw(word.parse().ok()?));
        let children = pids.filter_map(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()).collect();
        // Once it has ended, its number may be another's.
        if ends_within(&self.process, Timespec::default()) { vec![] } else { children }
    }
}

fn ends_within(process: &OwnedFd, limit: Timespec) -> bool {
    poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&limit)).is_ok_and(|ended| ended > 0)
}

impl Drop for Served {
    /// It has a child in namespaces of its own, which the kernel tells to end with it; that is killed here as well, so that
    /// none is left when this returns.
    fn drop(&mut self) {
        self.is_needed.store(false, Ordering::Release);
        let children = self.children();
        for process in [&self.process].into_iter().chain(&children) {
            let _ = pidfd_send_signal(process, Signal::KILL);
        }
        for process in [&self.process].into_iter().chain(&children) {
            ends_within(process, END_LIMIT);
        }
    }
}
