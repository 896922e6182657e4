//! The store: content-addressed blobs, the images that are made of them, and their unpacked root filesystems.

use std::{
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use serde::Serialize;

pub(crate) use self::record::Record;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use self::record::fuzz_record;
pub use self::{
    rootfs::{RootfsDraft, RootfsLease, RootfsSlot},
    sweep::{PruneOptions, PruneReport, RemoveReport},
};
use crate::{Digest, Error, Image, Reference, Result, local};

mod blob;
pub(crate) mod files;
mod record;
mod rootfs;
mod sweep;

pub(crate) use self::blob::BlobWriter;

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

impl Store {
    /// Opens the store at `root`. Touches nothing: what is missing is made by the first thing that writes.
    pub fn open(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The image, if it is in the store as the source has it: no request to a registry, one small file read. An image
    /// whose layout, archive or docker daemon has another one meanwhile is none (if those are gone, the store's is the last),
    /// and so is one that cannot be started any more because its blobs and its root filesystem are gone.
    ///
    /// # Errors
    /// What goes wrong with files.
    pub fn find(&self, reference: &Reference) -> Result<Option<Image>> {
        let Some(record) = self.read_record(&reference.canonical_name())? else { return Ok(None) };
        // A source that is gone cannot have changed.
        if let Some(stamp) = local::stamp(reference)
            && record.stamp != Some(stamp)
        {
            return Ok(None);
        }
        let whole = self.rootfs(&record.chain_id).is_some()
            || record.layers.iter().all(|layer| self.has_blob(&layer.digest, layer.size));
        Ok(whole.then(|| record.into_image(self)))
    }

    /// All images, by name.
    ///
    /// # Errors
    /// What goes wrong with files.
    pub fn list(&self) -> Result<Vec<ImageSummary>> {
        let records = self.records()?.into_iter().map(|(_, record)| record);
        Ok(records.map(|record| self.summary(record)).collect())
    }

    fn summary(&self, record: Record) -> ImageSummary {
        let rootfs = fs::metadata(self.rootfs_path(&record.chain_id)).ok();
        ImageSummary {
            manifest_digest: record.manifest_digest,
            config_digest: record.config_digest,
            chain_id: record.chain_id,
            platform: format!("{}/{}", record.config.os, record.config.architecture),
            created: record.config.created,
            pulled_unix_s: record.pulled_unix_s,
            layers: record.layers.len(),
            layer_bytes: record.layers.iter().fold(0, |sum, layer| sum.saturating_add(layer.size)),
            rootfs_bytes: rootfs.as_ref().map(files::allocated_bytes),
            in_use: rootfs.is_some() && self.is_rootfs_held(&record.chain_id),
            name: record.name,
        }
    }

    /// Gives the image its name in the store: from now on it is found.
    pub(crate) fn admit(&self, image: &Image, other_blobs: Vec<Digest>, stamp: Option<String>) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.write_record(&Record::new(image, other_blobs, stamp, now.as_secs()))
    }

    /// Makes the directories, all that a store consists of in the beginning.
    pub(crate) fn make_layout(&self) -> Result<()> {
        let directories = ["blobs/sha256", "refs", "rootfs", "templates", "tmp"];
        directories.iter().try_for_each(|name| {
            let path = self.root.join(name);
            if path.is_dir() { Ok(()) } else { files::make_directory(&path) }
        })
    }

    /// Keeps blobs that no image refers to yet from being removed. Everything that adds an image holds it.
    pub(crate) fn lock_for_adding(&self) -> Result<File> {
        self.make_layout()?;
        let (path, file) = self.open_lock()?;
        file.lock_shared().map_err(|error| Error::io("lock", path, error))?;
        Ok(file)
    }

    /// Keeps everybody from adding an image; none while somebody does.
    fn lock_for_removing(&self) -> Result<Option<File>> {
        self.make_layout()?;
        let (path, file) = self.open_lock()?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(Error::io("lock", path, error)),
        }
    }

    fn open_lock(&self) -> Result<(PathBuf, File)> {
        let path = self.root.join("blobs/lock");
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        file.map(|file| (path.clone(), file)).map_err(|error| Error::io("create", path, error))
    }
}
