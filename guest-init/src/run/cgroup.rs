//! The cgroup that the workload lives in: it is what can be frozen, counted and asked for kills by the kernel.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{CWD, Mode, OFlags, mkdirat, openat},
    io::{Errno, pread, read, write},
    mount::{MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount},
};

use crate::{
    control::{Control, monotonic_ms, timeout},
    failure::{Failure, OrSetup},
    pid1::mount_at,
};

const MOUNT_POINT: &str = "/sys/fs/cgroup";
const NAME: &str = "workload";
/// Where commands beside the workload go when its own cgroup may hold no processes.
const LEAF: &str = "exec";

/// The workload's cgroup. The workload sees it as the root of the hierarchy.
#[derive(Debug)]
pub struct Cgroup {
    directory: OwnedFd,
    procs: OwnedFd,
}

impl Cgroup {
    /// Makes the cgroup with every controller the kernel has, and shows it at /sys/fs/cgroup.
    ///
    /// # Errors
    /// [`protocol::FailureKind::Setup`] naming the step.
    pub fn create() -> Result<Self, Failure> {
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        mount_at("cgroup2", MOUNT_POINT, "cgroup2", flags, "nsdelegate")?;
        Self::make_and_show().or_setup(|| "set up the workload's cgroup".into())
    }

    fn make_and_show() -> rustix::io::Result<Self> {
        let root =
            openat(CWD, MOUNT_POINT, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let controllers = read_file(root.as_fd(), "cgroup.controllers")?;
        let enable: String = controllers.split_whitespace().flat_map(|name| ["+", name, " "]).collect();
        if !enable.is_empty() {
            write(
                open(root.as_fd(), "cgroup.subtree_control", OFlags::WRONLY)?,
                enable.trim_end().as_bytes(),
            )?;
        }
        mkdirat(&root, NAME, Mode::from_raw_mode(0o755))?;
        // Only the workload's part of the hierarchy is to be seen, in the place of the whole.
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = open_tree(&root, NAME, flags)?;
        drop(root);
        unmount(MOUNT_POINT, UnmountFlags::DETACH)?;
        move_mount(&tree, "", CWD, MOUNT_POINT, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        let procs = open(tree.as_fd(), "cgroup.procs", OFlags::WRONLY)?;
        Ok(Self { directory: tree, procs })
    }

    /// Bounds the number of processes and threads in it.
    ///
    /// # Errors
    /// The kernel's reason.
    pub fn limit_processes(&self, most: u32) -> rustix::io::Result<()> {
        let file = open(self.directory.as_fd(), "pids.max", OFlags::WRONLY)?;
        write(file, most.to_string().as_bytes()).map(drop)
    }

    /// Moves the calling process into it.
    ///
    /// # Errors
    /// The kernel's reason.
    pub fn enter(&self) -> rustix::io::Result<()> {
        match write(&self.procs, b"0") {
            // The workload manages cgroups itself, as systemd does, and then only leaves may hold processes.
            Err(Errno::BUSY) => self.enter_leaf(),
            other => other.map(drop),
        }
    }

    fn enter_leaf(&self) -> rustix::io::Result<()> {
        match mkdirat(&self.directory, LEAF, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno),
        }
        let procs = open(self.directory.as_fd(), &format!("{LEAF}/cgroup.procs"), OFlags::WRONLY)?;
        write(procs, b"0").map(drop)
    }

    /// Lets all of its processes stand still, and returns when they do. Whenever something comes for `host`, it is asked
    /// whether that is still wanted.
    ///
    /// # Errors
    /// `ETIMEDOUT` when one does not in time, and `ECANCELED` when it is no longer wanted: they run again then.
    pub fn freeze(
        &self,
        limit_ms: i64,
        host: &mut Control,
        wanted: &mut dyn FnMut(&mut Control) -> bool,
    ) -> rustix::io::Result<()> {
        self.set_freeze(b"1")?;
        let until = monotonic_ms() + limit_ms;
        let events = open(self.directory.as_fd(), "cgroup.events", OFlags::RDONLY)?;
        loop {
            let mut content = [0; 256];
            let count = pread(&events, &mut content[..], 0)?;
            let content = String::from_utf8_lossy(content.get(..count).unwrap_or_default());
            // An empty one never says that it is frozen.
            if counter(&content, "frozen") == Some(1) || counter(&content, "populated") == Some(0) {
                return Ok(());
            }
            let left = until - monotonic_ms();
            if left <= 0 {
                self.thaw()?;
                return Err(Errno::TIMEDOUT);
            }
            // kernfs tells of a change by POLLPRI.
            let mut fds = vec![PollFd::new(&events, PollFlags::PRI)];
            if !host.is_closed() {
                fds.push(PollFd::new(&*host, PollFlags::IN));
            }
            match poll(&mut fds, Some(&timeout(left))) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
            let has_come = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
            drop(fds);
            if has_come && !wanted(host) {
                self.thaw()?;
                return Err(Errno::CANCELED);
            }
        }
    }

    /// Lets them run on.
    ///
    /// # Errors
    /// The kernel's reason.
    pub fn thaw(&self) -> rustix::io::Result<()> {
        self.set_freeze(b"0")
    }

    fn set_freeze(&self, value: &[u8]) -> rustix::io::Result<()> {
        write(open(self.directory.as_fd(), "cgroup.freeze", OFlags::WRONLY)?, value).map(drop)
    }

    /// How many of its processes the kernel has killed for want of memory.
    pub fn oom_kills(&self) -> u64 {
        let events = read_file(self.directory.as_fd(), "memory.events").unwrap_or_default();
        counter(&events, "oom_kill").unwrap_or(0)
    }
}

impl AsFd for Cgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

/// A counter of a flat keyed file (Documentation/admin-guide/cgroup-v2.rst).
pub fn counter(content: &str, name: &str) -> Option<u64> {
    content.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

fn open(directory: BorrowedFd<'_>, name: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    openat(directory, name, flags | OFlags::CLOEXEC, Mode::empty())
}

/// The content of a file of a cgroup, cut at 4 KiB.
///
/// # Errors
/// The kernel's reason; `ENOENT` when the controller is missing.
pub fn read_file(directory: BorrowedFd<'_>, name: &str) -> rustix::io::Result<String> {
    let mut content = [0; 4096];
    let count = read(open(directory, name, OFlags::RDONLY)?, &mut content[..])?;
    Ok(String::from_utf8_lossy(content.get(..count).unwrap_or_default()).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_are_read_and_not_confused_with_groups_of_kills() {
        let events = "low 0\nhigh 0\nmax 3\noom 2\noom_kill 1\noom_group_kill 7\n";
        assert_eq!(counter(events, "oom_kill"), Some(1));
        assert_eq!(counter("oom 2\noom_kill 0\n", "oom_kill"), Some(0));
        assert_eq!(counter("oom_kill x\n", "oom_kill"), None);
        assert_eq!(counter("", "oom_kill"), None);
    }
}
