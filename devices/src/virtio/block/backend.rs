//! The raw files that make up a disk.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    os::{fd::AsFd, unix::fs::FileTypeExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    fs::{FallocateFlags, FlockOperation, fcntl_lock},
    io::Errno,
};
use thiserror::Error;
use vm_memory::Bytes;

use crate::virtio::{
    Memory,
    ring::section,
    transfer::{Span, Transfer},
};

/// Bytes in a sector, the unit of all addresses on a virtio disk (section 5.2.4).
pub const SECTOR_BYTES: u64 = 512;

/// Why a disk cannot be put together of its files.
#[derive(Debug, Error)]
pub enum OpenError {
    /// A file cannot be opened or measured.
    #[error("disk {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// Another process has it: one that writes excludes all others.
    #[error("disk {path} is in use by another machine")]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// A directory, or something that has no length.
    #[error("disk {path} is neither a file nor a block device")]
    Kind {
        /// What it is not.
        path: PathBuf,
    },
    /// A writable disk is one file; this many were given. A read-only one is at least one.
    #[error("a writable disk is made of one file and a read-only one of at least one, not of {0}")]
    FileCount(usize),
    /// The guest could not write the last, incomplete sector without changing the file's length.
    #[error("disk {path}: its length of {length} bytes is not a multiple of 512")]
    Length {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        length: u64,
    },
}

/// The host failed the guest's disk. The guest has been told of an I/O error; what it makes of that is its affair.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{operation} of {path} at byte {offset}: {}", io::Error::from_raw_os_error(*.errno))]
pub struct BackendFault {
    /// The host's error number; ENOSPC and EDQUOT mean that the disk which holds the file is full.
    pub errno: i32,
    /// What was tried.
    pub operation: &'static str,
    /// The file.
    pub path: PathBuf,
    /// Where in the file.
    pub offset: u64,
}

/// One file and its place on the disk.
#[derive(Debug)]
struct Extent {
    file: File,
    path: PathBuf,
    /// Where on the disk it begins, in bytes.
    start: u64,
    /// Length in bytes; on the disk it is padded with zeros to whole sectors.
    length: u64,
}

impl Extent {
    fn end(&self) -> u64 {
        self.start + self.length.next_multiple_of(SECTOR_BYTES)
    }

    fn fault(&self, operation: &'static str, offset: u64, error: &io::Error) -> BackendFault {
        let errno = error.raw_os_error().unwrap_or(libc::EIO);
        BackendFault { errno, operation, path: self.path.clone(), offset }
    }
}

/// A disk: one file that may be written, or several that may only be read, one behind another.
#[derive(Debug)]
pub struct Backend {
    extents: Vec<Extent>,
    read_only: bool,
}

/// How long the previous owner of a disk may take to let go of it: the kernel closes the files of a killed process late.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
const LOCK_POLL: Duration = Duration::from_millis(10);

/// Takes a POSIX lock on a disk's file, which the kernel drops with this process: shared to read, exclusive to write. Two
/// guests that write to one filesystem destroy it.
fn lock(file: &File, path: &Path, read_only: bool) -> Result<(), OpenError> {
    let wanted = if read_only {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match fcntl_lock(file, wanted) {
            Ok(()) => return Ok(()),
            Err(Errno::AGAIN | Errno::ACCESS) if Instant::now() < deadline => std::thread::sleep(LOCK_POLL),
            Err(Errno::AGAIN | Errno::ACCESS) => return Err(OpenError::InUse { path: path.to_path_buf() }),
            Err(errno) => return Err(OpenError::Io { path: path.to_path_buf(), source: errno.into() }),
        }
    }
}

impl Backend {
    /// Opens the files of a disk, and locks them against other machines for as long as this process lives.
    ///
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open<P: AsRef<Path>>(files: &[P], read_only: bool) -> Result<Self, OpenError> {
        if files.is_empty() || !read_only && files.len() != 1 {
            return Err(OpenError::FileCount(files.len()));
        }
        let mut extents: Vec<Extent> = Vec::with_capacity(files.len());
        for path in files {
            let path = path.as_ref().to_path_buf();
            // Asked before opening, which would wait at a pipe for its other end.
            match path.metadata() {
                Ok(found) if found.is_file() || found.file_type().is_block_device() => {}
                Ok(_) => return Err(OpenError::Kind { path }),
                Err(source) => return Err(OpenError::Io { path, source }),
            }
            let opened = File::options().read(true).write(!read_only).open(&path).and_then(|mut file| {
                let length = file.seek(SeekFrom::End(0))?;
                Ok((file, length))
            });
            let (file, length) = match opened {
                Ok(opened) => opened,
                Err(source) => return Err(OpenError::Io { path, source }),
            };
            lock(&file, &path, read_only)?;
            if !read_only && !length.is_multiple_of(SECTOR_BYTES) {
                return Err(OpenError::Length { path, length });
            }
            let start = extents.last().map_or(0, Extent::end);
            extents.push(Extent { file, path, start, length });
        }
        Ok(Backend { extents, read_only })
    }

    /// Its files once more, to look at. As long as this backend lives they must stay open: closing one lets go of the lock on it.
    ///
    /// # Errors
    /// The host gives no descriptor.
    pub fn share(&self) -> io::Result<Vec<File>> {
        self.extents.iter().map(|extent| extent.file.try_clone()).collect()
    }

