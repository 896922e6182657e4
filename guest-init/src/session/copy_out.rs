//! A copy out of the machine: what is at a path, entry by entry.

use std::{
    collections::HashMap,
    fs::{File, Metadata},
    io::{self, Read},
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

use protocol::{
    ExitStatus, FailureKind,
    session::{CopyEntry, EntryKind, FromSession, MAX_CHUNK},
};
use rustix::fs::{CWD, Mode, OFlags, openat};

use super::helper::Peer;
use crate::failure::Failure;

/// Sends the file or directory and everything below it. Other filesystems in it are copied too.
///
/// # Errors
/// [`Failure`] naming the path.
pub fn send(path: &Path, follow_link: bool, peer: &mut Peer) -> Result<(), Failure> {
    peer.send(&FromSession::Started { pid: std::process::id() })?;
    let mut walk = Walk { root: path, links: HashMap::new(), peer };
    let metadata = if follow_link { path.metadata() } else { path.symlink_metadata() };
    let metadata = metadata.map_err(|error| at(path, &error))?;
    // Depth first, but not by recursion: the machine decides on the depth.
    let mut waiting = Vec::new();
    if walk.entry(Path::new(""), &metadata)? {
        waiting.push(PathBuf::new());
    }
    while let Some(directory) = waiting.pop() {
        walk.directory(&directory, &mut waiting)?;
    }
    peer.send(&FromSession::Exited(ExitStatus::Code(0)))
}

struct Walk<'a> {
    root: &'a Path,
    /// Files of several names that were sent, by device and inode.
    links: HashMap<(u64, u64), PathBuf>,
    peer: &'a mut Peer,
}

impl Walk<'_> {
    fn directory(&mut self, directory: &Path, waiting: &mut Vec<PathBuf>) -> Result<(), Failure> {
        let whole = self.whole(directory);
        for entry in whole.read_dir().map_err(|error| at(&whole, &error))? {
            let name = entry.map_err(|error| at(&whole, &error))?.file_name();
            let path = directory.join(name);
            match self.whole(&path).symlink_metadata() {
                Ok(metadata) => {
                    if self.entry(&path, &metadata)? {
                        waiting.push(path);
                    }
                }
                // Removed meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(at(&self.whole(&path), &error)),
            }
        }
        Ok(())
    }

    /// Where an entry is. Joining an empty path would add a slash, and so follow a link.
    fn whole(&self, path: &Path) -> PathBuf {
        if path.as_os_str().is_empty() { self.root.to_path_buf() } else { self.root.join(path) }
    }

    /// Sends one entry; whether it is a directory.
    fn entry(&mut self, path: &Path, metadata: &Metadata) -> Result<bool, Failure> {
        let whole = self.whole(path);
        let mut content = None;
        let kind = if metadata.is_dir() {
            EntryKind::Directory
        } else if metadata.is_symlink() {
            let target = whole.read_link().map_err(|error| at(&whole, &error))?;
            EntryKind::Symlink { target: target.as_os_str().as_bytes().to_vec() }
        } else if metadata.is_file() {
            match self.earlier_name(path, metadata) {
                Some(target) => EntryKind::HardLink { target },
                None => {
                    content = Some(open(&whole).map_err(|error| at(&whole, &error))?);
                    EntryKind::File { size: metadata.len() }
                }
            }
        } else {
            EntryKind::Special
        };
        self.peer.send(&FromSession::Entry(Box::new(CopyEntry {
            path: path.as_os_str().as_bytes().to_vec(),
            kind,
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid(),
            gid: metadata.gid(),
            mtime: metadata.mtime(),
        })))?;
        if let Some(file) = content {
            self.content(file, metadata.len()).map_err(|error| at(&whole, &error))?;
        }
        Ok(metadata.is_dir())
    }

    fn earlier_name(&mut self, path: &Path, metadata: &Metadata) -> Option<Vec<u8>> {
        if metadata.nlink() < 2 {
            return None;
        }
        let earlier = self.links.insert((metadata.dev(), metadata.ino()), path.to_path_buf())?;
        Some(earlier.into_os_string().as_bytes().to_vec())
    }

    /// Sends exactly `size` bytes: of a file that grows meanwhile no more, of one that shrinks zeros.
    fn content(&mut self, mut file: File, size: u64) -> io::Result<()> {
        let mut left = size;
        while left > 0 {
            let mut chunk = vec![0; usize::try_from(left).unwrap_or(MAX_CHUNK).min(MAX_CHUNK)];
            let count = match file.read(&mut chunk) {
                Ok(0) => chunk.len(),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            chunk.truncate(count);
            left -= count as u64;
            self.peer.send(&FromSession::Stdout(chunk)).map_err(io::Error::other)?;
        }
        Ok(())
    }
}

fn open(path: &Path) -> io::Result<File> {
    // What was a file may be a pipe by now, and opening that would wait.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    Ok(File::from(openat(CWD, path, flags, Mode::empty())?))
}

fn at(path: &Path, error: &dyn std::fmt::Display) -> Failure {
    Failure::new(FailureKind::Setup, format!("{}: {error}", path.display()))
}
