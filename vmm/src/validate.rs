//! Whether a [`VmSpec`] describes a machine that can be.

use devices::virtio::{fs::TAG_BYTES, net::MAX_PAIRS};
use thiserror::Error;

use crate::{
    mptable,
    spec::{NetBackend, RateSpec, VmSpec},
};

/// Linux does not reach its init with less.
pub const MIN_MEMORY_MIB: u32 = 16;
/// 1 TiB.
pub const MAX_MEMORY_MIB: u32 = 1 << 20;
/// Each device has an interrupt line of its own, of which there are 19; vsock, rng and balloon take three, each share one.
pub const MAX_DISKS: usize = 16;
/// As far as the lines that the disks leave.
pub const MAX_NETS: usize = 8;
/// As many as anybody has wanted yet; each takes a process and a thread of the host.
pub const MAX_SHARES: usize = 8;
/// IFNAMSIZ without the zero.
const MAX_INTERFACE_NAME: usize = 15;
/// RFC 8200: what IPv6 cannot do without.
const MIN_MTU: u16 = 1280;
/// Context ids 0 to 2 are the hypervisor's, the loopback's and the host's.
const MIN_GUEST_CID: u64 = 3;
/// The last one means "any".
const MAX_GUEST_CID: u64 = u32::MAX as u64 - 1;

/// What is wrong with a spec, by field.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum SpecError {
    /// Too few or too many vCPUs.
    #[error("cpus is {0}, possible are 1 to {max}", max = mptable::MAX_CPUS)]
    Cpus(u8),
    /// Too little or too much memory.
    #[error("memory_mib is {0}, possible are {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB}")]
    Memory(u32),
    /// More disks than interrupt lines.
    #[error("{0} disks, at most {MAX_DISKS} are possible")]
    Disks(usize),
    /// A disk that is made of nothing.
    #[error("disk {0} has no file")]
    DiskWithoutFile(usize),
    /// A writable disk of several files.
    #[error("disk {0} is writable and has {1} files: only a read-only disk can have more than one")]
    WritableDiskOfManyFiles(usize, usize),
    /// A limit that is none.
    #[error("disks[{0}].rate limits neither bytes nor operations")]
    DiskRate(usize),
    /// More network cards than are possible.
    #[error("{0} network cards, at most {MAX_NETS} are possible")]
    Nets(usize),
    /// A name that no interface has.
    #[error("nets[{0}].tap is no interface's name")]
    Tap(usize),
    /// An address that is for several stations, or for none.
    #[error("nets[{0}].mac is not the address of one station")]
    Mac(usize),
    /// Too small for IPv6.
    #[error("nets[{0}].mtu is {1}, at least {MIN_MTU} is needed")]
    Mtu(usize, u16),
    /// More pairs of queues than a card has, or none.
    #[error("nets[{0}].queue_pairs is {1}, possible are 1 to {MAX_PAIRS}")]
    QueuePairs(usize, u16),
    /// A limit that is none.
    #[error("nets[{0}].rate limits neither bytes nor operations")]
    NetRate(usize),
    /// vhost-net has no limits.
    #[error("nets[{0}] has a rate, which the backend \"vhost\" cannot keep to: choose \"user\" or \"auto\"")]
    VhostRate(usize),
    /// A reserved context id.
    #[error("vsock.guest_cid is {0}, possible are {MIN_GUEST_CID} to {MAX_GUEST_CID}")]
    GuestCid(u64),
    /// More shared directories than are possible.
    #[error("{0} shares, at most {MAX_SHARES} are possible")]
    Shares(usize),
    /// A tag that is none, or one that two have.
    #[error("shares[{0}].tag is not a name of its own with 1 to {TAG_BYTES} bytes")]
    Tag(usize),
    /// The kernel would stop reading there.
    #[error("command_line has a control character at byte {0}")]
    CommandLine(usize),
}

