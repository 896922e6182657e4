//! The root filesystem of an image, made once by unpacking its layers inside a virtual machine.
//!
//! The host never parses what a layer contains: it hands the blobs to the unpack VM as one read-only disk, and gets an
//! ext4 image back. Whatever a hostile layer does to the unpacker or to the guest's kernel, it does in there.

use std::sync::Arc;
use std::time::{Duration, Instant};

use images::{Digest, Image, ROOTFS_BYTES, RootfsDraft, RootfsLease, RootfsSlot, Store};
use protocol::{
    BootConfig, Compression, FailureKind, FromGuest, LayerConfig, PROTOCOL_VERSION, UnpackConfig,
};
use vmm::spec::DiskSpec;

use crate::error::{Error, Result, from_images};
use crate::image_limits::Unpacking;
use crate::machine::new_id;
use crate::paths::{Library, Part, Paths};
use crate::progress::Bars;
use crate::vm::{Event, Mailbox, Vm, VmPlan};

/// Memory of the unpack VM. Decompression needs little; the rest is page cache, which makes writing quicker.
const MEMORY_MIB: u32 = 512;
/// The smallest root filesystem, in bytes.
const MIN_ROOTFS_BYTES: u64 = 4 << 30;
/// Most layers unpack to a few times what they take packed. One that does to more is unpacked again, with all the room there is.
const EXPANSION: u64 = 16;
/// A file or directory for so many bytes of a filesystem is allowed, three quarters of what it has inodes for.
const BYTES_AN_ENTRY: u64 = (16 << 10) / 3 * 4;
/// A guest that says nothing for so long is taken for stuck. It tells its progress many times a second.
const SILENCE_LIMIT: Duration = Duration::from_secs(300);
/// Each blob begins at a sector of this many bytes.
const SECTOR: u64 = 512;

/// The image's root filesystem, unpacked now if it has not been before.
///
/// # Errors
/// The image is damaged or too large, the disk is full, or the unpack VM failed. Nothing half-made stays behind.
pub fn ensure(store: &Store, image: &Image, library: &Library, paths: &Paths) -> Result<RootfsLease> {
    if let Some(lease) = store.hold_rootfs(&image.chain_id).map_err(|error| from_images(&error))? {
        return Ok(lease);
    }
    let bars = Bars::on_stderr();
    match store.begin_rootfs(&image.chain_id, &bars).map_err(|error| from_images(&error))? {
        RootfsSlot::Ready(lease) => Ok(lease),
        RootfsSlot::Draft(draft) => {
            let limits = Unpacking::from_environment()?;
            unpack(draft, &Job { store, image, library, paths, bars: &bars, limits })
        }
    }
}

/// An image to be unpacked, and with what.
struct Job<'a> {
    store: &'a Store,
    image: &'a Image,
    library: &'a Library,
    paths: &'a Paths,
    bars: &'a Bars,
    limits: Unpacking,
}

fn unpack(draft: RootfsDraft, job: &Job<'_>) -> Result<RootfsLease> {
    let most = job.limits.most_bytes;
    let bytes = rootfs_bytes(job.image.layer_bytes(), most);
    if let Unpacked::TooLarge(message) = unpack_into(&draft, bytes, job)? {
        let retried =
            if bytes == most { Unpacked::TooLarge(message) } else { unpack_into(&draft, most, job)? };
        if let Unpacked::TooLarge(message) = retried {
            return Err(cannot_unpack(job.image, &message).advice(job.limits.advice()));
        }
    }
    draft.commit().map_err(|error| from_images(&error))
}

/// What became of an unpacking that took its course.
enum Unpacked {
    Whole,
    /// The filesystem has no room for it, as this says.
    TooLarge(String),
}

/// A mount costs the more the larger a filesystem is, however little is in it.
fn rootfs_bytes(layer_bytes: u64, most: u64) -> u64 {
    let wanted = layer_bytes.saturating_mul(EXPANSION).clamp(MIN_ROOTFS_BYTES, ROOTFS_BYTES);
    wanted.next_power_of_two().min(most)
}

fn cannot_unpack(image: &Image, message: &str) -> Error {
    Error::new(format!("cannot unpack {}: {message}", image.name))
        .advice("If the image is good elsewhere, remove it with `flyrun rmi` and pull it again.")
}

fn unpack_into(draft: &RootfsDraft, bytes: u64, job: &Job<'_>) -> Result<Unpacked> {
    let &Job { store, image, library, paths, bars, limits } = job;
    draft.format(store, bytes).map_err(|error| from_images(&error))?;
    let run_dir = Arc::new(paths.make_run_dir(&format!("unpack-{}", new_id()?))?);
    let mut plan = VmPlan {
        vmm: library.path(Part::Vmm),
        kernel: library.path(Part::Kernel),
        initramfs: library.path(Part::InitramfsUnpack),
        cpus: 1,
        memory_mib: MEMORY_MIB,
        nets: vec![],
        shares: vec![],
        disks: vec![
            DiskSpec {
                files: image.layers.iter().map(|layer| layer.path.clone()).collect(),
                read_only: true,
                rate: None,
            },
            DiskSpec { files: vec![draft.path().to_path_buf()], read_only: false, rate: None },
        ],
        new_disk: None,
        boot: BootConfig::Unpack(config(image, bytes)),
        console: Some(run_dir.path().join("console.log")),
        delivery: None,
        streams: None,
        cgroup: None,
        restore: None,
        text: None,
        lock: None,
    };
    let mailbox = Mailbox::new();
    let vm = Vm::start(&mut plan, run_dir, &mailbox.post())?.attend()?;
    let unpacking = bars.unpacking(image.layer_bytes());
    let unpacked = wait(&vm, &mailbox, image, limits, |bytes| unpacking.set_position(bytes));
    unpacking.finish_and_clear();
    unpacked
}

