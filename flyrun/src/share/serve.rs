//! The virtiofsd processes of a machine's life.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use protocol::ShareConfig;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use vmm::spec::ShareSpec;

use super::{Daemon, Use};
use crate::error::{Context, Error, Result};
use crate::paths::{Library, Part, RunDir};
use crate::vm::spawn as spawn_thread;

/// How long the kernel may take to end a process that was killed.
const END_LIMIT: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

/// How much of what it says is kept, in bytes, and how long its last words may take.
const MAX_WORDS: usize = 1024;
const WORDS_LIMIT: Duration = Duration::from_millis(500);

/// A directory that is served. Dropping it ends its virtiofsd; drop the machine first.
#[derive(Debug)]
pub struct Served {
    tag: String,
    share: Use,
    socket: PathBuf,
    pid: u32,
    process: OwnedFd,
    /// Whether the machine runs, and would miss it.
    is_needed: Arc<AtomicBool>,
    /// What it said last; comes when it has ended.
    last_words: Receiver<String>,
}

impl Served {
    /// Starts a virtiofsd for a machine's directory with this number. The VMM can connect as soon as this returns.
    ///
    /// # Errors
    /// A file or socket cannot be made, or a process not started.
    pub fn start(
        library: &Library,
        daemon: &Daemon,
        share: &Use,
        number: usize,
        run_dir: &RunDir,
        cgroup: Option<&Path>,
    ) -> Result<Served> {
        let tag = format!("fs{number}");
        let at = |end: &str| run_dir.path().join(format!("{tag}{end}"));
        let socket = at("");
        // An earlier life of the machine may have left it.
        let _ = std::fs::remove_file(&socket);
        let listener =
            UnixListener::bind(&socket).context(format!("cannot listen on {}", socket.display()))?;
        let mut command = Command::new(library.path(Part::Monitor));
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
        let child =
            command.stdin(OwnedFd::from(listener)).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
        let child = child.context("cannot start a process for virtiofsd")?;
        let process =
            pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).context("cannot watch virtiofsd")?;
        let (pid, is_needed) = (child.id(), Arc::new(AtomicBool::new(false)));
        let (sender, last_words) = channel();
        let served = Served { tag, share: share.clone(), socket, pid, process, is_needed, last_words };
        served.watch(child, sender)?;
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
        let own = self.last_words.recv_timeout(WORDS_LIMIT).ok().filter(|words| !words.is_empty());
        let reason = own.as_deref().unwrap_or(reason).trim_start_matches("flyrun: ");
        Some(Error::new(format!("cannot share {}: {reason}", self.share.source.display())))
    }

    /// Tells the user when it ends before the machine; it ends well when the VMM does.
    fn watch(&self, mut child: Child, last_words: Sender<String>) -> Result<()> {
        let is_needed = Arc::clone(&self.is_needed);
        let source = self.share.source.display().to_string();
        spawn_thread("virtiofsd", move || {
            let words = child.stderr.take().map(last_line).unwrap_or_default();
            let status = child.wait();
            let how = match status {
                Ok(status) if status.success() => None,
                Ok(status) => Some(status.to_string()),
                Err(error) => Some(error.to_string()),
            };
            if let Some(how) = how.filter(|_| is_needed.load(Ordering::Acquire)) {
                let told = if words.is_empty() { String::new() } else { format!(": {words}") };
                anstream::eprintln!(
                    "flyrun: the machine has lost {source}: virtiofsd has ended ({how}){told}"
                );
            }
            // Nobody may want to know.
            let _ = last_words.send(words);
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

/// The last line of a stream that a guest may be able to lengthen, fit for a terminal.
fn last_line(mut stream: impl Read) -> String {
    let (mut tail, mut chunk) = (Vec::new(), [0; MAX_WORDS]);
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => tail.extend(chunk.iter().take(count)),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
        tail.drain(..tail.len().saturating_sub(MAX_WORDS));
    }
    let text = String::from_utf8_lossy(&tail);
    let line = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    line.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_is_kept_and_made_harmless() {
        assert_eq!(last_line(&b"first\nsecond \x1b[2J\n\n"[..]), "second  [2J");
        assert_eq!(last_line(&b""[..]), "");
        let endless = vec![b'x'; MAX_WORDS * 50];
        assert_eq!(last_line(&endless[..]).len(), MAX_WORDS);
    }
}
