//! I/O between files and guest memory without a copy in between.
//!
//! All of the crate's raw pointers into guest memory are in this file. They live for one system call.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use vm_memory::{GuestMemory, Permissions, bitmap::Bitmap};

use super::{
    Memory,
    ring::{Buffer, section},
};

/// The most entries that one vectored system call takes (IOV_MAX).
const MAX_IOVECS: usize = 1024;

/// Which way bytes go, as the host's kernel sees guest memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    /// A file is read; guest memory is written.
    IntoGuest,
    /// Guest memory is read; a file is written.
    OutOfGuest,
}

/// Some bytes of a list of buffers.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a> {
    /// The buffers, as they come out of a checked chain.
    pub buffers: &'a [Buffer],
    /// How many bytes of them to leave out at the beginning.
    pub offset: u64,
    /// The number of bytes.
    pub length: u64,
}

/// Does vectored I/O; keeps its list of vectors from call to call.
#[derive(Default)]
pub struct Transfer {
    iovecs: Vec<libc::iovec>,
}

// SAFETY: the list is empty outside of the methods, so no pointer moves to another thread with it.
unsafe impl Send for Transfer {}

impl Transfer {
    /// Reads the file from `position` on into the span; returns the number of bytes, less than the span has only at the
    /// end of the file.
    ///
    /// # Errors
    /// The host's, and `InvalidInput` when the span is not in guest memory.
    pub fn read_at(
        &mut self,
        file: BorrowedFd<'_>,
        memory: &Memory,
        span: Span<'_>,
        position: u64,
    ) -> io::Result<u64> {
        self.positioned(file, memory, span, position, Direction::IntoGuest)
    }

    /// Writes the span to the file from `position` on; all of it, or fails.
    ///
    /// # Errors
    /// As [`Transfer::read_at`], and `WriteZero` when the file takes no more.
    pub fn write_at(
        &mut self,
        file: BorrowedFd<'_>,
        memory: &Memory,
        span: Span<'_>,
        position: u64,
    ) -> io::Result<()> {
        let written = self.positioned(file, memory, span, position, Direction::OutOfGuest)?;
        if written == span.length { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    fn positioned(
        &mut self,
        file: BorrowedFd<'_>,
        memory: &Memory,
        span: Span<'_>,
        position: u64,
        direction: Direction,
    ) -> io::Result<u64> {
        let mut done = 0;
        while done < span.length {
            let rest = Span { offset: span.offset + done, length: span.length - done, ..span };
            let position = libc::off_t::try_from(position + done).map_err(|_| io::ErrorKind::InvalidInput)?;
            let moved = self.with_iovecs(memory, rest, direction, |iovecs, count| match direction {
                // SAFETY: the vectors are ranges of guest memory, which `memory` keeps mapped during the call. The guest
                // may change the bytes meanwhile; no Rust reference to them exists.
                Direction::IntoGuest => unsafe { libc::preadv(file.as_raw_fd(), iovecs, count, position) },
                // SAFETY: as above.
                Direction::OutOfGuest => unsafe { libc::pwritev(file.as_raw_fd(), iovecs, count, position) },
            });
            match moved? {
                0 => break,
                bytes => done += bytes,
            }
        }
        Ok(done)
    }

    /// Reads once from a stream into the span; 0 is the end of the stream.
    ///
    /// # Errors
    /// The host's, and `InvalidInput` when the span is not in guest memory.
    pub fn read(&mut self, stream: BorrowedFd<'_>, memory: &Memory, span: Span<'_>) -> io::Result<u64> {
        self.with_iovecs(memory, span, Direction::IntoGuest, |iovecs, count| {
            // SAFETY: as in `positioned`.
            unsafe { libc::readv(stream.as_raw_fd(), iovecs, count) }
        })
    }

    /// Writes the span once, as one message where the file keeps messages apart.
    ///
    /// # Errors
    /// The host's, and `InvalidInput` when the span is not in guest memory.
    pub fn write(&mut self, file: BorrowedFd<'_>, memory: &Memory, span: Span<'_>) -> io::Result<u64> {
        self.with_iovecs(memory, span, Direction::OutOfGuest, |iovecs, count| {
            // SAFETY: as in `positioned`.
            unsafe { libc::writev(file.as_raw_fd(), iovecs, count) }
        })
    }

    /// Writes the span once to a stream, as far as the stream takes it.
    ///
    /// # Errors
    /// The host's (never a signal: SIGPIPE is not raised), and `InvalidInput` when the span is not in guest memory.
    pub fn send(&mut self, socket: BorrowedFd<'_>, memory: &Memory, span: Span<'_>) -> io::Result<u64> {
        self.with_iovecs(memory, span, Direction::OutOfGuest, |iovecs, count| {
            // SAFETY: msghdr is plain data for which zero is the value of "not used".
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = iovecs.cast_mut();
            message.msg_iovlen = count as usize;
            // SAFETY: as in `positioned`; the message lives until the call returns, and sendmsg writes to neither.
            unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) }
        })
    }

    /// Builds the vectors for (the first [`MAX_IOVECS`] pieces of) the span, and makes one system call with them.
    fn with_iovecs(
        &mut self,
        memory: &Memory,
        span: Span<'_>,
        direction: Direction,
        call: impl Fn(*const libc::iovec, libc::c_int) -> isize,
    ) -> io::Result<u64> {
        let access = match direction {
            Direction::IntoGuest => Permissions::Write,
            Direction::OutOfGuest => Permissions::Read,
        };
        self.iovecs.clear();
        for buffer in section(span.buffers, span.offset, span.length) {
            let outside = |_| io::Error::from(io::ErrorKind::InvalidInput);
            let slices =
                memory.get_slices(buffer.address, buffer.length as usize, access).map_err(outside)?;
            for slice in slices {
                let slice = slice.map_err(outside)?;
                if direction == Direction::IntoGuest {
                    slice.bitmap().mark_dirty(0, slice.len());
                }
                let base = slice.ptr_guard_mut().as_ptr().cast();
                self.iovecs.push(libc::iovec { iov_base: base, iov_len: slice.len() });
            }
            if self.iovecs.len() >= MAX_IOVECS {
                self.iovecs.truncate(MAX_IOVECS);
                break;
            }
        }
        let result = loop {
            match u64::try_from(call(self.iovecs.as_ptr(), self.iovecs.len() as libc::c_int)) {
                Ok(moved) => break Ok(moved),
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        break Err(error);
                    }
                }
            }
        };
        self.iovecs.clear();
        result
    }
}
