//! What a machine boots from: image references, where images come from, and the store that keeps them.
//!
//! ```no_run
//! use images::{NoProgress, PullOptions, Reference, RootfsSlot, Store, pull};
//!
//! # fn unpack_in_a_vm(image: &images::Image, target: &std::path::Path) {}
//! # fn main() -> images::Result<()> {
//! let store = Store::open("/var/lib/flyrun");
//! let image = pull(&store, &Reference::parse("alpine:3.20")?, &PullOptions::default(), &NoProgress)?;
//! let lease = match store.begin_rootfs(&image.chain_id, &NoProgress)? {
//!     RootfsSlot::Ready(lease) => lease,
//!     RootfsSlot::Draft(draft) => {
//!         draft.format(&store, images::ROOTFS_BYTES)?;
//!         unpack_in_a_vm(&image, draft.path());
//!         draft.commit()?
//!     }
//! };
//! println!("boot from {}", lease.path().display());
//! # Ok(())
//! # }
//! ```
//!
//! # The store
//!
//! | path | what it is |
//! |---|---|
//! | `blobs/sha256/<hex>` | manifests, indexes, configurations, layers as they came, each named by its SHA-256; read-only |
//! | `blobs/lock` | held shared by whoever adds an image, exclusively by whoever removes blobs |
//! | `refs/<sha256 of the name>.json` | which image a canonical name stands for, with all that a start needs |
//! | `rootfs/<chain id>.ext4` | the unpacked root filesystem of those layers; read-only; held shared by each machine that uses it. One that came with a snapshot is named by its content |
//! | `templates/<kind>-<bytes>-v<n>.ext4` | empty filesystems, copied and never written |
//! | `tmp/…` | drafts: each is locked by the process that makes it |
//!
//! **Nothing half-made is visible.** Everything begins as a draft in `tmp/` under an exclusive `flock`, is checked against its
//! digest while it is written, synced, renamed to its place, and the directory synced. Whoever wants the same thing
//! meanwhile waits for the lock and then finds it done.
//!
//! **A crash at any point** leaves drafts without a lock. A blob's draft is taken up by the next pull, which hashes what is
//! there and asks for the rest; other drafts are overwritten; [`Store::prune`] removes what nobody took up.
//!
//! **Removing is safe beside everything else.** A root filesystem goes only under an exclusive lock on its own file, which
//! no machine's [`RootfsLease`] leaves free; blobs only when no image refers to them and nobody is adding one. Names are
//! removed at once, and blobs that a pull under way kept are left to the next prune.
//!
//! **A start of a cached image** reads one small file ([`Store::find`]); no directory is listed, no blob opened, no event
//! loop built. A record holds everything; it is of one version of flyrun and is written anew by a pull when it is not.
//!
//! # What is trusted
//!
//! Nothing that comes from a registry, a layout, an archive or a reference: documents are bounded in size, depth and
//! number; layers are never looked into here (that is for the unpack VM, which checks each `diff_id`); no path is made of
//! foreign text, only of digests that were parsed; archives are indexed by name and never unpacked. Credentials go to
//! the registry that asks for them and to the realm that it names, not where it redirects.
#![forbid(unsafe_code)]

mod config;
mod digest;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod image;
mod local;
mod oci;
mod progress;
mod pull;
mod reference;
mod registry;
mod store;
mod template;

pub use config::{Healthcheck, ImageConfig};
pub use digest::{Digest, DigestError};
pub use error::{Error, Result};
pub use image::{Compression, Image, Layer, Platform};
pub use progress::{Event, NoProgress, Progress};
pub use pull::{Auth, PullOptions, PullPolicy, pull};
pub use reference::{Reference, ReferenceError, RegistryName, Source};
pub use store::{
    ImageSummary, PruneOptions, PruneReport, RemoveReport, RootfsDraft, RootfsLease, RootfsSlot, Store,
};
pub use template::{
    DISK_DEFAULT_BYTES, MAX_BYTES, MIN_BYTES, ROOTFS_BYTES, TemplateKind, copy_file, copy_file_unless,
    rounded_bytes,
};
