//! Pages that are mapped apart: each by itself when it is touched, so that what is there is what was touched.
//!
//! When a page of a file is touched, Linux maps some of its neighbours with it, 16 at a time, unless the memory is watched by
//! a userfaultfd that tells of writes (`uffd_disable_fault_around` in include/linux/userfaultfd_k.h). With
//! `UFFD_FEATURE_WP_ASYNC`, of Linux 6.7, any memory may be, and nobody is told of anything.

use std::{
    io,
    ops::Range,
    os::fd::{AsRawFd, OwnedFd},
};

use devices::virtio::Memory;
use rustix::mm::{UserfaultfdFlags, userfaultfd};

use super::pages::pieces;

/// linux/userfaultfd.h.
const UFFD_API: u64 = 0xaa;
const UFFD_USER_MODE_ONLY: u32 = 1;
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
/// `_IOWR(UFFDIO, 0x3f, struct uffdio_api)`.
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
/// `_IOWR(UFFDIO, 0x00, struct uffdio_register)`.
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;

/// struct uffdio_api.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// struct uffdio_register.
#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// That pages are mapped apart, as long as this lives.
#[derive(Debug)]
pub struct Apart(#[allow(dead_code, reason = "what it does ends when it is closed")] OwnedFd);

impl Apart {
    /// Has the pages of these parts of guest memory mapped apart from now on.
    ///
    /// # Errors
    /// The host cannot do that: `EINVAL` before Linux 6.7.
    pub fn new(memory: &Memory, parts: &[Range<u64>]) -> io::Result<Self> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::from_bits_retain(UFFD_USER_MODE_ONLY);
        // SAFETY: no page is registered to be missing, and none is protected: nobody's faults wait for this process.
        let watch = unsafe { userfaultfd(flags) }?;
        let mut api = Api { api: UFFD_API, features: UFFD_FEATURE_WP_ASYNC, ioctls: 0 };
        ask(&watch, UFFDIO_API, &mut api)?;
        for piece in parts.iter().flat_map(|part| pieces(memory, part.clone())) {
            let (start, len) = (piece.address as u64, piece.bytes);
            let mut wanted = Register { start, len, mode: UFFDIO_REGISTER_MODE_WP, ioctls: 0 };
            ask(&watch, UFFDIO_REGISTER, &mut wanted)?;
        }
        Ok(Self(watch))
    }
}

fn ask<T>(watch: &OwnedFd, request: libc::c_ulong, argument: &mut T) -> io::Result<()> {
    // SAFETY: each request reads and writes one structure of its own type, which the callers pass; neither changes the content
    // of memory.
    match unsafe { libc::ioctl(watch.as_raw_fd(), request as _, std::ptr::from_mut(argument)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
