//! Files that appear whole or not at all: lock, write, sync, rename, sync the directory.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use crate::{Error, Result};

/// Opens (creating it) and locks the draft at `path`, of which at most one process is the owner. The lock ends with the
/// process, so a draft without a lock is a dead process's. While another one owns it, waits, after `on_wait`.
/// None as soon as `done` says that the thing exists.
///
/// A draft is renamed or removed only under its lock; who waited for the lock of a file that is gone begins anew.
pub(crate) fn open_draft(
    path: &Path,
    done: &dyn Fn() -> bool,
    on_wait: &mut dyn FnMut(),
) -> Result<Option<File>> {
    loop {
        if done() {
            return Ok(None);
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(|error| Error::io("create", path, error))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                on_wait();
                lock(&file, path)?;
            }
            Err(TryLockError::Error(error)) => return Err(Error::io("lock", path, error)),
        }
        if !is_still_at(&file, path)? {
            continue;
        }
        if done() {
            remove(path)?;
            return Ok(None);
        }
        return Ok(Some(file));
    }
}

/// As [`open_draft`], for drafts that other processes write by their path: an orphan of a dead owner may be writing still, so
/// what it left is not written over but replaced by a new, empty file.
pub(crate) fn open_fresh_draft(
    path: &Path,
    done: &dyn Fn() -> bool,
    on_wait: &mut dyn FnMut(),
) -> Result<Option<File>> {
    loop {
        let Some(file) = open_draft(path, done, on_wait)? else { return Ok(None) };
        if file.metadata().map_err(|error| Error::io("stat", path, error))?.len() == 0 {
            return Ok(Some(file));
        }
        remove(path)?;
    }
}

fn lock(file: &File, path: &Path) -> Result<()> {
    loop {
        match file.lock() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result.map_err(|error| Error::io("lock", path, error)),
        }
    }
}

/// Whether the open file is the one that the path names now.
pub(crate) fn is_still_at(file: &File, path: &Path) -> Result<bool> {
    let ours = file.metadata().map_err(|error| Error::io("stat", path, error))?;
    match fs::symlink_metadata(path) {
        Ok(there) => Ok(ours.dev() == there.dev() && ours.ino() == there.ino()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("stat", path, error)),
    }
}

/// Makes the finished draft durable and gives it its name.
pub(crate) fn publish(file: &File, draft: &Path, to: &Path) -> Result<()> {
    file.sync_all().map_err(|error| Error::io("sync", draft, error))?;
    fs::rename(draft, to).map_err(|error| Error::io("rename to", to, error))?;
    sync_parent(to)
}

/// Makes a rename or removal in the directory of `path` durable.
pub(crate) fn sync_parent(path: &Path) -> Result<()> {
    let Some(parent) = path.parent() else { return Ok(()) };
    File::open(parent)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| Error::io("sync", parent, error))
}

/// Removes a file that may be gone already. Whether it was there.
pub(crate) fn remove(path: &Path) -> Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("remove", path, error)),
    }
}

/// Makes a directory and its parents, readable by their owner alone: images may be private.
pub(crate) fn make_directory(path: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|error| Error::io("create", path, error))
}

/// The files of a directory with their names; a missing directory has none.
pub(crate) fn list(directory: &Path) -> Result<Vec<(PathBuf, String)>> {
    let fail = |error| Error::io("list", directory, error);
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(fail(error)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry.map_err(fail)?;
        if let Ok(name) = entry.file_name().into_string() {
            files.push((entry.path(), name));
        }
    }
    files.sort();
    Ok(files)
}

/// Bytes that a file takes on the disk.
pub(crate) fn allocated_bytes(metadata: &fs::Metadata) -> u64 {
    metadata.blocks().saturating_mul(512)
}
