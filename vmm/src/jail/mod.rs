//! The jail: where `flyrun-vmm` is before it looks at anything that a stranger wrote.
//!
//! A guest that finds a mistake in a device has this process. It gets nothing by it: the process has
//!
//! | of | it has |
//! |---|---|
//! | files | a root directory that cannot be written to, with the machine's own vsock sockets and nothing else; the old root is unmounted, and as this is not the namespace's root, the kernel makes it no user namespace |
//! | users | a user and group id of its own ([`uids`]), no other groups, no capability in any of the five sets, no_new_privs |
//! | processes | a process id namespace in which it is number 1, and no /proc to see any other in |
//! | network, IPC, host name, cgroups | a namespace of its own each; of the network not even a loopback interface that is up |
//! | resources | the limits of [`limits`], beside the machine's cgroup |
//! | devices | the descriptors that it was given: /dev/kvm, its TAP, vhost-net, its disks |
//!
//! # In which order
//! 1. The monitor starts `flyrun-vmm` as root on a thread that has asked for a new process id namespace ([`ask_for_own_pids`]).
//! 2. As root, `flyrun-vmm` reads its arguments and its spec, both the monitor's words, and opens all that they name: KVM, disks,
//!    TAP, vhost-net, console, sockets, kernel, initramfs, the files of a snapshot ([`crate::parts`], [`crate::snapshot::files`]).
//!    It reads none of them.
//! 3. [`Jail::enter`], with one thread.
//! 4. Kernel or snapshot are parsed, devices and vCPUs made, the guest runs.
//!
//! What it needs later comes by descriptor: the directory that a snapshot is written to, or the file for a list of pages, is sent
//! with the request ([`crate::channel`]), as a mount of that directory alone, so that `..` leads nowhere.
//!
//! # What it costs
//! 1.3 ms of virtual time (Linux 6.12, 13 mounts on the host), of which 1.0 is the network namespace: unless there is a [`spare`] one.
//!
//! A host that cannot make one part of the jail makes none of the machine: an error says which. Without root there is a user
//! namespace instead of a user id, and the host's process ids.

pub mod limits;
pub mod spare;
pub mod uids;

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use rustix::{
    io::Errno,
    mount::{
        MountFlags, MountPropagationFlags, UnmountFlags, mount_bind, mount_change, mount_remount, unmount,
    },
    process::{DumpableBehavior, chdir, chroot, getegid, geteuid, pivot_root, set_dumpable_behavior},
    thread::{
        CapabilitySet, CapabilitySets, Gid, Uid, UnshareFlags, clear_ambient_capability_set,
        remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
        set_thread_res_gid, set_thread_res_uid, unshare_unsafe,
    },
};

use limits::Limits;

/// The namespaces that a jailed process has for itself; that of process ids it is born in.
const OWN: UnshareFlags = UnshareFlags::NEWNS
    .union(UnshareFlags::NEWNET)
    .union(UnshareFlags::NEWIPC)
    .union(UnshareFlags::NEWUTS)
    .union(UnshareFlags::NEWCGROUP);

/// Where a process is to be locked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Jail {
    /// The directory that becomes its root. That above it holds nothing else.
    pub root: PathBuf,
    /// Its user and group id, which nobody else has; `None` for a user who is not root and stays who he is.
    pub uid: Option<u32>,
}

/// Which part of a jail the host does not grant.
#[derive(Debug)]
pub struct NoJail {
    step: &'static str,
    source: io::Error,
}

impl fmt::Display for NoJail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { step, source } = self;
        write!(
            f,
            "flyrun-vmm cannot be jailed: {step}: {source}; `flyrun doctor` checks the jail, and FLYRUN_JAIL=off goes without, for \
             guests that are trusted"
        )
    }
}

impl std::error::Error for NoJail {}

fn at<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> NoJail {
    move |source| NoJail { step, source: source.into() }
}

