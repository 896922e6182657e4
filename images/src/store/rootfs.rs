//! Unpacked root filesystems: made by one process, used by many, held while a machine runs.

use std::{
    fs::{File, TryLockError},
    io,
    path::{Path, PathBuf},
};

use super::{Store, files};
use crate::{Digest, Error, Event, Progress, Result, TemplateKind};

/// The answer of [`Store::begin_rootfs`].
#[derive(Debug)]
pub enum RootfsSlot {
    /// It is there; perhaps another process has just made it.
    Ready(RootfsLease),
    /// This process is to make it.
    Draft(RootfsDraft),
}

/// A root filesystem in the making: an empty file that nobody else sees, until [`RootfsDraft::format`].
/// Dropped without [`RootfsDraft::commit`], it is removed.
#[derive(Debug)]
pub struct RootfsDraft {
    file: File,
    draft: PathBuf,
    target: PathBuf,
    committed: bool,
}

/// Keeps a root filesystem in the store for as long as it lives, in whichever process holds its file descriptor.
#[derive(Debug)]
pub struct RootfsLease {
    path: PathBuf,
    file: File,
}

impl Store {
    pub(crate) fn rootfs_path(&self, chain_id: &Digest) -> PathBuf {
        self.root.join("rootfs").join(format!("{}.ext4", chain_id.hex()))
    }

    /// The unpacked root filesystem of this chain id, if there is one. It may be pruned the next moment: to boot from
    /// it use [`Store::hold_rootfs`].
    pub fn rootfs(&self, chain_id: &Digest) -> Option<PathBuf> {
        let path = self.rootfs_path(chain_id);
        path.exists().then_some(path)
    }

    /// Keeps the root filesystem from being removed; none if there is none.
    ///
    /// # Errors
    /// What goes wrong with files.
    pub fn hold_rootfs(&self, chain_id: &Digest) -> Result<Option<RootfsLease>> {
        let path = self.rootfs_path(chain_id);
        loop {
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(Error::io("open", path, error)),
            };
            match file.lock_shared() {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Error::io("lock", path, error)),
            }
            // Whoever removes it does so under an exclusive lock: it may be gone by the time ours is granted.
            if files::is_still_at(&file, &path)? {
                return Ok(Some(RootfsLease { path, file }));
            }
        }
    }

    /// Begins to make the root filesystem of this chain id. While another process is at it, waits for that one
    /// (after telling `progress`).
    ///
    /// # Errors
    /// What goes wrong with files.
    pub fn begin_rootfs(&self, chain_id: &Digest, progress: &dyn Progress) -> Result<RootfsSlot> {
        self.make_layout()?;
        let target = self.rootfs_path(chain_id);
        let draft = self.root.join("tmp").join(format!("rootfs-{}", chain_id.hex()));
        loop {
            if let Some(lease) = self.hold_rootfs(chain_id)? {
                return Ok(RootfsSlot::Ready(lease));
            }
            let mut on_wait = || progress.event(Event::Waiting { digest: *chain_id });
            let Some(file) = files::open_fresh_draft(&draft, &|| target.exists(), &mut on_wait)? else {
                continue;
            };
            return Ok(RootfsSlot::Draft(RootfsDraft { file, draft, target, committed: false }));
        }
    }

    /// Takes a file of this filesystem, a whole root filesystem, into the store under this id; its time of change stays. If there is one
    /// of the id already, that is held, and the file left where it is.
    ///
    /// # Errors
    /// What goes wrong with files.
    pub fn adopt_rootfs(&self, id: &Digest, path: &Path) -> Result<RootfsLease> {
        self.make_layout()?;
        if let Some(lease) = self.hold_rootfs(id)? {
            return Ok(lease);
        }
        let target = self.rootfs_path(id);
        let file = File::open(path).map_err(|error| Error::io("open", path, error))?;
        // Before it has its place, so that nobody removes it there.
        file.lock_shared().map_err(|error| Error::io("lock", path, error))?;
        let read_only = rustix::fs::Mode::from_raw_mode(0o400);
        rustix::fs::fchmod(&file, read_only).map_err(|error| Error::io("chmod", path, error.into()))?;
        files::publish(&file, path, &target)?;
        Ok(RootfsLease { path: target, file })
    }

    /// Removes a root filesystem unless a machine holds it. Whether it did, and the bytes freed.
    pub(crate) fn remove_rootfs(&self, chain_id: &Digest) -> Result<Removal> {
        let path = self.rootfs_path(chain_id);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Removal::Absent),
            Err(error) => return Err(Error::io("open", path, error)),
        };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(Removal::Held),
            Err(TryLockError::Error(error)) => return Err(Error::io("lock", path, error)),
        }
        let metadata = file.metadata().map_err(|error| Error::io("stat", &path, error))?;
        // Not ours to remove if another process has removed it and made a new one meanwhile.
        if !files::is_still_at(&file, &path)? || !files::remove(&path)? {
            return Ok(Removal::Absent);
        }
        Ok(Removal::Removed { bytes: files::allocated_bytes(&metadata) })
    }

    /// Whether a machine holds the root filesystem right now.
    pub(crate) fn is_rootfs_held(&self, chain_id: &Digest) -> bool {
        File::open(self.rootfs_path(chain_id))
            .is_ok_and(|file| matches!(file.try_lock(), Err(TryLockError::WouldBlock)))
    }
}

/// What became of a root filesystem that was to be removed.
pub(crate) enum Removal {
    Absent,
    Held,
    Removed { bytes: u64 },
}

impl RootfsDraft {
    /// Makes it an empty ext4 of that many bytes, whatever it was.
    ///
    /// # Errors
    /// What goes wrong with files and the template.
    pub fn format(&self, store: &Store, bytes: u64) -> Result<()> {
        self.file.set_len(0).map_err(|error| Error::io("empty", &self.draft, error))?;
        store.fill_from_template(TemplateKind::Rootfs, bytes, &self.file, &self.draft)
    }

    /// The file to unpack into.
    pub fn path(&self) -> &Path {
        &self.draft
    }

    /// Makes it durable and read-only and gives it its place in the store. Nobody may write to it any more.
    ///
    /// # Errors
    /// What goes wrong with files; the draft is removed then.
    pub fn commit(mut self) -> Result<RootfsLease> {
        let read_only = rustix::fs::Mode::from_raw_mode(0o400);
        rustix::fs::fchmod(&self.file, read_only)
            .map_err(|error| Error::io("chmod", &self.draft, error.into()))?;
        files::publish(&self.file, &self.draft, &self.target)?;
        self.committed = true;
        // A descriptor open for writing would keep the lease's holder from treating the file as sealed.
        let file = File::open(&self.target).map_err(|error| Error::io("open", &self.target, error))?;
        let path = self.target.clone();
        // The draft's exclusive lock stands in the way of the lease's shared one, even in this process. It becomes a
        // shared one first, so that there is no moment without a lock.
        let lock = |file: &File| file.lock_shared().map_err(|error| Error::io("lock", &path, error));
        lock(&self.file)?;
        lock(&file)?;
        Ok(RootfsLease { path, file })
    }
}

impl Drop for RootfsDraft {
    fn drop(&mut self) {
        if !self.committed {
            // Nothing is lost if this fails: prune removes it, or the next attempt overwrites it.
            let _ = files::remove(&self.draft);
        }
    }
}

impl RootfsLease {
    /// The root filesystem's file; open it read-only.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The descriptor whose lock is the lease. A child process that inherits it holds the lease too.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The same, given away.
    pub fn into_file(self) -> File {
        self.file
    }
}
