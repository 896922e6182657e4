//! Copies between the host and a machine.
//!
//! Into a machine goes a tar, which is unpacked by the code that unpacks images. Out of it come entries of the
//! protocol, of which [`out`] trusts nothing: a machine may be hostile, and writes nowhere but below the place that
//! the user named.

mod into;
mod out;
mod place;
mod tar_out;

pub use into::{copy_in, copy_in_tar};
pub use out::copy_out;
pub use place::{Found, Place};
pub use tar_out::copy_out_tar;

use std::io::{self, Read};

use protocol::ExitStatus;
use protocol::session::{CopyEntry, EntryKind, FromSession};

use super::link::Frames;
use super::{Link, failure, unasked};
use crate::error::{Context, Error, Result};

/// The longest path of Linux.
const MAX_PATH_BYTES: usize = 4095;

/// The entries of a copy out of a machine, checked as far as that is possible without a filesystem.
struct Entries {
    frames: Frames,
    /// Content of the current entry that has not been read.
    left: u64,
    chunk: Vec<u8>,
    at: usize,
    /// Whether the first entry has come, and whether it was a directory.
    first: Option<bool>,
}

impl Entries {
    fn new(link: &Link) -> Entries {
        Entries { frames: link.frames(), left: 0, chunk: Vec::new(), at: 0, first: None }
    }

    /// The next entry, behind the content of the one before; `None` when all is copied.
    fn next(&mut self) -> Result<Option<CopyEntry>> {
        io::copy(self, &mut io::sink()).context("lost the machine")?;
        loop {
            match self.frames.next().context("lost the machine")? {
                Some(FromSession::Started { .. }) => {}
                Some(FromSession::Entry(entry)) => {
                    check(&entry, self.first)?;
                    self.first.get_or_insert(entry.kind == EntryKind::Directory);
                    if let EntryKind::File { size } = entry.kind {
                        self.left = size;
                    }
                    return Ok(Some(*entry));
                }
                Some(FromSession::Exited(ExitStatus::Code(0))) if self.first.is_some() => return Ok(None),
                Some(FromSession::Failed { kind, message }) => return Err(failure(kind, message)),
                Some(_) => return Err(unasked()),
                None => return Err(Error::new("the machine ended before the copy was whole")),
            }
        }
    }
}

/// The content of the current entry.
impl Read for Entries {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.left > 0 && self.at == self.chunk.len() {
            match self.frames.next().map_err(io::Error::other)? {
                Some(FromSession::Stdout(chunk)) if chunk.len() as u64 <= self.left => {
                    (self.chunk, self.at) = (chunk, 0);
                }
                Some(FromSession::Failed { message, .. }) => return Err(io::Error::other(message)),
                Some(_) => return Err(io::Error::other(unasked())),
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
        let rest = self.chunk.get(self.at..).unwrap_or_default();
        let count = rest.len().min(buffer.len());
        if let (Some(place), Some(rest)) = (buffer.get_mut(..count), rest.get(..count)) {
            place.copy_from_slice(rest);
        }
        self.at += count;
        self.left = self.left.saturating_sub(count as u64);
        Ok(count)
    }
}

/// The first entry is the thing itself, and only a directory has others, below it.
fn check(entry: &CopyEntry, first: Option<bool>) -> Result<()> {
    let good = match (&entry.kind, first) {
        (_, Some(false)) => false,
        (EntryKind::HardLink { target }, Some(true)) => is_below(&entry.path) && is_below(target),
        (EntryKind::HardLink { .. }, None) => false,
        (_, None) => entry.path.is_empty(),
        (_, Some(true)) => is_below(&entry.path),
    };
    if good {
        return Ok(());
    }
    let shown = String::from_utf8_lossy(&entry.path).escape_debug().take(200).collect::<String>();
    Err(Error::new(format!("the machine sends an entry that may not be: '{shown}'")))
}

/// Whether a path names something below where it starts, without any detour.
fn is_below(path: &[u8]) -> bool {
    path.len() <= MAX_PATH_BYTES
        && path
            .split(|byte| *byte == b'/')
            .all(|part| !matches!(part, b"" | b"." | b"..") && !part.contains(&0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &[u8], kind: EntryKind) -> CopyEntry {
        CopyEntry { path: path.to_vec(), kind, mode: 0o644, uid: 0, gid: 0, mtime: 0 }
    }

    #[test]
    fn paths_that_lead_anywhere_else_are_refused() {
        for path in [&b"/etc/passwd"[..], b"..", b"a/../../b", b"a//b", b"a/", b".", b"a/./b", b"a\0b", b""] {
            assert!(check(&entry(path, EntryKind::Directory), Some(true)).is_err(), "{path:?}");
            let link = EntryKind::HardLink { target: path.to_vec() };
            assert!(check(&entry(b"a", link), Some(true)).is_err(), "{path:?}");
        }
        for path in [&b"a"[..], b"a/b", b"..a", b"a../...", b"\xff"] {
            assert!(check(&entry(path, EntryKind::Directory), Some(true)).is_ok(), "{path:?}");
        }
    }

    #[test]
    fn only_a_directory_has_entries_below_it_and_there_is_one_first_entry() {
        assert!(check(&entry(b"", EntryKind::File { size: 1 }), None).is_ok());
        assert!(check(&entry(b"a", EntryKind::File { size: 1 }), None).is_err());
        assert!(check(&entry(b"a", EntryKind::File { size: 1 }), Some(false)).is_err());
        assert!(check(&entry(b"", EntryKind::File { size: 1 }), Some(true)).is_err());
    }
}
