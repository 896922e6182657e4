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
const TUN_F_CSUM: libc::c_ulong = 1;
const TUN_F_TSO4: libc::c_ulong = 2;
const TUN_F_TSO6: libc::c_ulong = 4;
const TUN_F_TSO_ECN: libc::c_ulong = 8;

const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// An open TAP interface, whose packets carry virtio_net_hdr.
#[derive(Debug)]
pub struct Tap {
    file: File,
}

impl Tap {
    /// Opens the interface of that name, which exists.
    ///
    /// # Errors
    /// The host's: `ENODEV` where there is no such interface, `EBUSY` when another process has it open, `EPERM` when it
    /// belongs to somebody else.
    pub fn open(name: &str) -> io::Result<Self> {
        // TUNSETIFF would make an interface that does not exist.
        if name.is_empty() || !std::path::Path::new("/sys/class/net").join(name).exists() {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        let tap = Self::attach(name, FLAGS)?;
        let size = HEADER_BYTES as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int.
        check(unsafe { libc::ioctl(tap.file.as_raw_fd(), TUNSETVNETHDRSZ as _, &raw const size) })?;
        Ok(tap)
    }

    fn attach(name: &str, flags: libc::c_int) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(DEVICE)?;
        // SAFETY: ifreq is a plain C struct for which all zeros is valid.
        let mut request = unsafe { std::mem::zeroed::<libc::ifreq>() };
        if name.len() >= request.ifr_name.len() {
            return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
        }
        for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *place = byte as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one ifreq, whose name ends in a zero.
        check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF as _, &raw mut request) })?;
        Ok(Tap { file })
    }

    /// The file, for handing it to the kernel.
    pub fn as_file(&self) -> &File {
        &self.file
    }
}

impl Backend for Tap {
    fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn set_offload(&mut self, offload: Offload) -> io::Result<()> {
        let bit = |on, bit| if on { bit } else { 0 };
        let bits = bit(offload.checksum, TUN_F_CSUM)
            | bit(offload.tso4, TUN_F_TSO4)
            | bit(offload.tso6, TUN_F_TSO6)
            | bit(offload.ecn, TUN_F_TSO_ECN);
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETOFFLOAD as _, bits) })
    }
}

/// Making interfaces that outlive the process, until somebody removes them by netlink.
#[derive(Clone, Copy, Debug)]
pub struct PersistentTap;

impl PersistentTap {
    /// Makes an interface of that name.
    ///
    /// # Errors
    /// The host's: `EBUSY` when the name is taken, `EPERM` without CAP_NET_ADMIN, and what opening /dev/net/tun brings.
    pub fn create(name: &str) -> io::Result<()> {
        // linux/if_tun.h: do not attach to an interface that is there.
        const IFF_TUN_EXCL: libc::c_int = 0x8000;
        let tap = Tap::attach(name, FLAGS | IFF_TUN_EXCL)?;
        // SAFETY: TUNSETPERSIST takes its argument by value.
        check(unsafe { libc::ioctl(tap.file.as_raw_fd(), TUNSETPERSIST as _, 1 as libc::c_ulong) })
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
