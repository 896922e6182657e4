//! The root filesystem: the image below, the machine's disk above, and guest-init's process in it.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
    time::Duration,
};

use protocol::{FailureKind, RunConfig};
use rustix::{
    fs::{Mode, OFlags, open},
    io::Errno,
    mount::{MountFlags, mount_move},
    process::{chdir, chroot},
};

use crate::{
    failure::{Failure, OrSetup},
    pid1::{ensure_directory, mount_at},
    step_log::StepLog,
    sys,
};

/// How much of the image is read at a time, in sectors of 512 bytes. A request costs a machine more than the bytes do: most
/// often the host has them in memory.
const READ_AHEAD_SECTORS: usize = 1024;

const LOWER: &str = "/rootfs";
const DISK: &str = "/disk";
const NEW_ROOT: &str = "/newroot";

/// The machine's own disk, mounted, with the directories that the overlay wants of it.
#[derive(Debug)]
pub struct Disk {
    device: String,
    root: OwnedFd,
}

impl Disk {
    /// Mounts it.
    ///
    /// # Errors
    /// [`protocol::FailureKind::Setup`] naming the step.
    pub fn mount(device: &str) -> Result<Self, Failure> {
        wait_for_device(device);
        // No background work in a machine that may live for milliseconds: neither zeroing of inode tables (the host's
        // file is sparse, they read as zeros) nor reading of all bitmaps ahead.
        mount_at(device, DISK, "ext4", MountFlags::NOATIME, "noinit_itable,no_prefetch_block_bitmaps")?;
        look_at_one_group(device);
        make_directories()?;
        let root = open(DISK, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        Ok(Self { device: device.into(), root: root.or_setup(|| "open the machine's disk".into())? })
    }

    /// Whether this block device is it.
    pub fn is(&self, device: &str) -> bool {
        self.device == device
    }

    /// Writes all of it out, so that as little as possible is on it.
    ///
    /// # Errors
    /// [`protocol::FailureKind::Setup`].
    pub fn settle(&self) -> Result<(), Failure> {
        rustix::fs::syncfs(&self.root).or_setup(|| "write the machine's disk out".into())?;
        // Without it there is more to copy, and that is all.
        let _ = sys::empty_journal(self.root.as_fd());
        Ok(())
    }
}

/// Mounts the image and the disk over it, which may be mounted already, and makes the result this process's root directory. Returns the
/// root of the machine's disk, to bring it into a clean state at the end.
///
/// # Errors
/// [`protocol::FailureKind::Setup`] naming the filesystem.
pub fn enter(
    config: &RunConfig,
    mounted: Option<Disk>,
    log: &mut StepLog,
) -> Result<Option<OwnedFd>, Failure> {
    if mounted.as_ref().is_some_and(|disk| config.disk.as_ref() != Some(&disk.device)) {
        let message = "the machine has waited with another disk than it is to have";
        return Err(Failure::new(FailureKind::Setup, message));
    }
    mount_image(&config.rootfs, LOWER)?;
    log.step("image mounted");
    let disk = match (&config.disk, mounted) {
        (Some(device), mounted) => {
            let disk = mounted.map_or_else(|| Disk::mount(device), Ok)?;
            log.step("disk mounted");
            mount_overlay()?;
            Some(disk.root)
        }
        (None, _) => {
            if must_make_directories(config) {
                // As docker does, directories that the user names are made also where the workload may not write.
                mount_at("tmpfs", DISK, "tmpfs", MountFlags::empty(), "mode=755")?;
                make_directories()?;
                mount_overlay()?;
            } else {
                mount_move(LOWER, NEW_ROOT).or_setup(|| "mount the root filesystem".into())?;
            }
            None
        }
    };
    // pivot_root(2) refuses to leave an initramfs, so the new root is moved over the old one; a chroot alone would
    // deny user namespaces to the workload.
    chdir(NEW_ROOT)
        .and_then(|()| mount_move(".", "/"))
        .and_then(|()| chroot("."))
        .and_then(|()| chdir("/"))
        .or_setup(|| "move into the root filesystem".into())?;
    Ok(disk)
}

/// Whether the image lacks a directory, or a file to be covered, that the user's flags or the image's configuration name.
fn must_make_directories(config: &RunConfig) -> bool {
    let volumes = config.volumes.iter().map(|volume| &volume.path);
    let mounts = volumes.chain(config.shares.iter().map(|share| &share.path));
    let files = config.delivery.iter().flat_map(|delivery| &delivery.paths);
    let wanted = config.tmpfs.iter().map(|tmpfs| &tmpfs.path).chain(mounts).chain(files);
    wanted.chain([&config.workdir]).any(|path| rustix::fs::lstat(format!("{LOWER}/{path}")).is_err())
}

/// Takes the right to write from a root without a disk, once every directory in it has been made.
///
/// # Errors
/// [`protocol::FailureKind::Setup`] when the kernel refuses.
pub fn seal(config: &RunConfig) -> Result<(), Failure> {
    if config.disk.is_some() {
        return Ok(());
    }
    let flags = MountFlags::BIND | MountFlags::RDONLY;
    rustix::mount::mount_remount("/", flags, "").or_setup(|| "make the root filesystem read-only".into())
}

/// The image has no journal and its device is read-only, so there is nothing to replay.
fn mount_image(device: &str, target: &str) -> Result<(), Failure> {
    wait_for_device(device);
    // Without it the image is read all the same.
    let _ = open(device, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .and_then(|disk| sys::set_read_ahead(disk.as_fd(), READ_AHEAD_SECTORS));
    mount_at(device, target, "ext4", MountFlags::RDONLY, "")
}

/// The first time it looks for free blocks, ext4 reads the bitmaps of a whole flex group at once, which is all of a disk of ours: some
/// 50 µs for each 128 MiB, where the first group of blocks has room.
pub fn look_at_one_group(device: &str) {
    let name = device.rsplit('/').next().unwrap_or_default();
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let _ = open(format!("/sys/fs/ext4/{name}/mb_prefetch"), flags, Mode::empty())
        .and_then(|file| rustix::io::write(file, b"1"));
}

/// Those that the overlay wants.
fn make_directories() -> Result<(), Failure> {
    for directory in ["/disk/upper", "/disk/work"] {
        ensure_directory(directory).or_setup(|| format!("make {directory}"))?;
    }
    Ok(())
}

fn mount_overlay() -> Result<(), Failure> {
    // Directories of the image can be renamed, and a chmod or chown copies no data: the image below never changes,
    // which is the condition of both.
    let options = format!(
        "lowerdir={LOWER},upperdir={DISK}/upper,workdir={DISK}/work,redirect_dir=on,metacopy=on,xino=auto"
    );
    mount_at("overlay", NEW_ROOT, "overlay", MountFlags::empty(), &options)
}

/// A disk whose driver is still probing appears within milliseconds; a missing one is for mount to report.
pub fn wait_for_device(device: &str) {
    for _ in 0..1000 {
        if !matches!(rustix::fs::stat(Path::new(device)), Err(Errno::NOENT)) {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