/// Checks all that can be checked without the host.
///
/// # Errors
/// The first field that is wrong.
pub fn validate(spec: &VmSpec) -> Result<(), SpecError> {
    if !(1..=mptable::MAX_CPUS).contains(&spec.cpus) {
        return Err(SpecError::Cpus(spec.cpus));
    }
    if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&spec.memory_mib) {
        return Err(SpecError::Memory(spec.memory_mib));
    }
    if spec.disks.len() > MAX_DISKS {
        return Err(SpecError::Disks(spec.disks.len()));
    }
    for (index, disk) in spec.disks.iter().enumerate() {
        match disk.files.len() {
            0 => return Err(SpecError::DiskWithoutFile(index)),
            files if files > 1 && !disk.read_only => {
                return Err(SpecError::WritableDiskOfManyFiles(index, files));
            }
            _ if disk.rate.is_some_and(limits_nothing) => return Err(SpecError::DiskRate(index)),
            _ => {}
        }
    }
    validate_nets(spec)?;
    if let Some(vsock) = &spec.vsock
        && !(MIN_GUEST_CID..=MAX_GUEST_CID).contains(&vsock.guest_cid)
    {
        return Err(SpecError::GuestCid(vsock.guest_cid));
    }
    validate_shares(spec)?;
    match spec.command_line.find(|c: char| c.is_control() && c != '\t') {
        Some(at) => Err(SpecError::CommandLine(at)),
        None => Ok(()),
    }
}

fn validate_shares(spec: &VmSpec) -> Result<(), SpecError> {
    if spec.shares.len() > MAX_SHARES {
        return Err(SpecError::Shares(spec.shares.len()));
    }
    for (index, share) in spec.shares.iter().enumerate() {
        let taken = spec.shares.iter().take(index).any(|other| other.tag == share.tag);
        if !(1..=TAG_BYTES).contains(&share.tag.len()) || share.tag.contains('\0') || taken {
            return Err(SpecError::Tag(index));
        }
    }
    Ok(())
}

fn validate_nets(spec: &VmSpec) -> Result<(), SpecError> {
    if spec.nets.len() > MAX_NETS {
        return Err(SpecError::Nets(spec.nets.len()));
    }
    for (index, net) in spec.nets.iter().enumerate() {
        let visible = |c: char| c.is_ascii_graphic() && c != '/' && c != '%';
        if !(1..=MAX_INTERFACE_NAME).contains(&net.tap.len()) || !net.tap.chars().all(visible) {
            return Err(SpecError::Tap(index));
        }
        let [first, ..] = net.mac;
        if first & 1 != 0 || net.mac == [0; 6] {
            return Err(SpecError::Mac(index));
        }
        if net.mtu < MIN_MTU {
            return Err(SpecError::Mtu(index, net.mtu));
        }
        if !(1..=MAX_PAIRS).contains(&net.queue_pairs) {
            return Err(SpecError::QueuePairs(index, net.queue_pairs));
        }
        match net.rate {
            Some(rate) if limits_nothing(rate) => return Err(SpecError::NetRate(index)),
            Some(_) if net.backend == NetBackend::Vhost => return Err(SpecError::VhostRate(index)),
            _ => {}
        }
    }
    Ok(())
}