fn config(image: &Image, rootfs_bytes: u64) -> UnpackConfig {
    let mut offset = 0;
    let mut layers = Vec::with_capacity(image.layers.len());
    for layer in &image.layers {
        let compression = match layer.compression {
            images::Compression::None => Compression::None,
            images::Compression::Gzip => Compression::Gzip,
            images::Compression::Zstd => Compression::Zstd,
        };
        layers.push(LayerConfig {
            offset,
            size: layer.size,
            compression,
            diff_id: *layer.diff_id.as_bytes(),
        });
        offset += layer.size.next_multiple_of(SECTOR);
    }
    UnpackConfig {
        layers_device: "/dev/vda".into(),
        target_device: "/dev/vdb".into(),
        layers,
        max_bytes: rootfs_bytes / 4 * 3,
        max_entries: rootfs_bytes / BYTES_AN_ENTRY,
        init_log: false,
    }
}

/// Follows the unpack VM until it has written everything and ended in order. Only both together make a root
/// filesystem: its word, and the reset that comes after the last flush.
fn wait(
    vm: &Vm,
    mailbox: &Mailbox,
    image: &Image,
    limits: Unpacking,
    progress: impl Fn(u64),
) -> Result<Unpacked> {
    let end = Instant::now() + limits.timeout;
    let mut control = None;
    let mut unpacked = false;
    loop {
        // A guest that an image has taken over may go on telling of its progress for ever.
        let late = |_| match Instant::now() >= end {
            true => limits.overdue(&image.name),
            false => Error::new("the unpack VM does not answer").advice("`flyrun doctor` checks the host."),
        };
        if Instant::now() >= end {
            return Err(limits.overdue(&image.name));
        }
        let event = mailbox.next(Some(end.min(Instant::now() + SILENCE_LIMIT))).map_err(late)?;
        match event {
            Event::Connected(connection) => control = Some(connection),
            Event::Guest(FromGuest::Hello { version: PROTOCOL_VERSION }) => {}
            Event::Guest(FromGuest::Hello { version }) => {
                return Err(Error::new(format!(
                    "guest-unpack speaks version {version} of the protocol, flyrun {PROTOCOL_VERSION}"
                ))
                .advice("Install flyrun and its parts from one build."));
            }
            Event::Guest(FromGuest::Unpacking { bytes_read, .. }) => progress(bytes_read),
            Event::Guest(FromGuest::Unpacked { .. }) => {
                unpacked = true;
                drop(control.take());
            }
            Event::Guest(FromGuest::Failed {
                kind: FailureKind::NoSpace | FailureKind::LimitExceeded,
                message,
            }) => return Ok(Unpacked::TooLarge(message)),
            Event::Guest(FromGuest::Failed { message, .. }) => return Err(cannot_unpack(image, &message)),
            Event::ControlClosed(_) => drop(control.take()),
            Event::VmmExited(status) => {
                return match vm.failure(&status) {
                    Some(error) => Err(Error::new(format!("cannot unpack {}: {error}", image.name))),
                    None if unpacked => Ok(Unpacked::Whole),
                    None => {
                        Err(Error::new(format!("cannot unpack {}: the unpack VM ended early", image.name)))
                    }
                };
            }
            Event::Guest(
                FromGuest::Started { .. }
                | FromGuest::Exited(_)
                | FromGuest::Frozen
                | FromGuest::NotFrozen { .. }
                | FromGuest::Resumed
                | FromGuest::Ready
                | FromGuest::Busy { .. }
                | FromGuest::AskTime,
            )
            | Event::OutputDone
            | Event::Snapshotted(_)
            | Event::Signal(_)
            | Event::Asked(_)
            | Event::Checked(_)
            | Event::Forward(_)
            | Event::Resize(_) => {}
        }
    }
}

/// The root filesystems that machines, also stopped ones, and snapshots stand on.
pub fn in_use(machines: &[crate::machine::Record], snapshots: &[crate::snapshot::Record]) -> Vec<Digest> {
    let machines = machines.iter().chain(snapshots.iter().map(|snapshot| &snapshot.machine));
    machines.filter_map(|machine| machine.chain_id.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_filesystem_has_room_for_many_times_its_layers_and_never_more_than_there_is() {
        assert_eq!(rootfs_bytes(0, ROOTFS_BYTES), 4 << 30);
        assert_eq!(rootfs_bytes(300 << 20, ROOTFS_BYTES), 8 << 30);
        assert_eq!(rootfs_bytes((4 << 30) + 1, ROOTFS_BYTES), ROOTFS_BYTES);
        assert_eq!(rootfs_bytes(u64::MAX, ROOTFS_BYTES), ROOTFS_BYTES);
        assert_eq!(rootfs_bytes(0, 1 << 30), 1 << 30);
        assert_eq!(rootfs_bytes(300 << 20, 5 << 30), 5 << 30);
    }
}
