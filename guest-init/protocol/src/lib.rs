//! The contract of host and guest.
//!
//! Three things cross the border, and all are defined here and nowhere else:
//!
//! 1. [`BootConfig`], written by the host as the file [`CONFIG_PATH`] of the initramfs (a second cpio archive behind
//!    guest-init's own) and read once by guest-init. It may say that what to run will come in a frame, [`ToGuest::Run`];
//! 2. the frames of the control connection, [`ToGuest`] and [`FromGuest`], on vsock port [`port::CONTROL`];
//! 3. what the host may not have as a file, secrets above all: [`Delivery`], once, on vsock port [`port::DELIVERY`].
//!
//! Guest-init opens every connection: the host (CID 2) listens. `stdin`, `stdout` and `stderr` are byte streams of
//! their own with vsock's flow control; with a terminal `stdout` carries both directions' data (input host → guest,
//! output guest → host) and the other two are not opened.
//!
//! Everything that comes from the guest is hostile: [`frame`] bounds it before it is parsed, and no value in it is
//! trusted to be in range.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

mod config_file;
mod delivery;
pub mod frame;
pub mod replay;
pub mod session;

pub use config_file::{ConfigError, MAGIC, decode_config, encode_config};
pub use delivery::{
    Delivery, DeliveryError, File, MAX_DELIVERY_BYTES, Owner, decode_delivery, encode_delivery,
};

/// The version of everything in this crate. Raised by every change that an older peer would read wrongly.
pub const PROTOCOL_VERSION: u32 = 8;

/// The longest lease of a workload that works in the background ([`FromGuest::Busy`]); it can be renewed.
pub const MAX_BUSY_SECONDS: u32 = 3600;

/// What Linux calls a virtio disk (drivers/block/virtio_blk.c, virtblk_name_format).
pub fn disk_name(index: usize) -> String {
    let letter = |index: usize| char::from(b'a' + (index % 26) as u8);
    match index {
        0..26 => format!("/dev/vd{}", letter(index)),
        _ => format!("/dev/vd{}{}", letter(index / 26 - 1), letter(index)),
    }
}

/// Where guest-init finds its encoded [`BootConfig`] in the initramfs.
pub const CONFIG_PATH: &str = "/flyrun.config";

/// The vsock ports, on the host (CID 2), that guest-init connects to.
pub mod port {
    /// Frames of [`super::ToGuest`] and [`super::FromGuest`].
    pub const CONTROL: u32 = 1;
    /// The workload's standard input; the host shuts its writing side down for end of file.
    pub const STDIN: u32 = 2;
    /// The workload's standard output, or both directions of its terminal.
    pub const STDOUT: u32 = 3;
    /// The workload's standard error.
    pub const STDERR: u32 = 4;
    /// A [`super::Delivery`], for a machine whose configuration tells of one. The host closes it at the end.
    pub const DELIVERY: u32 = 5;
}

/// What a virtual machine is to do with this boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BootConfig {
    /// Run an image's process.
    Run(Box<RunConfig>),
    /// Apply an image's layers to an empty filesystem, then power off.
    Unpack(UnpackConfig),
    /// Do nothing yet: say [`FromGuest::Ready`] and wait for [`ToGuest::Run`]. A snapshot of that is the start of any machine.
    Wait,
    /// The same with this block device, an empty ext4, mounted as the machine's own disk and nothing of it in memory alone: the start of
    /// any machine whose disk is a copy of what it is then.
    WaitWithDisk(String),
}

/// What a machine that waits is to do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// The time of day, in nanoseconds since the epoch; 0 leaves the clock as it is.
    pub realtime_ns: u64,
    /// The length of each disk in bytes, `/dev/vda` first: the kernel learns of them in its own time.
    pub disks: Vec<u64>,
    /// What a machine that boots is told at once.
    pub config: RunConfig,
}

