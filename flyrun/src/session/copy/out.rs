//! A copy out of a machine into a directory of the host. The machine may be hostile: nothing is written anywhere but
//! below the place the user named, and no symbolic link below it is ever followed.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use protocol::session::{CopyEntry, EntryKind, Request};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, chownat, fchmod, fchown,
    futimens, linkat, mkdirat, open, openat, openat2, statat, symlinkat, unlinkat,
};
use rustix::io::Errno;

use super::{Entries, Found, Place};
use crate::error::{Context, Error, Result};
use crate::session::{Link, printable};

/// Copies what is at `source` in the machine to `destination` on the host. With `keep_owner`, owner, group and the
/// set-id bits are kept; otherwise the caller owns it all.
///
/// # Errors
/// The machine fails, the host refuses, or what comes may not be.
pub fn copy_out(
    link: &Link,
    source: &str,
    follow_link: bool,
    destination: &str,
    keep_owner: bool,
) -> Result<()> {
    link.request(&Request::CopyOut { path: source.to_string(), follow_link })?;
    let mut entries = Entries::new(link);
    let mut target = None;
    while let Some(entry) = entries.next()? {
        let target = match &mut target {
            Some(target) => target,
            None => {
                let is_directory = entry.kind == EntryKind::Directory;
                let place = Place::decide(source, is_directory, destination, found(destination)?)?;
                target.insert(Target::open(&place, keep_owner)?)
            }
        };
        target.take(&entry, &mut entries)?;
    }
    target.map_or(Ok(()), Target::finish)
}

fn found(path: &str) -> Result<Found> {
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Ok(Found::Directory),
        Ok(_) => Ok(Found::Other),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Found::Nothing),
        Err(error) => Err(Error::caused(format!("cannot use {path}"), &error)),
    }
}

/// Where entries are put.
struct Target {
    root: OwnedFd,
    shown: PathBuf,
    name: Option<PathBuf>,
    keep_owner: bool,
    /// Directories that were made, with what they get at the end: until then they must be writable.
    made: Vec<(PathBuf, CopyEntry)>,
}

impl Target {
    fn open(place: &Place, keep_owner: bool) -> Result<Target> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = open(place.directory.as_str(), flags, Mode::empty())
            .context(format!("cannot use the directory {}", place.directory))?;
        let (shown, name) = (PathBuf::from(&place.directory), place.name.as_ref().map(PathBuf::from));
        Ok(Target { root, shown, name, keep_owner, made: Vec::new() })
    }

    fn take(&mut self, entry: &CopyEntry, content: &mut Entries) -> Result<()> {
        let Some(path) = self.path(&entry.path) else { return Ok(()) };
        let shown = self.shown.join(&path);
        let told = || format!("cannot write {}", printable(&shown.to_string_lossy()));
        let (parent, name) = self.parent(&path).context(told())?;
        match &entry.kind {
            EntryKind::Directory => {
                if make_directory(&parent, name).context(told())? {
                    self.made.push((path, entry.clone()));
                }
                Ok(())
            }
            EntryKind::File { .. } => self.file(&parent, name, entry, content, &told()),
            EntryKind::Symlink { target } => {
                replacing(&parent, name, || symlinkat(OsStr::from_bytes(target), &parent, name))
                    .context(told())?;
                self.own(&parent, name, entry).context(told())
            }
            EntryKind::HardLink { target } => {
                let target = self.path(target).ok_or_else(|| Error::new(told()))?;
                let (target_parent, target_name) = self.parent(&target).context(told())?;
                replacing(&parent, name, || {
                    linkat(&target_parent, target_name, &parent, name, AtFlags::empty())
                })
                .context(told())
            }
            EntryKind::Special => {
                anstream::eprintln!(
                    "flyrun: left out {}, which is no file, directory or link",
                    printable(&shown.to_string_lossy())
                );
                Ok(())
            }
        }
    }

    /// Where an entry goes, below the root; `None` for the root itself.
    fn path(&self, path: &[u8]) -> Option<PathBuf> {
        let below = Path::new(OsStr::from_bytes(path));
        match (&self.name, path.is_empty()) {
            (Some(name), true) => Some(name.clone()),
            (Some(name), false) => Some(name.join(below)),
            (None, true) => None,
            (None, false) => Some(below.to_path_buf()),
        }
    }

    /// The directory of an entry, reached without any link, and the entry's name there.
    fn parent<'a>(&self, path: &'a Path) -> rustix::io::Result<(OwnedFd, &'a OsStr)> {
        let name = path.file_name().ok_or(Errno::INVAL)?;
        let above = path.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Ok((self.below(above, OFlags::PATH | OFlags::DIRECTORY)?, name))
    }

    fn below(&self, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        openat2(&self.root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
    }

    fn file(
        &self,
        parent: &OwnedFd,
        name: &OsStr,
        entry: &CopyEntry,
        content: &mut Entries,
        told: &str,
    ) -> Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let private = Mode::from_raw_mode(0o600);
        let file = replacing(parent, name, || openat(parent, name, flags, private)).context(told)?;
        let mut file = File::from(file);
        io::copy(content, &mut file).context(told)?;
        if self.keep_owner {
            fchown(&file, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid))).context(told)?;
        }
        fchmod(&file, self.mode(entry)).context(told)?;
        futimens(&file, &times(entry)).context(told)
    }

    /// A program that runs with its owner's rights is not made by a machine's word alone.
    fn mode(&self, entry: &CopyEntry) -> Mode {
        Mode::from_raw_mode(entry.mode & if self.keep_owner { 0o7777 } else { 0o777 })
    }

    fn own(&self, parent: &OwnedFd, name: &OsStr, entry: &CopyEntry) -> rustix::io::Result<()> {
        if !self.keep_owner {
            return Ok(());
        }
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
    }

    /// Gives the directories their owners, modes and times, the deepest first.
    fn finish(self) -> Result<()> {
        for (path, entry) in self.made.iter().rev() {
            let finish = || -> rustix::io::Result<()> {
                let directory = self.below(path, OFlags::RDONLY | OFlags::DIRECTORY)?;
                if self.keep_owner {
                    fchown(&directory, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)))?;
                }
                fchmod(&directory, self.mode(entry))?;
                futimens(&directory, &times(entry))
            };
            finish().context(format!("cannot write {}", self.shown.join(path).display()))?;
        }
        Ok(())
    }
}

fn times(entry: &CopyEntry) -> Timestamps {
    let time = Timespec { tv_sec: entry.mtime, tv_nsec: 0 };
    Timestamps { last_access: time, last_modification: time }
}

/// Whether it was made; a directory that is there stays as it is.
fn make_directory(parent: &OwnedFd, name: &OsStr) -> rustix::io::Result<bool> {
    match mkdirat(parent, name, Mode::from_raw_mode(0o700)) {
        Ok(()) => Ok(true),
        Err(Errno::EXIST) if is_directory(parent, name)? => Ok(false),
        Err(errno) => Err(errno),
    }
}

fn is_directory(parent: &OwnedFd, name: &OsStr) -> rustix::io::Result<bool> {
    let stat = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

/// Makes something in the place of what is there, unless that is a directory.
fn replacing<T>(
    parent: &OwnedFd,
    name: &OsStr,
    mut make: impl FnMut() -> rustix::io::Result<T>,
) -> rustix::io::Result<T> {
    match make() {
        Err(Errno::EXIST) if is_directory(parent, name)? => Err(Errno::ISDIR),
        Err(Errno::EXIST) => {
            unlinkat(parent, name, AtFlags::empty())?;
            make()
        }
        other => other,
    }
}
