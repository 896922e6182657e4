//! TAP interfaces of the host (Documentation/networking/tuntap.rst).

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::OpenOptionsExt,
    },
};

use super::{Backend, HEADER_BYTES, Offload};

const DEVICE: &str = "/dev/net/tun";

// linux/if_tun.h, as numbers because libc has only some of them.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;
const TUN_F_CSUM: libc::c_ulong = 1;
const TUN_F_TSO4: libc::c_ulong = 2;
const TUN_F_TSO6: libc::c_ulong = 4;
const TUN_F_TSO_ECN: libc::c_ulong = 8;

const IFF_ATTACH_QUEUE: libc::c_int = 0x200;
const IFF_DETACH_QUEUE: libc::c_int = 0x400;

fn flags(multi_queue: bool) -> libc::c_int {
    let more = if multi_queue { libc::IFF_MULTI_QUEUE } else { 0 };
    libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | more
}

/// An open TAP interface, whose packets carry virtio_net_hdr.
#[derive(Debug)]
pub struct Tap {
    /// One for each pair of queues. The host spreads packets over those that are attached.
    files: Vec<File>,
    attached: usize,
}

impl Tap {
    /// Opens the interface of that name, which exists, for so many pairs of queues. Packets come to the first.
    ///
    /// # Errors
    /// The host's: `ENODEV` where there is no such interface, `EBUSY` when another process has one of a single pair open,
    /// `EPERM` when it belongs to somebody else. And when it was made for one pair and more are wanted, or the other way round.
    pub fn open(name: &str, pairs: u16) -> io::Result<Self> {
        // TUNSETIFF would make an interface that does not exist.
        if name.is_empty() || !std::path::Path::new("/sys/class/net").join(name).exists() {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        let mut tap = Tap { files: Vec::with_capacity(pairs.into()), attached: 0 };
        for _ in 0..pairs {
            let file = attach(name, flags(pairs > 1)).map_err(|error| unfit(error, pairs))?;
            let size = HEADER_BYTES as libc::c_int;
            // SAFETY: TUNSETVNETHDRSZ reads one int.
            check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ as _, &raw const size) })?;
            tap.files.push(file);
        }
        tap.attached = tap.files.len();
        tap.set_pairs(1)?;
        Ok(tap)
    }

    /// The file of a pair of queues, for handing it to the kernel.
    pub fn as_file(&self, pair: usize) -> Option<&File> {
        self.files.get(pair)
    }

    fn set_queue(&self, pair: usize, what: libc::c_int) -> io::Result<()> {
        let file = self.files.get(pair).ok_or(io::ErrorKind::InvalidInput)?;
        let request = request("", what)?;
        // SAFETY: TUNSETQUEUE reads one ifreq.
        check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETQUEUE as _, &raw const request) })
    }
}

impl Backend for Tap {
    fn file(&self, pair: usize) -> Option<BorrowedFd<'_>> {
        self.as_file(pair).map(File::as_fd)
    }

    fn set_pairs(&mut self, count: usize) -> io::Result<()> {
        if !(1..=self.files.len()).contains(&count) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        while self.attached > count {
            self.set_queue(self.attached - 1, IFF_DETACH_QUEUE)?;
            self.attached -= 1;
        }
        while self.attached < count {
            self.set_queue(self.attached, IFF_ATTACH_QUEUE)?;
            self.attached += 1;
        }
        Ok(())
    }

    fn set_offload(&mut self, offload: Offload) -> io::Result<()> {
        let bit = |on, bit| if on { bit } else { 0 };
        let bits = bit(offload.checksum, TUN_F_CSUM)
            | bit(offload.tso4, TUN_F_TSO4)
            | bit(offload.tso6, TUN_F_TSO6)
            | bit(offload.ecn, TUN_F_TSO_ECN);
        // It is the interface's, whichever of its files is asked.
        let file = self.files.first().ok_or(io::ErrorKind::NotConnected)?;
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETOFFLOAD as _, bits) })
    }
}

fn attach(name: &str, flags: libc::c_int) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(DEVICE)?;
    let mut request = request(name, flags)?;
    // SAFETY: TUNSETIFF reads and writes one ifreq, whose name ends in a zero.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF as _, &raw mut request) })?;
    Ok(file)
}

fn request(name: &str, flags: libc::c_int) -> io::Result<libc::ifreq> {
    // SAFETY: ifreq is a plain C struct for which all zeros is valid.
    let mut request = unsafe { std::mem::zeroed::<libc::ifreq>() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    Ok(request)
}

/// What the kernel means by EINVAL: whether an interface has several queues is decided when it is made.
fn unfit(error: io::Error, pairs: u16) -> io::Error {
    match (error.raw_os_error(), pairs) {
        (Some(libc::EINVAL), 1) => io::Error::other("it was made with multi_queue, and one queue is wanted"),
        (Some(libc::EINVAL), _) => {
            io::Error::other("it was made without multi_queue, and several queues are wanted")
        }
        _ => error,
    }
}

/// Making interfaces that outlive the process, until somebody removes them by netlink.
#[derive(Clone, Copy, Debug)]
pub struct PersistentTap;

impl PersistentTap {
    /// Makes an interface of that name, with several queues or with one.
    ///
    /// # Errors
    /// The host's: `EBUSY` when the name is taken, `EPERM` without CAP_NET_ADMIN, and what opening /dev/net/tun brings.
    pub fn create(name: &str, multi_queue: bool) -> io::Result<()> {
        // linux/if_tun.h: do not attach to an interface that is there.
        const IFF_TUN_EXCL: libc::c_int = 0x8000;
        let file = attach(name, flags(multi_queue) | IFF_TUN_EXCL)?;
        // SAFETY: TUNSETPERSIST takes its argument by value.
        check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETPERSIST as _, 1 as libc::c_ulong) })
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