fn limits_nothing(rate: RateSpec) -> bool {
    rate.bytes.is_none() && rate.operations.is_none()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{DiskSpec, NetSpec, ShareSpec, VsockSpec};

    fn spec() -> VmSpec {
        serde_json::from_str(r#"{"cpus": 1, "memory_mib": 128, "kernel": "/k"}"#).unwrap()
    }

    fn check(change: impl FnOnce(&mut VmSpec)) -> Result<(), SpecError> {
        let mut spec = spec();
        change(&mut spec);
        validate(&spec)
    }

    fn disk(files: usize, read_only: bool) -> DiskSpec {
        DiskSpec { files: vec!["/d".into(); files], read_only, rate: None }
    }

    fn card() -> NetSpec {
        NetSpec {
            tap: "fly1".into(),
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            backend: NetBackend::Auto,
            queue_pairs: 1,
            rate: None,
        }
    }

    #[test]
    fn the_smallest_spec_is_valid() {
        assert_eq!(check(|_| {}), Ok(()));
    }

    #[test]
    fn numbers_out_of_range_are_named() {
        assert_eq!(check(|s| s.cpus = 0), Err(SpecError::Cpus(0)));
        assert_eq!(check(|s| s.cpus = 33), Err(SpecError::Cpus(33)));
        assert_eq!(check(|s| s.memory_mib = 15), Err(SpecError::Memory(15)));
        assert_eq!(check(|s| s.memory_mib = u32::MAX), Err(SpecError::Memory(u32::MAX)));
        assert_eq!(
            check(|s| s.vsock = Some(VsockSpec { guest_cid: 2, socket: "/s".into() })),
            Err(SpecError::GuestCid(2))
        );
    }

    #[test]
    fn a_disk_has_one_file_or_is_read_only() {
        assert_eq!(check(|s| s.disks = vec![disk(1, false), disk(3, true)]), Ok(()));
        assert_eq!(check(|s| s.disks = vec![disk(0, true)]), Err(SpecError::DiskWithoutFile(0)));
        assert_eq!(check(|s| s.disks = vec![disk(2, false)]), Err(SpecError::WritableDiskOfManyFiles(0, 2)));
        assert_eq!(check(|s| s.disks = vec![disk(1, true); 17]), Err(SpecError::Disks(17)));
    }

    #[test]
    fn a_network_card_is_checked_before_the_host_is_asked() {
        let good = card();
        let with = |net: &NetSpec| check(|s| s.nets = vec![net.clone()]);
        assert_eq!(with(&good), Ok(()));
        for tap in ["", "a/b", "x y", "tap%d", "sixteen-letters-"] {
            assert_eq!(with(&NetSpec { tap: tap.into(), ..good.clone() }), Err(SpecError::Tap(0)), "{tap}");
        }
        for mac in [[1, 0, 0, 0, 0, 1], [0; 6]] {
            assert_eq!(with(&NetSpec { mac, ..good.clone() }), Err(SpecError::Mac(0)));
        }
        assert_eq!(with(&NetSpec { mtu: 1279, ..good.clone() }), Err(SpecError::Mtu(0, 1279)));
        for pairs in [0, 9] {
            let wrong = NetSpec { queue_pairs: pairs, ..good.clone() };
            assert_eq!(with(&wrong), Err(SpecError::QueuePairs(0, pairs)));
        }
        assert_eq!(check(|s| s.nets = vec![good; 9]), Err(SpecError::Nets(9)));
    }

    #[test]
    fn a_share_has_a_tag_of_its_own() {
        let share = |tag: &str| ShareSpec { tag: tag.into(), socket: "/s".into() };
        let with = |tags: &[&str]| check(|s| s.shares = tags.iter().map(|tag| share(tag)).collect());
        assert_eq!(with(&["a", &"b".repeat(36)]), Ok(()));
        assert_eq!(with(&["a", "b", "a"]), Err(SpecError::Tag(2)));
        for tag in ["", "a\0", &"b".repeat(37)] {
            assert_eq!(with(&[tag]), Err(SpecError::Tag(0)), "{tag:?}");
        }
        assert_eq!(with(&["a"; 9]), Err(SpecError::Shares(9)));
    }

    #[test]
    fn a_rate_limits_something_and_is_not_for_vhost() {
        let rate = |bytes, operations| {
            Some(RateSpec {
                bytes: std::num::NonZeroU64::new(bytes),
                operations: std::num::NonZeroU64::new(operations),
            })
        };
        let with_disk = |rate| check(|s| s.disks = vec![DiskSpec { rate, ..disk(1, false) }]);
        assert_eq!(with_disk(rate(1, 0)), Ok(()));
        assert_eq!(with_disk(rate(0, 0)), Err(SpecError::DiskRate(0)));
        let with_net = |rate, backend| check(|s| s.nets = vec![NetSpec { rate, backend, ..card() }]);
        assert_eq!(with_net(rate(0, 1), NetBackend::Auto), Ok(()));
        assert_eq!(with_net(rate(1, 1), NetBackend::User), Ok(()));
        assert_eq!(with_net(rate(0, 0), NetBackend::User), Err(SpecError::NetRate(0)));
        assert_eq!(with_net(rate(1, 0), NetBackend::Vhost), Err(SpecError::VhostRate(0)));
        for bad in [r#"{"bytes": 0}"#, r#"{"bytes": -1}"#, r#"{"byte": 1}"#] {
            assert!(serde_json::from_str::<RateSpec>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_command_line_is_one_line() {
        assert_eq!(check(|s| s.command_line = "a\nb".into()), Err(SpecError::CommandLine(1)));
        assert_eq!(check(|s| s.command_line = "a\0".into()), Err(SpecError::CommandLine(1)));
    }

    #[test]
    fn an_unknown_field_is_an_error_that_names_it() {
        let error = serde_json::from_str::<VmSpec>(r#"{"cpus":1,"memory_mib":1,"kernel":"/k","disk":[]}"#);
        assert!(error.unwrap_err().to_string().contains("disk"));
    }
}
