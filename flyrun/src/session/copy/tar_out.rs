//! A copy out of a machine as a tar.

use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use protocol::session::{EntryKind, Request};
use tar::{Builder, EntryType, Header};

use super::{Entries, Found, Place};
use crate::error::{Context, Error, Result};
use crate::session::{Link, printable};

/// Writes what is at `source` in the machine as a tar, whose names begin with the source's own.
///
/// # Errors
/// The machine fails, or the output cannot be written.
pub fn copy_out_tar(link: &Link, source: &str, follow_link: bool, output: impl Write) -> Result<()> {
    link.request(&Request::CopyOut { path: source.to_string(), follow_link })?;
    let mut entries = Entries::new(link);
    let mut tar = Builder::new(output);
    let mut top = None;
    while let Some(entry) = entries.next()? {
        let top = match &top {
            Some(top) => top,
            None => {
                let is_directory = entry.kind == EntryKind::Directory;
                let place = Place::decide(source, is_directory, ".", Found::Directory)?;
                top.insert(PathBuf::from(place.name.unwrap_or_else(|| ".".into())))
            }
        };
        let name = join(top, &entry.path);
        let mut header = Header::new_gnu();
        header.set_mode(entry.mode);
        header.set_uid(entry.uid.into());
        header.set_gid(entry.gid.into());
        header.set_mtime(u64::try_from(entry.mtime).unwrap_or(0));
        header.set_size(0);
        let written = match &entry.kind {
            EntryKind::Directory => {
                header.set_entry_type(EntryType::Directory);
                tar.append_data(&mut header, name, io::empty())
            }
            EntryKind::File { size } => {
                header.set_entry_type(EntryType::Regular);
                header.set_size(*size);
                tar.append_data(&mut header, name, entries.by_ref().take(*size))
            }
            EntryKind::Symlink { target } => {
                header.set_entry_type(EntryType::Symlink);
                tar.append_link(&mut header, name, OsStr::from_bytes(target))
            }
            EntryKind::HardLink { target } => {
                header.set_entry_type(EntryType::Link);
                tar.append_link(&mut header, name, join(top, target))
            }
            EntryKind::Special => {
                anstream::eprintln!(
                    "flyrun: left out {}, which is no file, directory or link",
                    printable(&name.to_string_lossy())
                );
                Ok(())
            }
        };
        match written {
            // A reader that has left, as `head` does.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            other => other.context("cannot write the tar")?,
        }
    }
    let finished = tar.into_inner().and_then(|mut output| output.flush());
    finished.map_err(|error| Error::caused("cannot write the tar", &error))
}

fn join(top: &Path, path: &[u8]) -> PathBuf {
    if path.is_empty() { top.to_path_buf() } else { top.join(OsStr::from_bytes(path)) }
}
