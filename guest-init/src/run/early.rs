//! What a machine has before anybody knows what it is to run: the kernel's own filesystems, the workload's cgroup, the loopback
//! interface. One that goes on from a base snapshot has it from there.

use rustix::{
    fs::{CWD, Mode, OFlags, chmod, openat, symlink},
    io::{Errno, write},
    mount::MountFlags,
};

use super::cgroup::Cgroup;
use crate::{
    busy::Door,
    failure::{Failure, OrSetup},
    pid1::{Kept, mount_at},
    sys,
};

/// The usual flags of what is no place for programs.
pub const COMMON: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

const SYSCTLS: [(&str, &str); 3] = [
    // What containers may do without being asked: ping, and serve low ports, as any user. Docker sets the same.
    ("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0"),
    ("/proc/sys/net/ipv4/ping_group_range", "0 2147483647"),
    // kcompactd looks twice a second whether there is something to move (mm/compaction.c), each time by two timer interrupts: most
    // of what an idle machine costs its host. And what it moves is written, which a snapshot then has anew.
    ("/proc/sys/vm/compaction_proactiveness", "0"),
];

/// The filesystems, mounted in the initramfs until the workload's root is there.
#[derive(Debug)]
pub struct Early {
    /// The workload's.
    cgroup: Cgroup,
    lease: Door,
    mounts: [Kept; 3],
}

/// Makes all of it.
///
/// # Errors
/// [`protocol::FailureKind::Setup`] naming the step.
pub fn prepare() -> Result<Early, Failure> {
    mount_at("proc", "/proc", "proc", COMMON, "")?;
    mount_at("sysfs", "/sys", "sysfs", COMMON, "")?;
    fill_dev()?;
    let cgroup = Cgroup::create()?;
    let lease = Door::make()?;
    set_up_kernel();
    let mounts = [Kept::of("/proc")?, Kept::of("/sys")?, Kept::of("/dev")?];
    Ok(Early { cgroup, lease, mounts })
}

impl Early {
    /// Moves the kernel's filesystems to where this process sees them now, with all that is mounted in them. What the lease is asked for
    /// at lies in the workload's.
    ///
    /// # Errors
    /// [`protocol::FailureKind::Setup`] naming the mount.
    pub fn show(self) -> Result<(Cgroup, Door), Failure> {
        self.mounts.into_iter().try_for_each(Kept::show)?;
        Ok((self.cgroup, self.lease))
    }
}

/// Adds to the kernel's devices what an OCI runtime does. /dev itself PID 1 has mounted.
fn fill_dev() -> Result<(), Failure> {
    // devtmpfs makes /dev/ptmx itself, which finds the instance in the "pts" beside it.
    mount_at(
        "devpts",
        "/dev/pts",
        "devpts",
        MountFlags::NOSUID | MountFlags::NOEXEC,
        "gid=5,mode=620,ptmxmode=666",
    )?;
    // What udev would do: both guard themselves, and a user of a container expects to open them.
    for node in ["/dev/fuse", "/dev/net/tun"] {
        let _ = chmod(node, Mode::from_raw_mode(0o666));
    }
    mount_at("shm", "/dev/shm", "tmpfs", COMMON, "mode=1777")?;
    mount_at("mqueue", "/dev/mqueue", "mqueue", COMMON, "")?;
    for (name, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        match symlink(target, name) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno).or_setup(|| format!("make {name}")),
        }
    }
    Ok(())
}

/// Loopback and the kernel's settings; a kernel without networking has not all of them, and runs programs all the same.
fn set_up_kernel() {
    let _ = sys::loopback_up();
    for (path, value) in SYSCTLS {
        let _ = openat(CWD, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
            .and_then(|file| write(file, value.as_bytes()));
    }
}