/// How to run the workload. The host has already merged the image's configuration with the user's flags.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunConfig {
    /// The block device with the read-only root filesystem, such as `/dev/vda`.
    pub rootfs: String,
    /// The block device with the machine's own ext4, the upper layer of the overlay; without one the root is read-only.
    pub disk: Option<String>,
    /// The host name of the machine.
    pub hostname: String,
    /// Entrypoint and command, joined by the OCI rules. Never empty.
    pub argv: Vec<String>,
    /// `KEY=VALUE` entries in their final order; PATH and HOME are added by guest-init when absent.
    pub env: Vec<String>,
    /// `user[:group]` by name or number, as in the image configuration; empty is root.
    pub user: String,
    /// Working directory, created when it does not exist; empty is `/`.
    pub workdir: String,
    /// The size of the terminal to make, if the workload is to have one.
    pub tty: Option<TtySize>,
    /// The most processes and threads of the workload; without it as many as memory allows.
    pub pids_limit: Option<u32>,
    /// Whether to connect [`port::STDIN`]; otherwise standard input is /dev/null.
    pub stdin: bool,
    /// Memory filesystems to mount over the root.
    pub tmpfs: Vec<Tmpfs>,
    /// Filesystems to mount over the root, on block devices of their own.
    pub volumes: Vec<VolumeConfig>,
    /// Directories of the host to mount over the root.
    #[serde(default)]
    pub shares: Vec<ShareConfig>,
    /// The network card and what it is to be; without it the machine has its loopback.
    pub network: Option<NetworkConfig>,
    /// What is to be fetched from [`port::DELIVERY`] before the workload starts.
    #[serde(default)]
    pub delivery: Option<DeliveryConfig>,
    /// Fresh random bytes of the host, credited to the kernel's random generator before the workload starts.
    pub entropy: Vec<u8>,
    /// Whether guest-init tells its steps, each with a monotonic time stamp, on the kernel's console.
    pub init_log: bool,
}

/// That there is a [`Delivery`]. What is in it never stands in a configuration, which the host has as a file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeliveryConfig {
    /// Where its files will be: absolute paths in the root filesystem.
    pub paths: Vec<String>,
}

/// The machine's place in the network. Its card is `eth0`; the gateways are on the link, whatever the addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkConfig {
    /// The card's Ethernet address.
    pub mac: [u8; 6],
    /// The largest packet without its Ethernet header, in bytes.
    pub mtu: u16,
    /// The machine's IPv4 address, as a /32, and the gateway of its default route.
    pub ipv4: Option<(Ipv4Addr, Ipv4Addr)>,
    /// The same of IPv6, a /128.
    pub ipv6: Option<(Ipv6Addr, Ipv6Addr)>,
    /// What /etc/resolv.conf is to say, line by line; empty leaves the image's.
    pub resolv_conf: Vec<String>,
    /// Entries of /etc/hosts beside the machine's own.
    pub hosts: Vec<(IpAddr, String)>,
}

/// A memory filesystem that the user asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tmpfs {
    /// Absolute path in the root filesystem, created when it does not exist.
    pub path: String,
    /// Mount options of tmpfs(5), such as `size=64m,mode=1777`; empty is the default.
    pub options: String,
}

/// A filesystem that outlives the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeConfig {
    /// The block device with its ext4, such as `/dev/vdc`.
    pub device: String,
    /// Absolute path in the root filesystem, created when it does not exist.
    pub path: String,
    /// Whether it is only read.
    pub read_only: bool,
}

/// A directory of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareConfig {
    /// The tag of its virtio-fs device.
    pub tag: String,
    /// Absolute path in the root filesystem, created when it does not exist.
    pub path: String,
    /// Whether it is only read. The host holds to it too, whatever the guest does.
    pub read_only: bool,
}

/// The size of a terminal in character cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TtySize {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// How to unpack the layers of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnpackConfig {
    /// The read-only block device that holds the blobs one behind another, each at a sector of 512 bytes.
    pub layers_device: String,
    /// The block device with an empty ext4 to unpack into.
    pub target_device: String,
    /// The layers, lowest first.
    pub layers: Vec<LayerConfig>,
    /// Upper bound of the unpacked bytes of all layers together; beyond it the image is refused.
    pub max_bytes: u64,
    /// Upper bound of the entries of all layers together; beyond it the image is refused.
    pub max_entries: u64,
    /// Whether to tell the steps on the kernel's console.
    pub init_log: bool,
}

/// One layer blob on [`UnpackConfig::layers_device`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerConfig {
    /// Byte offset of the blob on the device.
    pub offset: u64,
    /// Length of the blob in bytes.
    pub size: u64,
    /// How the blob is compressed.
    pub compression: Compression,
    /// SHA-256 of the uncompressed tar, which the image configuration promises.
    pub diff_id: [u8; 32],
}

/// Compression of a layer blob, by its media type (OCI image spec, layer.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Compression {
    /// A plain tar.
    None,
    /// gzip (RFC 1952), possibly of several members.
    Gzip,
    /// Zstandard (RFC 8878), possibly of several frames.
    Zstd,
}

/// What the host says on the control connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToGuest {
    /// Send this signal to the workload: to its process, or to the terminal's foreground group as the kernel would.
    Signal {
        /// Linux signal number, 1 to 64.
        signal: i32,
    },
    /// The user's terminal changed its size.
    Resize(TtySize),
    /// Stand still for a snapshot. The host has ended its side of the streams, and waits for [`FromGuest::Frozen`] and for
    /// the end of the guest's side before it takes one.
    Suspend {
        /// Whether sessions that do not end in time are cut off, and no reason not to.
        force: bool,
    },
    /// The answer to [`FromGuest::AskTime`].
    Time {
        /// The time of day, in nanoseconds since the epoch.
        realtime_ns: u64,
    },
    /// Go on: after a snapshot, in a restored machine, or because there was none.
    Resume(Box<Renewal>),
    /// Run this, in a machine that waits for it.
    Run(Box<Start>),
}

