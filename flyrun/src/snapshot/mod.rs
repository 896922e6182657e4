//! Snapshots with a name: a machine as it was, kept beside the machines, from which others go on.
//!
//! A snapshot is a directory `snapshots/<id>/`, laid out as a suspended machine's is, with a record of its own. Nothing in it is
//! ever written again; memory is links, which machines and snapshots share. One that is being made is a directory `.new-<id>`
//! whose lock its maker holds, and one that is being removed `.old-<id>`: neither has a name yet or any more, and what a crash
//! leaves of them the next command sweeps away.

pub mod archive;
mod copy;
mod record;
mod store;

pub use copy::{copy, copy_disk, link_base, offspring};
pub use record::{Record, VERSION, check, ensure_can_rest};
pub use store::{Draft, Snapshots};

use std::path::Path;

use vmm::snapshot::header::Header;

use crate::error::{Error, Result};

/// What can be known of a snapshot without reading all of it.
///
/// # Errors
/// There is none in this directory, or it is damaged.
pub fn header(directory: &Path) -> Result<Header> {
    vmm::snapshot::restore::header(directory)
        .map_err(|refusal| Error::new(format!("the snapshot is {}: {refusal}", refusal.name())))
}
