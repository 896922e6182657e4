//! The root filesystem of an image, made once by unpacking its layers inside a virtual machine.
//!
//! The host never parses what a layer contains: it hands the blobs to the unpack VM as one read-only disk, and gets an
//! ext4 image back. Whatever a hostile layer does to the unpacker or to the guest's kernel, it does in there.

use std::sync::Arc;
use std::time::{Duration, Instant};

use images::{Digest, Image, RootfsDraft, RootfsLease, RootfsSlot, Store};
use protocol::{BootConfig, Compression, FromGuest, LayerConfig, PROTOCOL_VERSION, UnpackConfig};
use vmm::spec::DiskSpec;

use crate::error::{Error, Result, from_images};
use crate::machine::new_id;
use crate::paths::{Library, Part, Paths};
use crate::progress::Bars;
use crate::vm::{Event, Mailbox, Vm, VmPlan};

/// Memory of the unpack VM. Decompression needs little; the rest is page cache, which makes writing quicker.
const MEMORY_MIB: u32 = 512;
/// An image that unpacks to more than this is refused.
const MAX_BYTES: u64 = 48 << 30;
/// An image with more files than this is refused; the template has inodes for about 4 million.
const MAX_ENTRIES: u64 = 3_000_000;
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
        RootfsSlot::Draft(draft) => unpack(image, draft, library, paths, &bars),
    }
}

fn unpack(
    image: &Image,
    draft: RootfsDraft,
    library: &Library,
    paths: &Paths,
    bars: &Bars,
) -> Result<RootfsLease> {
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
        boot: BootConfig::Unpack(config(image)),
        console: Some(run_dir.path().join("console.log")),
        delivery: None,
        streams: None,
        cgroup: None,
        restore: None,
        lock: None,
    };
    let mailbox = Mailbox::new();
    let vm = Vm::start(&mut plan, run_dir, &mailbox.post())?;
    let unpacking = bars.unpacking(image.layer_bytes());
    wait(&vm, &mailbox, image, |bytes| unpacking.set_position(bytes))?;
    unpacking.finish_and_clear();
    drop(vm);
    draft.commit().map_err(|error| from_images(&error))
}

fn config(image: &Image) -> UnpackConfig {
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
        max_bytes: MAX_BYTES,
        max_entries: MAX_ENTRIES,
        init_log: false,
    }
}

/// Follows the unpack VM until it has written everything and ended in order. Only both together make a root
/// filesystem: its word, and the reset that comes after the last flush.
fn wait(vm: &Vm, mailbox: &Mailbox, image: &Image, progress: impl Fn(u64)) -> Result<()> {
    let mut control = None;
    let mut unpacked = false;
    loop {
        let late = |_| Error::new("the unpack VM does not answer").advice("`flyrun doctor` checks the host.");
        let event = mailbox.next(Some(Instant::now() + SILENCE_LIMIT)).map_err(late)?;
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
            Event::Guest(FromGuest::Failed { message, .. }) => {
                return Err(Error::new(format!("cannot unpack {}: {message}", image.name)).advice(
                    "If the image is good elsewhere, remove it with `flyrun rmi` and pull it again.",
                ));
            }
            Event::ControlClosed(_) => drop(control.take()),
            Event::VmmExited(status) => {
                return match vm.failure(&status) {
                    Some(error) => Err(Error::new(format!("cannot unpack {}: {error}", image.name))),
                    None if unpacked => Ok(()),
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
