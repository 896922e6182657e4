//! `guest-unpack`: applies an image's layers, in order, to an empty filesystem.
//!
//! The parts from [`image`] on work on any directory; only this file knows that it is a machine's disk.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

use protocol::{BootConfig, FailureKind, FromGuest, LayerConfig, UnpackConfig};
use rustix::{
    fs::{AtFlags, Mode, StatVfs, fstatvfs, unlinkat},
    mount::{MountFlags, UnmountFlags, unmount},
    process::{Resource, Rlimit, setrlimit, umask},
};

use crate::{
    control::Control,
    failure::{Failure, OrSetup},
    pid1::mount_at,
    step_log::StepLog,
};

pub mod blob;
pub mod image;
pub mod layer;
pub mod path;
pub mod tar;
pub mod tree;
pub mod xattr;

const TARGET: &str = "/target";
const PROGRESS_INTERVAL: Duration = Duration::from_millis(50);
/// Deeply nested directories are removed with one descriptor a level.
const MAX_OPEN_FILES: u64 = 8192;

/// Unpacks all layers and reports the result.
///
/// # Errors
/// [`Failure`] for whatever keeps the image from being unpacked; the target is then of no use.
pub fn run(config: BootConfig, control: &mut Control) -> Result<(), Failure> {
    let BootConfig::Unpack(config) = config else {
        let message = "this initramfs unpacks images, and was told to run a workload";
        return Err(Failure::new(FailureKind::BadConfig, message));
    };
    let mut log = StepLog::new(config.init_log);
    log.step("config read");
    let outcome = unpack(&config, control, &mut log);
    log.flush();
    control.send(&outcome?);
    control.farewell();
    Ok(())
}

fn unpack(config: &UnpackConfig, control: &mut Control, log: &mut StepLog) -> Result<FromGuest, Failure> {
    umask(Mode::empty());
    let limit = Rlimit { current: Some(MAX_OPEN_FILES), maximum: Some(MAX_OPEN_FILES) };
    setrlimit(Resource::Nofile, limit).or_setup(|| "set the limit of open files".into())?;
    mount_at("proc", "/proc", "proc", MountFlags::empty(), "")?;
    mount_at(&config.target_device, TARGET, "ext4", MountFlags::NOATIME, "noinit_itable")?;
    control.establish()?;
    log.step("target mounted");

    let root = tree::open_root(TARGET)?;
    let _ = unlinkat(&root, "lost+found", AtFlags::REMOVEDIR);
    let before = statistics(&root)?;
    let device = File::open(&config.layers_device).map_err(|error| {
        Failure::new(FailureKind::Setup, format!("cannot open {}: {error}", config.layers_device))
    })?;
    let limits = layer::Limits { bytes: config.max_bytes, entries: config.max_entries };
    let keep = root.try_clone().map_err(|error| Failure::new(FailureKind::Setup, error.to_string()))?;
    let mut unpacker = image::Unpacker::new(root, limits)?;
    let mut progress = Progress { control, bytes_read: 0, last: None };
    for (index, layer) in config.layers.iter().enumerate() {
        let raw = Section::new(&device, layer, index as u32, &mut progress);
        unpacker.apply(raw, layer.compression, &layer.diff_id)?;
        log.step(&format!("layer {index} applied"));
    }
    unpacker.finish()?;
    rustix::fs::syncfs(&keep).map_err(tree::kernel_failure)?;
    let after = statistics(&keep)?;
    drop(keep);
    unmount(TARGET, UnmountFlags::empty()).or_setup(|| format!("unmount {TARGET}"))?;
    log.step("target unmounted");
    let used = |stat: &StatVfs| stat.f_blocks.saturating_sub(stat.f_bfree).saturating_mul(stat.f_frsize);
    let inodes = |stat: &StatVfs| stat.f_files.saturating_sub(stat.f_ffree);
    Ok(FromGuest::Unpacked {
        bytes: used(&after).saturating_sub(used(&before)),
        entries: inodes(&after).saturating_sub(inodes(&before)),
    })
}

fn statistics(root: &impl std::os::fd::AsFd) -> Result<StatVfs, Failure> {
    fstatvfs(root).or_setup(|| format!("look at {TARGET}"))
}

/// Tells the host how far it is, not more often than it can be seen.
struct Progress<'a> {
    control: &'a mut Control,
    bytes_read: u64,
    last: Option<Instant>,
}

impl Progress<'_> {
    fn add(&mut self, layer: u32, count: u64) {
        self.bytes_read = self.bytes_read.saturating_add(count);
        if self.last.is_none_or(|last| last.elapsed() >= PROGRESS_INTERVAL) {
            self.control.send_droppable(&FromGuest::Unpacking { layer, bytes_read: self.bytes_read });
            self.last = Some(Instant::now());
        }
    }
}

/// One layer's part of the device.
struct Section<'a, 'b> {
    device: &'a File,
    offset: u64,
    left: u64,
    layer: u32,
    progress: &'a mut Progress<'b>,
}

impl<'a, 'b> Section<'a, 'b> {
    fn new(device: &'a File, layer: &LayerConfig, index: u32, progress: &'a mut Progress<'b>) -> Self {
        Self { device, offset: layer.offset, left: layer.size, layer: index, progress }
    }
}

impl Read for Section<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let buffer = buffer.get_mut(..wanted).unwrap_or_default();
        let count = self.device.read_at(buffer, self.offset)?;
        self.offset = self.offset.saturating_add(count as u64);
        self.left -= count as u64;
        self.progress.add(self.layer, count as u64);
        Ok(count)
    }
}
