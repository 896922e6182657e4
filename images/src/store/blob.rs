//! Blobs: written under a lock, checked against their digest while they stream in.

use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};

use super::{Store, files};
use crate::{Digest, Error, Result};

/// Bytes copied at a time.
const CHUNK: usize = 256 * 1024;

/// A blob on its way into the store. Dropped unfinished, what it has stays for the next attempt to continue.
#[derive(Debug)]
pub(crate) struct BlobWriter {
    file: File,
    draft: PathBuf,
    target: PathBuf,
    wanted: Digest,
    size: u64,
    written: u64,
    hasher: Sha256,
}

impl Store {
    /// Where the blob of this digest is, or would be.
    pub(crate) fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs/sha256").join(digest.hex())
    }

    /// Whether the blob is there, at its full size.
    pub(crate) fn has_blob(&self, digest: &Digest, size: u64) -> bool {
        fs::metadata(self.blob_path(digest)).is_ok_and(|metadata| metadata.len() == size)
    }

    /// Begins to write a blob, or to continue where a dead process was. None if it is there.
    pub(crate) fn begin_blob(
        &self,
        digest: &Digest,
        size: u64,
        on_wait: &mut dyn FnMut(),
    ) -> Result<Option<BlobWriter>> {
        let draft = self.root.join("tmp").join(format!("blob-{}", digest.hex()));
        let target = self.blob_path(digest);
        let Some(file) = files::open_draft(&draft, &|| self.has_blob(digest, size), on_wait)? else {
            return Ok(None);
        };
        let mut writer =
            BlobWriter { file, draft, target, wanted: *digest, size, written: 0, hasher: Sha256::new() };
        writer.take_up()?;
        Ok(Some(writer))
    }

    /// Stores a small blob whose digest is already known to be right.
    pub(crate) fn put_blob(&self, digest: &Digest, bytes: &[u8]) -> Result<()> {
        match self.begin_blob(digest, bytes.len() as u64, &mut || {})? {
            None => Ok(()),
            Some(mut writer) => {
                writer.restart()?;
                writer.write(bytes)?;
                writer.finish()
            }
        }
    }

    /// Stores what `source` reads, which must be `size` bytes of this digest. `on_bytes` is told how far it is.
    pub(crate) fn copy_blob(
        &self,
        digest: &Digest,
        size: u64,
        source: &mut dyn Read,
        source_path: &Path,
        on_bytes: &mut dyn FnMut(u64),
    ) -> Result<()> {
        let Some(mut writer) = self.begin_blob(digest, size, &mut || {})? else { return Ok(()) };
        writer.restart()?;
        let mut buffer = vec![0; CHUNK];
        loop {
            match source.read(&mut buffer) {
                Ok(0) => return writer.finish(),
                Ok(count) => {
                    writer.write(buffer.get(..count).unwrap_or_default())?;
                    on_bytes(writer.written());
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io("read", source_path, error)),
            }
        }
    }

    /// Reads a blob that is a document, at most `limit` bytes, and checks it: its file may have been touched.
    pub(crate) fn read_blob(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>> {
        let path = self.blob_path(digest);
        let fail = |error| Error::io("read", &path, error);
        let mut bytes = Vec::new();
        File::open(&path).map_err(fail)?.take(limit).read_to_end(&mut bytes).map_err(fail)?;
        let got = Digest::of(&bytes);
        if got == *digest {
            return Ok(bytes);
        }
        Err(Error::DigestMismatch { what: path.display().to_string(), wanted: *digest, got })
    }
}

impl BlobWriter {
    /// Hashes what an earlier attempt left, so that only the rest must be fetched.
    fn take_up(&mut self) -> Result<()> {
        let mut buffer = vec![0; CHUNK];
        let left = self.file.metadata().map_err(|error| Error::io("stat", &self.draft, error))?.len();
        if left > self.size {
            return self.restart();
        }
        loop {
            match self.file.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => {
                    self.hasher.update(buffer.get(..count).unwrap_or_default());
                    self.written += count as u64;
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io("read", &self.draft, error)),
            }
        }
    }

    /// Bytes there so far.
    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    /// Forgets what is there.
    pub(crate) fn restart(&mut self) -> Result<()> {
        let fail = |error| Error::io("truncate", &self.draft, error);
        self.file.set_len(0).map_err(fail)?;
        self.file.seek(SeekFrom::Start(0)).map_err(fail)?;
        self.hasher = Sha256::new();
        self.written = 0;
        Ok(())
    }

    /// Appends bytes. More than announced are refused before they are written.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let total = self.written.saturating_add(bytes.len() as u64);
        if total > self.size {
            self.restart()?;
            return Err(Error::SizeMismatch { what: self.what(), wanted: self.size, got: total });
        }
        self.file.write_all(bytes).map_err(|error| Error::io("write", &self.draft, error))?;
        self.hasher.update(bytes);
        self.written = total;
        Ok(())
    }

    /// Checks size and digest and puts the blob into its place. A wrong one is removed, a short one stays.
    pub(crate) fn finish(self) -> Result<()> {
        if self.written != self.size {
            return Err(Error::SizeMismatch { what: self.what(), wanted: self.size, got: self.written });
        }
        let got = Digest::from_bytes(self.hasher.clone().finalize().into());
        if got != self.wanted {
            files::remove(&self.draft)?;
            return Err(Error::DigestMismatch { what: self.what(), wanted: self.wanted, got });
        }
        let read_only = rustix::fs::Mode::from_raw_mode(0o400);
        rustix::fs::fchmod(&self.file, read_only)
            .map_err(|error| Error::io("chmod", &self.draft, error.into()))?;
        files::publish(&self.file, &self.draft, &self.target)
    }

    fn what(&self) -> String {
        format!("the blob {}", self.wanted)
    }
}
