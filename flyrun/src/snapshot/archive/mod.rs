//! A snapshot as one file, for another host: a tar with the holes of its files left out (GNU's old format), compressed with zstd.
//!
//! | entry, in this order | what |
//! |---|---|
//! | `snapshot.json` | [`Manifest`]: the record, and of each file its length and digest |
//! | `state`, `memory`, `base` | as in `vmm/src/snapshot/FORMAT.md`; `base` if there is one |
//! | `disk.ext4` | the machine's own disk, if it has one |
//! | `rootfs.ext4` | the root filesystem, unless it was left out |
//!
//! A digest is SHA-256 over each block of 4096 bytes that is not all zeros, each behind its number as 8 bytes, and at last the file's
//! length as 8 bytes, all little endian: so that it costs nothing for holes, and is the same wherever they are. Times are not the
//! archive's business: those that matter are in `state`, and are given to disk and root filesystem again.
//!
//! Whoever imports one trusts nothing in it. Only these names are taken, once, in this order, as plain files, with the lengths that
//! manifest and `state` tell; what the record asks of its host beyond a machine of its own (volumes, directories, a kernel) is
//! refused, and a network of other machines is not joined.

use images::Digest;
use serde::{Deserialize, Serialize};
use vmm::snapshot::{BASE, MEMORY, STATE};

use super::Record;
use crate::machine::DISK;

mod bounded;
mod digest;
mod export;
mod import;
mod judge;

#[cfg(any(test, feature = "fuzzing"))]
pub use digest::digest as digest_of;
pub use export::export;
pub use import::import;

/// The version of the archive.
const VERSION: u32 = 1;
/// The longest manifest, in bytes.
const MAX_MANIFEST_BYTES: u64 = 1 << 20;
const MANIFEST: &str = "snapshot.json";
const ROOTFS: &str = "rootfs.ext4";
/// The files behind the manifest, in their order.
const NAMES: [&str; 5] = [STATE, MEMORY, BASE, DISK, ROOTFS];

/// What an archive begins with.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Manifest {
    version: u32,
    record: Record,
    /// What follows.
    files: Vec<Described>,
    /// The root filesystem, also when it does not follow.
    rootfs: Described,
}

/// A file, as it must be when it arrives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Described {
    name: String,
    bytes: u64,
    digest: Digest,
}

#[cfg(test)]
mod tests;
