//! What one virtual machine is made of, as the monitor hands it to `flyrun-vmm` in JSON.

use std::{num::NonZeroU64, path::PathBuf};

use devices::virtio::{net::MAX_PAIRS, rate::Rate};
use serde::{Deserialize, Serialize};

/// A whole virtual machine. Devices appear to the guest in this order: disks, net, vsock, shares, rng,
/// balloon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Number of vCPUs, 1 to 32.
    pub cpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// An uncompressed ELF vmlinux, or a bzImage.
    pub kernel: PathBuf,
    /// The files that make up the initramfs, one behind another, each padded with zeros to four bytes.
    #[serde(default)]
    pub initrd: Vec<PathBuf>,
    /// Words added to the kernel's command line, behind flyrun's own.
    #[serde(default)]
    pub command_line: String,
    /// Block devices, `/dev/vda` first.
    #[serde(default)]
    pub disks: Vec<DiskSpec>,
    /// Network cards, `eth0` first.
    #[serde(default)]
    pub nets: Vec<NetSpec>,
    /// The vsock device.
    #[serde(default)]
    pub vsock: Option<VsockSpec>,
    /// Directories of the host.
    #[serde(default)]
    pub shares: Vec<ShareSpec>,
    /// Where the first serial port's output goes.
    #[serde(default)]
    pub console: ConsoleSpec,
    /// Whether memory that the guest has freed goes back to the host. A machine that is resumed does as it did before.
    #[serde(default)]
    pub balloon: bool,
}

/// One block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// The raw files that make up the disk, one behind another, each padded with zeros to a sector of 512 bytes.
    /// A writable disk is made of exactly one.
    pub files: Vec<PathBuf>,
    /// Whether the guest may only read.
    #[serde(default)]
    pub read_only: bool,
    /// What reads and writes together may take.
    #[serde(default)]
    pub rate: Option<RateSpec>,
}

/// One network card, whose cable is a TAP interface of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetSpec {
    /// The interface, which exists.
    pub tap: String,
    /// The guest's Ethernet address.
    pub mac: [u8; 6],
    /// The largest packet without its Ethernet header, in bytes; the interface has the same.
    #[serde(default = "default_mtu")]
    pub mtu: u16,
    /// Who moves the packets.
    #[serde(default)]
    pub backend: NetBackend,
    /// Pairs of queues, 1 to 8. The interface was made with multi_queue if there are several, and without if there is one.
    #[serde(default = "one_pair")]
    pub queue_pairs: u16,
    /// What each direction may take; the host's kernel cannot keep to it, so [`NetBackend::Auto`] is this process then.
    #[serde(default)]
    pub rate: Option<RateSpec>,
}

/// What may pass in a second. At least one of the two is limited. A tenth of it may come at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateSpec {
    /// Bytes per second.
    #[serde(default)]
    pub bytes: Option<NonZeroU64>,
    /// Requests of a disk, or packets, per second.
    #[serde(default)]
    pub operations: Option<NonZeroU64>,
}

impl From<RateSpec> for Rate {
    fn from(RateSpec { bytes, operations }: RateSpec) -> Self {
        Rate { bytes, operations }
    }
}

/// That of Ethernet.
pub const fn default_mtu() -> u16 {
    1500
}

const fn one_pair() -> u16 {
    1
}

/// The pairs of queues of a machine's network card: one for each vCPU, as far as a card has them.
pub fn queue_pairs(cpus: u8) -> u16 {
    u16::from(cpus).clamp(1, MAX_PAIRS)
}

/// Who moves the packets of a network card.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetBackend {
    /// The host's kernel where /dev/vhost-net opens, this process elsewhere.
    #[default]
    Auto,
    /// The host's kernel, or the machine does not start.
    Vhost,
    /// This process.
    User,
}

impl std::str::FromStr for NetBackend {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "vhost" => Ok(Self::Vhost),
            "user" => Ok(Self::User),
            _ => Err(format!("{text:?} is none of auto, vhost, user")),
        }
    }
}

/// A vsock device in user space, mapped to unix sockets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockSpec {
    /// The guest's context id, at least 3.
    pub guest_cid: u64,
    /// A guest's connection to port P of the host becomes one to the unix socket `<socket>_<P>`. The VMM listens on
    /// `<socket>` itself, where `CONNECT <port>\n` asks for a connection into the guest.
    pub socket: PathBuf,
}

/// A directory of the host, served by a process of its own, virtiofsd. It gets the guest's whole memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareSpec {
    /// The name that the guest mounts it by.
    pub tag: String,
    /// The unix socket on which virtiofsd listens.
    pub socket: PathBuf,
}

/// Where the output of the first serial port goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConsoleSpec {
    /// Nowhere: the guest gets no console.
    #[default]
    Off,
    /// To the end of this file, of which at most the last MiB is kept.
    File(PathBuf),
    /// To the standard output of `flyrun-vmm`, whose standard input is the port's input.
    Stdio,
}
