//! What a jailed process may use of the host (setrlimit(2)), whether or not its machine has a cgroup.

use std::io;

use rustix::process::{Resource, Rlimit, geteuid, getrlimit, setrlimit};

/// 1024 connections of vsock, and what else a machine of 32 vCPUs and many disks has open.
const FILES: u64 = 2048;
/// vCPUs, vhost-net's workers, and some that live for moments.
const THREADS: u64 = 128;
/// The shortest limit of a file's length, in bytes: a console's log grows.
const MIN_FILE_BYTES: u64 = 1 << 30;
/// Address space beside guest memory, in bytes: stacks, heap, what is read of a snapshot.
const OWN_BYTES: u64 = 2 << 30;

/// The limits of a machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Length of its largest disk in bytes.
    pub disk_bytes: u64,
    /// Size of its memory in bytes.
    pub memory_bytes: u64,
}

impl Limits {
    /// Each resource, and how much there is of it.
    fn all(self) -> [(Resource, u64); 6] {
        let file_bytes = self.disk_bytes.max(self.memory_bytes).max(MIN_FILE_BYTES);
        // Twice, for a mapping that takes the place of another.
        let address_space = self.memory_bytes.saturating_mul(2).saturating_add(OWN_BYTES);
        [
            (Resource::Nofile, FILES),
            (Resource::Nproc, THREADS),
            (Resource::Fsize, file_bytes),
            (Resource::As, address_space),
            (Resource::Core, 0),
            (Resource::Msgqueue, 0),
        ]
    }

    /// Holds this process to them, for good. Where the host grants less already, that stays, but for root's descriptors.
    /// `is_alone`: no other process is the user's, whose threads are counted.
    pub(super) fn set(self, is_alone: bool) -> io::Result<()> {
        let is_root = geteuid().is_root();
        for (resource, wanted) in self.all() {
            if resource == Resource::Nproc && !is_alone {
                continue;
            }
            let there = getrlimit(resource).maximum.filter(|_| !(is_root && resource == Resource::Nofile));
            let limit = Some(wanted.min(there.unwrap_or(u64::MAX)));
            setrlimit(resource, Rlimit { current: limit, maximum: limit })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(limits: Limits, wanted: Resource) -> u64 {
        limits.all().into_iter().find(|(resource, _)| *resource == wanted).unwrap().1
    }

    #[test]
    fn the_largest_file_is_a_disk_or_a_snapshot_of_memory() {
        assert_eq!(of(Limits { disk_bytes: 5 << 30, memory_bytes: 1 << 30 }, Resource::Fsize), 5 << 30);
        assert_eq!(of(Limits { disk_bytes: 1, memory_bytes: 3 << 30 }, Resource::Fsize), 3 << 30);
        assert_eq!(of(Limits::default(), Resource::Fsize), MIN_FILE_BYTES);
    }

    #[test]
    fn no_machine_is_too_large_and_nothing_is_dumped() {
        assert_eq!(of(Limits { disk_bytes: 0, memory_bytes: u64::MAX }, Resource::As), u64::MAX);
        assert_eq!(of(Limits::default(), Resource::Core), 0);
    }
}
