//! Whether a snapshot from elsewhere may become one here: pure.

use images::Digest;
use vmm::snapshot::header::Header;
use vmm::snapshot::identity::FileId;
use vmm::snapshot::{BASE, MEMORY, STATE};

use super::{Described, Manifest, NAMES, ROOTFS, VERSION};
use crate::cpus;
use crate::guest_files;
use crate::launch::is_hostname;
use crate::machine::health::Healthcheck;
use crate::machine::{self, Config, DISK, MAX_DISK, MAX_LOG_FILES, MAX_STOP_TIMEOUT_S, MIN_LOG, is_name};
use crate::network::Mode;
use crate::snapshot;

/// The longest name of an image that is believed, in characters.
const MAX_IMAGE: usize = 1000;
/// The shortest time between two health checks, in ms.
const MIN_PERIOD_MS: u64 = 1;
/// The most ports that are published.
const MAX_PORTS: usize = 4096;

type Judged = Result<(), String>;

fn ensure(good: bool, why: impl FnOnce() -> String) -> Judged {
    if good { Ok(()) } else { Err(why()) }
}

/// Before anything else is read.
///
/// # Errors
/// Why not.
pub fn manifest(manifest: &Manifest) -> Judged {
    let record = &manifest.record;
    ensure(manifest.version <= VERSION, || {
        format!(
            "it has version {}, and those up to {VERSION} are known here; use a newer flyrun",
            manifest.version
        )
    })?;
    let versions = (record.version, record.machine.version);
    ensure(versions == (snapshot::VERSION, machine::VERSION), || {
        format!("its record has version {}.{}, which this flyrun does not read", versions.0, versions.1)
    })?;
    let names: Vec<_> = manifest.files.iter().map(|file| file.name.as_str()).collect();
    let wanted =
        [true, true, names.contains(&BASE), record.machine.config.disk.is_some(), names.contains(&ROOTFS)];
    let expected: Vec<_> =
        NAMES.iter().zip(wanted).filter_map(|(name, wanted)| wanted.then_some(*name)).collect();
    ensure(names == expected, || "its list of files is not one that flyrun writes".into())?;
    let bytes = |file: &Described| match file.name.as_str() {
        STATE => file.bytes <= vmm::snapshot::format::MAX_FILE_BYTES,
        MEMORY | BASE => file.bytes <= u64::from(vmm::validate::MAX_MEMORY_MIB) << 20,
        DISK => file.bytes <= MAX_DISK.0,
        _ => file.bytes <= images::ROOTFS_BYTES,
    };
    let all = manifest.files.iter().chain([&manifest.rootfs]);
    ensure(all.clone().all(bytes), || "one of its files is longer than any can be".into())?;
    let rootfs = manifest.files.iter().find(|file| file.name == ROOTFS);
    ensure(rootfs.is_none_or(|rootfs| *rootfs == manifest.rootfs), || {
        "it tells of two root filesystems".into()
    })?;
    machine(&record.machine)?;
    ensure(is_name(&record.name), || "the snapshot's name is none".into())
}

/// What the record asks of its host.
fn machine(record: &machine::Record) -> Judged {
    let config = &record.config;
    ensure(is_name(&record.id) && is_name(&record.name), || "the machine's name is none".into())?;
    let is_text = record.image.chars().count() <= MAX_IMAGE && !record.image.contains(char::is_control);
    ensure(is_text, || "the image's name is none".into())?;
    ensure(record.chain_id.parse::<Digest>().is_ok(), || "the image's chain id is none".into())?;
    ensure(config.volumes.is_empty() && config.run.volumes.is_empty(), || {
        "its machine has volumes, which are this host's".into()
    })?;
    ensure(config.shares.is_empty() && config.run.shares.is_empty(), || {
        "its machine has directories of the host".into()
    })?;
    ensure(config.secrets.is_none(), || "its machine asks for secrets of this host".into())?;
    ensure(config.kernel.is_none(), || "its machine names a kernel's file of the host".into())?;
    ensure(is_sane(config), || "its machine's configuration is not one that flyrun makes".into())
}

fn is_sane(config: &Config) -> bool {
    let log =
        config.log.is_none_or(|log| log.max_size >= MIN_LOG && (1..=MAX_LOG_FILES).contains(&log.max_files));
    let is_check = |health: &Healthcheck| {
        [health.interval_ms, health.start_interval_ms, health.timeout_ms]
            .iter()
            .all(|ms| *ms >= MIN_PERIOD_MS)
            && health.retries > 0
    };
    log && config.health.as_ref().is_none_or(is_check)
        && (1..=64).contains(&config.stop_signal)
        && config.stop_timeout_s <= MAX_STOP_TIMEOUT_S
        && (config.run.hostname.is_empty() || is_hostname(&config.run.hostname))
        && (1..=cpus::MAX).contains(&config.cpus.into())
        && config.network.publish.len() <= MAX_PORTS
        && guest_files::check(&config.files).is_ok()
        && config.run.delivery.is_none()
}

/// With the header of `state`.
///
/// # Errors
/// The two do not tell of one machine.
pub fn header(manifest: &Manifest, header: &Header) -> Judged {
    let (config, spec) = (&manifest.record.machine.config, &header.spec);
    let length = |name: &str| manifest.files.iter().find(|file| file.name == name).map(|file| file.bytes);
    ensure(config.cpus == spec.cpus && config.memory.to_mib() == u64::from(spec.memory_mib), || {
        "its record and its state tell of machines of different size".into()
    })?;
    let bytes = u64::from(spec.memory_mib) << 20;
    let memory = header.memory.bytes == bytes && length(MEMORY) == Some(bytes);
    let base = length(BASE) == header.memory.base.then_some(bytes);
    ensure(memory && base, || "its memory is not as long as its state tells".into())?;
    let has_card = config.network.mode != Mode::None;
    let parts = spec.nets.len() == usize::from(has_card) && spec.shares.is_empty() && spec.vsock.is_some();
    ensure(parts, || "its record and its state tell of machines with different parts".into())?;
    let disks: Vec<_> = disks(header);
    let mut lengths = vec![manifest.rootfs.bytes];
    lengths.extend(length(DISK));
    let same = disks.len() == lengths.len()
        && spec.disks.len() == lengths.len()
        && disks.iter().zip(&lengths).all(|(disk, bytes)| {
            disk.is_some_and(|disk| disk.bytes == *bytes && disk.modified_ns.is_some_and(|at| at >= 0))
        });
    ensure(same, || "its disks are not as its state tells".into())
}

/// The disks that the state tells of; `None` for one that is not a file.
pub fn disks(header: &Header) -> Vec<Option<&FileId>> {
    header.disks.iter().flatten().map(|disk| disk.files.first().filter(|_| disk.files.len() == 1)).collect()
}
