//! A network namespace that is there before it is needed: to make one takes the kernel 1.0 ms of virtual time, which nobody
//! waits for when a machine has just ended or has been running for a while.
//!
//! It is kept as a mount of itself (as `ip netns` keeps them) at [`PLACE`], one for all flyruns of a host, and used once: who
//! unmounts it has it alone, so that no two machines share one and none gets what another has left.

use std::{
    fs::OpenOptions,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
    thread,
};

use rustix::{
    fs::{CWD, Mode, OFlags, fstatfs, openat, statfs},
    mount::{MountPropagationFlags, UnmountFlags, mount_bind, mount_change, unmount},
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe},
};

/// Where it is kept.
const PLACE: &str = "/run/flyrun-netns";
/// `NSFS_MAGIC` of linux/magic.h.
const NSFS: i64 = 0x6e73_6673;

/// Moves the calling thread, which has no other beside it, into the spare one, if there is one. It is of no consequence but for time
/// if there is none.
pub(super) fn enter() -> bool {
    take(Path::new(PLACE)).is_some_and(|spare| {
        move_into_link_name_space(spare.as_fd(), Some(LinkNameSpaceType::Network)).is_ok()
    })
}

/// Leaves one for whoever comes next, unless there is one. For root, after what somebody waits for.
///
/// # Errors
/// The host's. Then the next machine makes its own.
pub fn leave() -> io::Result<()> {
    leave_at(Path::new(PLACE))
}

#[allow(clippy::disallowed_methods, reason = "a thread of whoever starts machines, which has no filter")]
fn leave_at(place: &Path) -> io::Result<()> {
    if is_kept(place) {
        return Ok(());
    }
    OpenOptions::new().append(true).create(true).mode(0o600).open(place)?;
    // A namespace is each thread's own, and this one's for nothing else.
    let made = thread::scope(|scope| {
        let make = || {
            // SAFETY: file descriptors stay shared.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
            mount_bind("/proc/thread-self/ns/net", place)?;
            // Who has the host's mounts too is not told of those on top of it.
            mount_change(place, MountPropagationFlags::PRIVATE)
        };
        scope.spawn(make).join()
    });
    Ok(made.map_err(|_| io::Error::other("the thread has panicked"))??)
}

fn is_kept(place: &Path) -> bool {
    statfs(place).is_ok_and(|found| found.f_type == NSFS)
}

fn take(place: &Path) -> Option<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let found = openat(CWD, place, flags, Mode::empty()).ok()?;
    if fstatfs(&found).ok()?.f_type != NSFS {
        return None;
    }
    // Two may have opened it; one of them unmounts it.
    unmount(place, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).ok()?;
    Some(found)
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, fs, os::unix::fs::MetadataExt};

    use super::*;

    /// Leaves one, where this user may make any at all.
    fn may_leave(place: &Path) -> bool {
        match leave_at(place) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                eprintln!("SKIPPED, nothing was tested: no right to make network namespaces here");
                false
            }
            left => left.map(|()| true).unwrap(),
        }
    }

    #[test]
    fn what_is_kept_is_taken_once_and_is_another_each_time() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("net");
        assert!(take(&place).is_none());
        let own = fs::metadata("/proc/self/ns/net").unwrap().ino();
        let mut seen = HashSet::from([own]);
        let mut held = Vec::new();
        for _ in 0..3 {
            if !may_leave(&place) {
                return;
            }
            // A second one leaves it alone.
            leave_at(&place).unwrap();
            let taken = fs::File::from(take(&place).unwrap());
            assert!(take(&place).is_none());
            assert!(seen.insert(taken.metadata().unwrap().ino()), "the same namespace twice");
            held.push(taken);
        }
        assert_eq!(fs::metadata("/proc/thread-self/ns/net").unwrap().ino(), own);
    }

    #[test]
    fn a_plain_file_is_no_namespace() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("net");
        fs::write(&place, "x").unwrap();
        assert!(take(&place).is_none() && place.exists());
    }

    #[test]
    #[allow(clippy::disallowed_methods, reason = "a test's threads have no filter")]
    fn of_many_who_come_at_once_one_has_it() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("net");
        if !may_leave(&place) {
            return;
        }
        let taken: usize = thread::scope(|scope| {
            let takers: Vec<_> =
                (0..8).map(|_| scope.spawn(|| usize::from(take(&place).is_some()))).collect();
            takers.into_iter().map(|taker| taker.join().unwrap()).sum()
        });
        assert_eq!(taken, 1);
    }
}