    /// Whether the guest may only read.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// The disk's size in bytes, whole sectors.
    pub fn size(&self) -> u64 {
        self.extents.last().map_or(0, Extent::end)
    }

    /// Reads the disk from `offset` on into guest memory. The caller has checked that the range is on the disk.
    ///
    /// # Errors
    /// [`BackendFault`].
    pub fn read(
        &self,
        transfer: &mut Transfer,
        memory: &Memory,
        span: Span<'_>,
        offset: u64,
    ) -> Result<(), BackendFault> {
        let end = offset + span.length;
        let first = self.extents.partition_point(|extent| extent.end() <= offset);
        for extent in self.extents.iter().skip(first).take_while(|extent| extent.start < end) {
            let from = offset.max(extent.start);
            let to = end.min(extent.end());
            let in_file = to.min(extent.start + extent.length).saturating_sub(from);
            let part = Span { offset: span.offset + (from - offset), length: in_file, ..span };
            let position = from - extent.start;
            let read = transfer.read_at(extent.file.as_fd(), memory, part, position);
            let read = read.map_err(|error| extent.fault("read", position, &error))?;
            if read < in_file {
                // Somebody shortened the file below a running machine.
                return Err(extent.fault("read", position + read, &io::ErrorKind::UnexpectedEof.into()));
            }
            // What is left is the padding of an incomplete sector.
            let padding = Span { offset: part.offset + in_file, length: to - from - in_file, ..span };
            zero(memory, padding).map_err(|error| extent.fault("read", position + read, &error))?;
        }
        Ok(())
    }

    /// Writes guest memory to the disk from `offset` on. The caller has checked the range and that the disk is writable.
    ///
    /// # Errors
    /// [`BackendFault`].
    pub fn write(
        &self,
        transfer: &mut Transfer,
        memory: &Memory,
        span: Span<'_>,
        offset: u64,
    ) -> Result<(), BackendFault> {
        let Some(extent) = self.extents.first() else { return Ok(()) };
        transfer
            .write_at(extent.file.as_fd(), memory, span, offset)
            .map_err(|error| extent.fault("write", offset, &error))
    }

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// [`BackendFault`].
    pub fn flush(&self) -> Result<(), BackendFault> {
        match self.extents.first() {
            Some(extent) if !self.read_only => {
                extent.file.sync_data().map_err(|error| extent.fault("flush", 0, &error))
            }
            _ => Ok(()),
        }
    }

    /// Gives the range's storage back to the host, if its filesystem can. What the range reads as is undefined.
    ///
    /// # Errors
    /// [`BackendFault`].
    pub fn discard(&self, offset: u64, length: u64) -> Result<(), BackendFault> {
        let Some(extent) = self.extents.first() else { return Ok(()) };
        match punch(&extent.file, offset, length) {
            Err(error) if !unsupported(&error) => Err(extent.fault("discard", offset, &error)),
            _ => Ok(()),
        }
    }

    /// Makes the range read as zeros; with `unmap`, it may give back the range's storage too.
    ///
    /// # Errors
    /// [`BackendFault`].
    pub fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Result<(), BackendFault> {
        let Some(extent) = self.extents.first() else { return Ok(()) };
        let zero_range = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        let mut result = if unmap {
            punch(&extent.file, offset, length)
        } else {
            retry(|| rustix::fs::fallocate(&extent.file, zero_range, offset, length))
        };
        // tmpfs punches holes but has no zero ranges; other filesystems have neither.
        if !unmap && result.as_ref().is_err_and(unsupported) {
            result = punch(&extent.file, offset, length);
        }
        if result.as_ref().is_err_and(unsupported) {
            result = write_zero_bytes(&extent.file, offset, length);
        }
        result.map_err(|error| extent.fault("write of zeros", offset, &error))
    }
}

fn punch(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    retry(|| rustix::fs::fallocate(file, flags, offset, length))
}

fn retry(mut call: impl FnMut() -> rustix::io::Result<()>) -> io::Result<()> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

fn unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS))
}

fn write_zero_bytes(file: &File, offset: u64, length: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
    let mut done = 0;
    while done < length {
        let now = usize::try_from(length - done).unwrap_or(usize::MAX).min(ZEROS.len());
        file.write_all_at(ZEROS.get(..now).unwrap_or_default(), offset + done)?;
        done += now as u64;
    }
    Ok(())
}

/// Zeroes the span in guest memory; it is shorter than a sector.
fn zero(memory: &Memory, span: Span<'_>) -> io::Result<()> {
    const ZEROS: [u8; SECTOR_BYTES as usize] = [0; SECTOR_BYTES as usize];
    for buffer in section(span.buffers, span.offset, span.length) {
        let zeros = ZEROS.get(..buffer.length as usize).ok_or(io::ErrorKind::InvalidInput)?;
        memory.write_slice(zeros, buffer.address).map_err(|_| io::ErrorKind::InvalidInput)?;
    }
    Ok(())
}

#[cfg(test)]
impl Backend {
    /// Has the first file's I/O go to another one, to provoke the host's errors.
    pub(super) fn replace_file_for_test(&mut self, file: File) {
        self.extents[0].file = file;
    }
}