/// Has the processes that the calling thread starts from now on be number 1 of a namespace of their own. Once in a thread's life;
/// after the first of them has ended, it can start none any more.
///
/// # Errors
/// The host's: `EPERM` without root.
pub fn ask_for_own_pids() -> io::Result<()> {
    // SAFETY: file descriptors stay shared.
    Ok(unsafe { unshare_unsafe(UnshareFlags::NEWPID) }?)
}

impl Jail {
    /// Goes there, for good. On the process's only thread, before it has read anything of a stranger.
    ///
    /// # Errors
    /// The part that the host does not grant. The process is then neither here nor there, and has to end.
    pub fn enter(&self, limits: &Limits) -> Result<(), NoJail> {
        if let Some(uid) = self.uid {
            // Held until the process ends, so that no other machine gets the number while this one lives.
            uids::hold(uid).map_err(at("its user id"))?;
        }
        limits.set(self.uid.is_some()).map_err(at("resource limits"))?;
        self.leave_namespaces()?;
        become_root(&self.root).map_err(at("its root directory"))?;
        self.leave_rights()
    }

    fn leave_namespaces(&self) -> Result<(), NoJail> {
        let (uid, gid) = (geteuid(), getegid());
        let own_users = self.uid.is_none() && !uid.is_root();
        let mut flags = if own_users { OWN | UnshareFlags::NEWUSER } else { OWN };
        if self.uid.is_some() && spare::enter() {
            flags -= UnshareFlags::NEWNET;
        }
        // SAFETY: file descriptors stay shared.
        unsafe { unshare_unsafe(flags) }.map_err(at("namespaces"))?;
        if own_users {
            let map = |file, text: &str| fs::write(Path::new("/proc/self").join(file), text);
            map("setgroups", "deny")
                .and_then(|()| map("uid_map", &format!("{uid} {uid} 1", uid = uid.as_raw())))
                .and_then(|()| map("gid_map", &format!("{gid} {gid} 1", gid = gid.as_raw())))
                .map_err(at("user namespace"))?;
        }
        Ok(())
    }

    fn leave_rights(&self) -> Result<(), NoJail> {
        // The highest that a kernel may know; EINVAL is behind the last that this one does.
        for number in 0..64u32 {
            match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)) {
                Ok(()) => {}
                Err(Errno::INVAL) => break,
                Err(error) => return Err(at("capability bounding set")(error)),
            }
        }
        // Before Linux 4.3 there is none.
        clear_ambient_capability_set().map_err(at("ambient capabilities"))?;
        if let Some(uid) = self.uid {
            set_thread_groups(&[]).map_err(at("groups"))?;
            let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(uid));
            set_thread_res_gid(gid, gid, gid).map_err(at("group id"))?;
            set_thread_res_uid(uid, uid, uid).map_err(at("user id"))?;
        }
        let none = CapabilitySet::empty();
        set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
            .map_err(at("capabilities"))?;
        set_no_new_privs(true).map_err(at("no_new_privs"))?;
        set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(at("core dumps"))
    }
}

/// Makes the directory the root of this process, and the one above it that of its mount namespace, which nothing else is in then.
fn become_root(root: &Path) -> io::Result<()> {
    let (Some(above), Some(name)) = (root.parent(), root.file_name()) else {
        return Err(io::Error::other(format!("{} has no directory above it", root.display())));
    };
    // Nothing that happens here is to be seen outside.
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    mount_bind(above, above)?;
    let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
    mount_remount(above, flags | MountFlags::NOEXEC, "")?;
    chdir(above)?;
    // The old root comes to lie on top of the new one, and is gone with the next line (pivot_root(2)).
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    // The kernel makes no user namespace, in which it could have capabilities again, for a process whose root is not its
    // namespace's.
    chroot(name)?;
    Ok(chdir("/")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said_with_what_to_do() {
        let told = at("namespaces")(Errno::PERM).to_string();
        assert!(
            told.starts_with("flyrun-vmm cannot be jailed: namespaces: Operation not permitted"),
            "{told}"
        );
        assert!(told.contains("flyrun doctor") && told.contains("FLYRUN_JAIL=off"), "{told}");
    }

    #[test]
    fn every_namespace_is_left() {
        assert_eq!(OWN.bits().count_ones(), 5);
    }
}