/// What a machine must learn before its workload goes on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewal {
    /// The time of day, in nanoseconds since the epoch; 0 leaves the clock as it is.
    pub realtime_ns: u64,
    /// Fresh random bytes of the host.
    pub entropy: Vec<u8>,
    /// The host name of the machine, which for a clone is another than before; empty leaves it.
    pub hostname: String,
    /// The machine's place in the network, which may be another than before; without it that stays.
    pub network: Option<NetworkConfig>,
    /// The size of the terminal now.
    pub terminal: Option<TtySize>,
}

/// What guest-init says on the control connection.
///
/// postcard numbers them in this order, and machines on disk speak as they did when they were suspended: a new one goes last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromGuest {
    /// The first frame of each connection.
    Hello {
        /// [`PROTOCOL_VERSION`] of guest-init.
        version: u32,
    },
    /// A machine that is to wait does so: it has mounted nothing of an image, and read nothing of its disks but of the one that it was
    /// to mount.
    Ready,
    /// The workload's `execve` has succeeded.
    Started {
        /// Process id in the guest.
        pid: u32,
    },
    /// The workload's first process is gone. Its streams are closed behind this frame, after what they hold.
    Exited(ExitStatus),
    /// The workload stands still, and so do the filesystems.
    Frozen,
    /// It does not stand still, and runs on.
    NotFrozen {
        /// One line with the reason.
        message: String,
    },
    /// The workload runs on behind [`ToGuest::Resume`].
    Resumed,
    /// What time is it? The answer to the last question took too long to be right.
    AskTime,
    /// Guest-init could not do what it was told.
    Failed {
        /// What kind of failure it is, which decides the exit code.
        kind: FailureKind,
        /// One line with the facts, for the user.
        message: String,
    },
    /// How far unpacking has come.
    Unpacking {
        /// Index of the layer under way.
        layer: u32,
        /// Compressed bytes of all layers read so far.
        bytes_read: u64,
    },
    /// All layers are applied, checked and on the disk.
    Unpacked {
        /// Bytes that the files of the root filesystem hold.
        bytes: u64,
        /// Files, directories and other entries in it.
        entries: u64,
    },
    /// The workload works though nobody asks it anything, and is to be left running for so long; 0 takes that back. Told anew
    /// after each resume as long as it lasts.
    Busy {
        /// At most [`MAX_BUSY_SECONDS`].
        seconds: u32,
    },
}

/// How the workload's first process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// It called exit with this code.
    Code(u8),
    /// A signal ended it.
    Signal(u8),
    /// The kernel killed it, or a process of it, for want of memory, and the first process ended by SIGKILL.
    OutOfMemory,
}

impl ExitStatus {
    /// The exit code that a shell would report: the code itself, or 128 + the signal's number.
    pub fn code(self) -> u8 {
        match self {
            ExitStatus::Code(code) => code,
            ExitStatus::Signal(signal) => 128u8.saturating_add(signal),
            ExitStatus::OutOfMemory => 137,
        }
    }
}

/// Why guest-init failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// The command was not found in the image (exit code 127).
    CommandNotFound,
    /// The command exists and cannot be executed (exit code 126).
    CommandNotExecutable,
    /// The user or the group does not exist in the image (exit code 125).
    UnknownUser,
    /// A layer is not what its digest says, or not a valid archive (exit code 125).
    BadLayer,
    /// A filesystem has no room left (exit code 125).
    NoSpace,
    /// The image is larger than a limit allows (exit code 125).
    LimitExceeded,
    /// The boot configuration is not one this guest-init understands (exit code 125).
    BadConfig,
    /// Anything else in setting the machine up (exit code 125).
    Setup,
    /// The session that a client comes back to is not there (exit code 125).
    NoSession,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_on_disk_are_understood() {
        let number = |message: &FromGuest| postcard::to_allocvec(message).unwrap()[0];
        let failed = FromGuest::Failed { kind: FailureKind::NoSpace, message: String::new() };
        let said = [FromGuest::Hello { version: 0 }, FromGuest::Frozen, FromGuest::AskTime, failed];
        assert_eq!(said.map(|message| number(&message)), [0, 4, 7, 8]);
        assert_eq!(number(&FromGuest::Busy { seconds: 1 }), 11);
    }

    #[test]
    fn disks_are_named_as_the_kernel_does() {
        assert_eq!(
            [0, 1, 25, 26, 27, 52].map(disk_name),
            ["a", "b", "z", "aa", "ab", "ba"].map(|end| format!("/dev/vd{end}"))
        );
    }
}
