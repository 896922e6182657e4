//! Unpacks a whole image into a directory: the layers in order, then what a machine needs to be there.

use std::{io::Read, os::fd::OwnedFd};

use protocol::{Compression, FailureKind};
use rustix::{
    fs::{Mode, OFlags, chmodat, mkdirat, openat},
    io::Errno,
};

use super::{
    blob::Blob,
    layer::{Applier, Limits},
    path::CleanPath,
    tar::Archive,
    tree::{Tree, kernel_failure},
};
use crate::failure::Failure;

/// What a header, its padding and its extended headers may take beside the data of an entry, when all are generous.
const OVERHEAD_PER_ENTRY: u64 = 4096;
/// The empty blocks at an archive's end, for a record size that nobody exceeds.
const OVERHEAD: u64 = 16 << 20;

/// The directories that guest-init mounts on, or that every program expects. On a read-only root they could not be
/// made later.
const DIRECTORIES: [(&str, u32); 7] = [
    ("dev", 0o755),
    ("etc", 0o755),
    ("proc", 0o755),
    ("run", 0o755),
    ("sys", 0o755),
    ("tmp", 0o1777),
    ("var", 0o755),
];
/// In /run: what guest-init mounts there would otherwise be a directory copied up.
const OWN_DIRECTORY: &str = "flyrun";
/// The files that guest-init covers with its own.
const FILES: [&str; 3] = ["hostname", "hosts", "resolv.conf"];

/// An image being unpacked.
#[derive(Debug)]
pub struct Unpacker {
    applier: Applier,
    stream_bytes_left: u64,
    layers: usize,
}

impl Unpacker {
    /// Unpacks into this directory, which is empty. The process's umask must be 0.
    ///
    /// # Errors
    /// [`FailureKind::Setup`].
    pub fn new(root: OwnedFd, limits: Limits) -> Result<Self, Failure> {
        let tree = Tree::new(root)?;
        // What it has when no layer says otherwise.
        chmodat(tree.root(), ".", Mode::from_raw_mode(0o755), rustix::fs::AtFlags::empty())
            .map_err(kernel_failure)?;
        let overhead = limits.entries.saturating_mul(OVERHEAD_PER_ENTRY).saturating_add(OVERHEAD);
        Ok(Self {
            applier: Applier::new(tree, limits),
            stream_bytes_left: limits.bytes.saturating_add(overhead),
            layers: 0,
        })
    }

    /// Applies the next layer, and checks that its uncompressed bytes have this SHA-256.
    ///
    /// # Errors
    /// [`Failure`] naming the layer by its index, and the entry; the directory is then of no use.
    pub fn apply(
        &mut self,
        raw: impl Read,
        compression: Compression,
        diff_id: &[u8; 32],
    ) -> Result<(), Failure> {
        let index = self.layers;
        self.layers += 1;
        self.apply_layer(raw, compression, diff_id)
            .map_err(|failure| Failure::new(failure.kind, format!("layer {index}: {}", failure.message)))
    }

    fn apply_layer(
        &mut self,
        raw: impl Read,
        compression: Compression,
        diff_id: &[u8; 32],
    ) -> Result<(), Failure> {
        let mut archive = Archive::new(Blob::new(raw, compression, self.stream_bytes_left)?);
        let applied = self.applier.apply(&mut archive);
        match (applied, archive.into_inner().finish(diff_id)) {
            (Ok(()), Ok(left)) => {
                self.stream_bytes_left = left;
                Ok(())
            }
            // A wrong digest explains whatever else was wrong with the archive.
            (Err(failure), Err(digest)) if failure.kind == FailureKind::BadLayer => Err(digest),
            (Err(failure), _) | (Ok(()), Err(failure)) => Err(failure),
        }
    }

    /// Completes the tree.
    ///
    /// # Errors
    /// [`FailureKind::NoSpace`], [`FailureKind::Setup`].
    pub fn finish(mut self) -> Result<(), Failure> {
        make_mount_points(self.applier.tree())?;
        self.applier.finish()
    }
}

/// Makes what guest-init needs. Whatever the image has in its place is the image's affair.
fn make_mount_points(tree: &mut Tree) -> Result<(), Failure> {
    let unless_there = |result| match result {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(kernel_failure(errno)),
    };
    for (name, mode) in DIRECTORIES {
        unless_there(mkdirat(tree.root(), name, Mode::from_raw_mode(mode)))?;
    }
    let mut open = |path: &[u8]| CleanPath::new(path).ok().and_then(|path| tree.open(&path).ok().flatten());
    if let Some(run) = open(b"run") {
        unless_there(mkdirat(&run, OWN_DIRECTORY, Mode::from_raw_mode(0o755)))?;
    }
    let Some(etc) = open(b"etc") else { return Ok(()) };
    for name in FILES {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        unless_there(openat(&etc, name, flags, Mode::from_raw_mode(0o644)).map(drop))?;
    }
    Ok(())
}
