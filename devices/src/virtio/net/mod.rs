//! The network device (virtio 1.2, section 5.1): packets between the guest and a TAP of the host.
//!
//! Two devices share the configuration space, the features and the queues: [`Net`] moves packets on the thread of the event
//! loop, and [`VhostNet`] leaves that to the host's kernel and only starts and stops it. A card has one pair of queues, or
//! several and a control queue, by which the driver says how many it uses.

mod config;
mod control;
mod queues;
mod receive;
mod state;
#[allow(unsafe_code, reason = "ioctls of /dev/net/tun")]
mod tap;
mod transmit;
mod user;
mod vhost;

use std::{io, os::fd::BorrowedFd};

pub use config::{MAX_PAIRS, Mac, NetConfig};
pub use tap::{PersistentTap, Tap};
pub use user::Net;
pub use vhost::VhostNet;

/// Length of virtio_net_hdr (section 5.1.6); with VERSION_1 it has num_buffers always.
pub const HEADER_BYTES: u32 = 12;

/// What the guest can take unfinished from the host: checksums, and segments larger than the wire's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// Packets may lack their checksum.
    pub checksum: bool,
    /// TCP segments over IPv4 may be larger than the MTU.
    pub tso4: bool,
    /// TCP segments over IPv6 may be.
    pub tso6: bool,
    /// Such segments may carry congestion notification.
    pub ecn: bool,
}

/// Where packets go to and come from: each read and each write is one packet behind its virtio_net_hdr.
pub trait Backend: Send {
    /// The file of this pair of queues, counted from 0, which does not block and can be polled.
    fn file(&self, pair: usize) -> Option<BorrowedFd<'_>>;

    /// Has packets come to the first `count` pairs and to no others. It is 1 at first.
    ///
    /// # Errors
    /// There are not so many, or the host's reason; some of the change may have been made then.
    fn set_pairs(&mut self, count: usize) -> io::Result<()>;

    /// Says what the packets that are read from now on may be.
    ///
    /// # Errors
    /// The host's.
    fn set_offload(&mut self, offload: Offload) -> io::Result<()>;
}

/// Does as a driver asks that wants `wanted` pairs, of `available`, in place of `used`; false if it cannot be.
fn switch_pairs(backend: &mut dyn Backend, used: &mut usize, available: usize, wanted: u16) -> bool {
    let wanted = usize::from(wanted);
    if !(1..=available).contains(&wanted) {
        return false;
    }
    match backend.set_pairs(wanted) {
        Ok(()) => *used = wanted,
        Err(error) => {
            log::warn!("net: cannot use {wanted} pairs of queues: {error}");
            if let Err(error) = backend.set_pairs(*used) {
                log::error!("net: cannot go back to {used} pairs of queues: {error}");
            }
        }
    }
    *used == wanted
}

/// One pair again, as every driver finds it.
fn forget_pairs(backend: &mut dyn Backend) {
    if let Err(error) = backend.set_pairs(1) {
        log::error!("net: cannot go back to one pair of queues: {error}");
    }
}

#[cfg(test)]
mod tests;
