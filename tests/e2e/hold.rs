//! Stopping flyrun or its VMM at a step of what it does (see vmm/src/hold.rs), without guessing how long that takes.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, FileType, Mode, OFlags, chmod, mknodat, open};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::flyrun::{Invocation, scratch};

/// After this long without the step, a test hangs.
const HANG_SECONDS: i64 = 300;

/// A step at which the first process that reaches it waits.
#[derive(Debug)]
pub struct Hold {
    step: String,
    directory: TempDir,
    reader: File,
}

impl Hold {
    /// Nobody waits there yet.
    pub fn at(step: &str) -> Hold {
        let directory = scratch();
        // For flyrun-vmm too, which is another user in its jail.
        let allow = |path: &std::path::Path, mode| chmod(path, Mode::from_raw_mode(mode)).unwrap();
        allow(directory.path(), 0o711);
        for name in ["fifo", "fifo.go"] {
            let path = directory.path().join(name);
            mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
            allow(&path, 0o666);
        }
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let reader = File::from(open(directory.path().join("fifo"), flags, Mode::empty()).unwrap());
        Hold { step: step.into(), directory, reader }
    }

    fn fifo(&self) -> PathBuf {
        self.directory.path().join("fifo")
    }

    /// Lets a command, and all that it starts, wait there.
    pub fn on<'a>(&self, invocation: Invocation<'a>) -> Invocation<'a> {
        invocation.env("FLYRUN_HOLD", &self.step).env("FLYRUN_HOLD_FIFO", self.fifo())
    }

    /// Waits until a process has reached the step, and gives its id.
    #[track_caller]
    pub fn reached(&self) -> i32 {
        let limit = Timespec { tv_sec: HANG_SECONDS, tv_nsec: 0 };
        let ready = poll(&mut [PollFd::new(&self.reader, PollFlags::IN)], Some(&limit)).unwrap();
        assert_eq!(ready, 1, "nobody has reached '{}'", self.step);
        let mut line = String::new();
        let mut reader = BufReader::new(&self.reader);
        while line.is_empty() {
            // The writer has opened it, and writes in a moment.
            let _ = reader.read_line(&mut line);
            std::thread::sleep(Duration::from_millis(1));
        }
        line.trim().parse().unwrap()
    }

    /// Lets the process that [`Hold::reached`] has told go on, unless it ended, as a VMM does with its monitor.
    pub fn release(&self, held: i32) {
        let go = self.directory.path().join("fifo.go");
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        // Nobody reads it yet, or any more.
        while open(&go, flags, Mode::empty()).is_err() && is_alive(held) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn is_alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with('Z'))
}

/// Kills a process and waits until nothing of it runs.
pub fn kill(pid: i32) {
    let pid = Pid::from_raw(pid).unwrap();
    let Ok(pidfd) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) else { return };
    let _ = kill_process(pid, Signal::KILL);
    let limit = Timespec { tv_sec: HANG_SECONDS, tv_nsec: 0 };
    assert_eq!(poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit)).unwrap(), 1);
}
