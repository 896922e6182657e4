//! What the process that becomes a virtiofsd does first: it binds itself to its monitor, to the machine's cgroup, and, for a
//! read-only directory, to a view of it that nothing can be written through.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{StatVfsMountFlags, statvfs};
use rustix::mount::{MountFlags, MountPropagationFlags, mount_bind, mount_change, mount_remount};
use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use rustix::thread::UnshareFlags;

use super::daemon::{Kind, is_root};
use crate::error::{Context, Error, Result};
use crate::monitor::ONE_ARENA;

/// What is to be served, and by which program.
#[derive(Clone, Debug, PartialEq, Eq, clap::Args)]
pub struct Order {
    /// The monitor, which is the parent of this process
    #[arg(long)]
    pub owner: u32,
    /// Move into this cgroup
    #[arg(long)]
    pub cgroup: Option<PathBuf>,
    /// An empty directory where a read-only view of the directory can be mounted
    #[arg(long)]
    pub read_only_at: Option<PathBuf>,
    /// What program it is
    #[arg(long, value_enum)]
    pub kind: Kind,
    /// The program
    #[arg(long)]
    pub program: PathBuf,
    /// The directory
    pub directory: PathBuf,
}

/// Becomes the virtiofsd that serves whoever connects to the listening socket on standard input.
///
/// # Errors
/// Something of it cannot be done; otherwise this does not return.
pub fn become_daemon(order: &Order) -> Result<()> {
    // This outlives exec(2). Its parent may have ended just before; then the kernel has nothing to tell any more.
    set_parent_process_death_signal(Some(Signal::KILL)).context("cannot be bound to the monitor")?;
    let parent = getppid().and_then(|parent| u32::try_from(parent.as_raw_nonzero().get()).ok());
    if parent != Some(order.owner) {
        return Err(Error::new("the machine's monitor has ended"));
    }
    if let Some(cgroup) = &order.cgroup {
        let told = || format!("cannot enter the cgroup {}", cgroup.display());
        std::fs::write(cgroup.join("cgroup.procs"), "0").context(told())?;
    }
    let mut directory = order.directory.as_path();
    if let Some(place) = order.read_only_at.as_deref().filter(|_| is_root()) {
        mount_read_only(directory, place)
            .context(format!("cannot make a read-only view of {}", directory.display()))?;
        directory = place;
    }
    let socket = inherited(rustix::stdio::stdin()).context("there is no socket")?;
    let arguments = order.kind.arguments(socket.as_raw_fd(), directory, order.read_only_at.is_some());
    let mut command = Command::new(&order.program);
    // That is for a monitor; this one has threads that work side by side.
    command.env_remove(ONE_ARENA.0);
    let error = command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).exec();
    Err(Error::caused(format!("cannot start {}", order.program.display()), &error))
}

/// A descriptor that the next program gets too.
fn inherited(fd: BorrowedFd<'_>) -> rustix::io::Result<rustix::fd::OwnedFd> {
    rustix::io::dup(fd)
}

/// Mounts the directory, without what is mounted below it, at an empty place, for this process and its children only.
fn mount_read_only(directory: &Path, place: &Path) -> std::io::Result<()> {
    // Its danger is that threads lose descriptors, which NEWNS does not touch; this process has one thread.
    #[allow(deprecated, reason = "what replaces it is unsafe, and this crate has no unsafe code")]
    rustix::thread::unshare(UnshareFlags::NEWNS)?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    mount_bind(directory, place)?;
    let has = statvfs(place)?.f_flag;
    let kept = [
        (StatVfsMountFlags::NOSUID, MountFlags::NOSUID),
        (StatVfsMountFlags::NODEV, MountFlags::NODEV),
        (StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
    ];
    let kept = kept.into_iter().filter(|(flag, _)| has.contains(*flag)).map(|(_, flag)| flag);
    let flags = kept.fold(MountFlags::BIND | MountFlags::RDONLY, MountFlags::union);
    mount_remount(place, flags, c"")?;
    match statvfs(place)?.f_flag.contains(StatVfsMountFlags::RDONLY) {
        true => Ok(()),
        false => Err(std::io::Error::other("the kernel leaves it writable")),
    }
}
