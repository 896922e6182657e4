//! Volumes: filesystems of their own that outlive machines, each on a block device.
//!
//! A new volume begins with what the image has in its place, owner and all, as docker's do: a database finds its data
//! directory as its package made it.

use std::{
    fs::File,
    os::fd::{AsFd, OwnedFd},
};

use protocol::{FailureKind, ShareConfig, VolumeConfig};
use rustix::{
    fs::{
        AtFlags, CWD, FileType, Gid, Mode, OFlags, RawDir, Stat, Timespec, Timestamps, Uid, XattrFlags,
        chmodat, chownat, fgetxattr, flistxattr, fsetxattr, fstat, futimens, mkdirat, mknodat, openat,
        readlinkat, statat, symlinkat, unlinkat, utimensat,
    },
    io::Errno,
    mount::MountFlags,
};

use super::{
    root::{look_at_one_group, wait_for_device},
    shares,
};
use crate::{
    failure::{Failure, OrSetup},
    pid1::mount_at,
    sys,
};

/// In the root of a volume while the image's content is copied to it: a boot that finds it starts over.
const COPYING: &str = ".flyrun-copying";
/// Directories within directories that are copied; deeper ones no image has.
const MAX_DEPTH: usize = 256;
/// The kernel's bound of a list of names and of a value (XATTR_LIST_MAX, XATTR_SIZE_MAX).
const MAX_XATTR: usize = 64 * 1024;

/// Mounts all volumes and directories of the host, those first that others lie in, and gives the volumes' roots, to be synced
/// at the end.
///
/// # Errors
/// [`FailureKind::BadConfig`] for a path that is none, [`FailureKind::Setup`] naming the mount, [`FailureKind::NoSpace`]
/// when the image's content does not fit.
pub fn mount_all(volumes: &[VolumeConfig], shares: &[ShareConfig]) -> Result<Vec<OwnedFd>, Failure> {
    let depth = |path: &str| path.split('/').filter(|part| !part.is_empty()).count();
    let volumes = volumes.iter().map(|volume| (depth(&volume.path), Ok(volume)));
    let shares = shares.iter().map(|share| (depth(&share.path), Err(share)));
    let mut mounts: Vec<_> = volumes.chain(shares).collect();
    mounts.sort_by_key(|(depth, _)| *depth);
    let mut roots = Vec::new();
    for (_, mount) in mounts {
        match mount {
            Ok(volume) => roots.push(mount_volume(volume)?),
            Err(share) => shares::mount_share(share)?,
        }
    }
    Ok(roots)
}

/// Whether something can be mounted there.
///
/// # Errors
/// [`FailureKind::BadConfig`] for a path that is none.
pub fn check_path(path: &str) -> Result<(), Failure> {
    if !path.starts_with('/') || path.split('/').any(|part| part == "..") || path.trim_matches('/').is_empty()
    {
        let message = format!("volume path {path:?} is not an absolute path without \"..\"");
        return Err(Failure::new(FailureKind::BadConfig, message));
    }
    Ok(())
}

fn mount_volume(volume: &VolumeConfig) -> Result<OwnedFd, Failure> {
    let path = &volume.path;
    check_path(path)?;
    let image = open_directory(CWD.as_fd(), path.as_str()).ok();
    wait_for_device(&volume.device);
    if volume.read_only {
        // A volume whose last writer was killed has a journal to replay, which cannot be written: it is left aside.
        mount_at(&volume.device, path, "ext4", MountFlags::RDONLY, "")
            .or_else(|_| mount_at(&volume.device, path, "ext4", MountFlags::RDONLY, "noload"))?;
    } else {
        mount_at(
            &volume.device,
            path,
            "ext4",
            MountFlags::empty(),
            "noinit_itable,no_prefetch_block_bitmaps",
        )?;
        look_at_one_group(&volume.device);
    }
    let root =
        open_directory(CWD.as_fd(), path.as_str()).or_setup(|| format!("open the volume at {path}"))?;
    if !volume.read_only {
        sys::grow_filesystem(root.as_fd()).or_setup(|| format!("grow the volume at {path}"))?;
        if let Some(image) = image {
            fill(&image, &root).or_setup(|| format!("copy the image's {path} to its volume"))?;
        }
    }
    Ok(root)
}

fn open_directory(
    at: std::os::fd::BorrowedFd<'_>,
    path: impl rustix::path::Arg,
) -> rustix::io::Result<OwnedFd> {
    openat(at, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// Copies the image's directory to a volume that nobody has used yet.
fn fill(image: &OwnedFd, volume: &OwnedFd) -> rustix::io::Result<()> {
    // mke2fs made it; programs that want an empty directory are right to complain.
    let _ = unlinkat(volume, "lost+found", AtFlags::REMOVEDIR);
    let interrupted = statat(volume, COPYING, AtFlags::SYMLINK_NOFOLLOW).is_ok();
    if !interrupted && !is_empty(volume)? {
        return Ok(());
    }
    if interrupted {
        empty(volume, 0)?;
    }
    openat(volume, COPYING, OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC, Mode::from_raw_mode(0o600))?;
    copy_content(image, volume, 0)?;
    copy_attributes(image, volume, &fstat(image)?)?;
    rustix::fs::syncfs(volume)?;
    unlinkat(volume, COPYING, AtFlags::empty())
}

fn names(directory: &OwnedFd) -> rustix::io::Result<Vec<std::ffi::CString>> {
    let mut buffer = Vec::with_capacity(32 * 1024);
    // A descriptor of its own: the position in a directory is shared by duplicates.
    let own = open_directory(directory.as_fd(), ".")?;
    let mut entries = RawDir::new(own, buffer.spare_capacity_mut());
    let mut names = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    Ok(names)
}

fn is_empty(directory: &OwnedFd) -> rustix::io::Result<bool> {
    names(directory).map(|names| names.is_empty())
}

/// Removes everything in a directory but the mark of an interrupted copy.
fn empty(directory: &OwnedFd, depth: usize) -> rustix::io::Result<()> {
    for name in names(directory)? {
        if depth == 0 && name.as_bytes() == COPYING.as_bytes() {
            continue;
        }
        match unlinkat(directory, &name, AtFlags::empty()) {
            Err(Errno::ISDIR) if depth < MAX_DEPTH => {
                let inner = openat(
                    directory,
                    &name,
                    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                    Mode::empty(),
                )?;
                empty(&inner, depth + 1)?;
                unlinkat(directory, &name, AtFlags::REMOVEDIR)?;
            }
            other => other?,
        }
    }
    Ok(())
}

fn copy_content(from: &OwnedFd, to: &OwnedFd, depth: usize) -> rustix::io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(Errno::NAMETOOLONG);
    }
    for name in names(from)? {
        let stat = statat(from, &name, AtFlags::SYMLINK_NOFOLLOW)?;
        let own = Mode::from_raw_mode(0o700);
        let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                mkdirat(to, &name, own)?;
                let flags = flags | OFlags::RDONLY | OFlags::DIRECTORY;
                let (source, target) =
                    (openat(from, &name, flags, Mode::empty())?, openat(to, &name, flags, Mode::empty())?);
                copy_content(&source, &target, depth + 1)?;
                copy_attributes(&source, &target, &stat)?;
            }
            FileType::RegularFile => {
                let source = openat(from, &name, flags | OFlags::RDONLY, Mode::empty())?;
                let target = openat(to, &name, flags | OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL, own)?;
                let (mut reader, mut writer) = (File::from(source), File::from(target));
                std::io::copy(&mut reader, &mut writer)
                    .map_err(|error| error.raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error))?;
                copy_attributes(&reader.into(), &writer.into(), &stat)?;
            }
            FileType::Symlink => {
                symlinkat(readlinkat(from, &name, Vec::new())?, to, &name)?;
                copy_owner_and_times(to, &name, &stat)?;
            }
            kind => {
                mknodat(to, &name, kind, Mode::from_raw_mode(stat.st_mode), stat.st_rdev)?;
                copy_owner_and_times(to, &name, &stat)?;
                chmodat(to, &name, Mode::from_raw_mode(stat.st_mode), AtFlags::empty())?;
            }
        }
    }
    Ok(())
}

fn times(stat: &Stat) -> Timestamps {
    let time = |seconds, nanoseconds: u64| Timespec { tv_sec: seconds, tv_nsec: nanoseconds as i64 };
    Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    }
}

fn copy_owner_and_times(to: &OwnedFd, name: &std::ffi::CStr, stat: &Stat) -> rustix::io::Result<()> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    chownat(to, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    utimensat(to, name, &times(stat), AtFlags::SYMLINK_NOFOLLOW)
}

/// Owner, mode, extended attributes, times: in the order in which none undoes another.
fn copy_attributes(from: &OwnedFd, to: &OwnedFd, stat: &Stat) -> rustix::io::Result<()> {
    rustix::fs::fchown(to, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
    rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    copy_xattrs(from, to)?;
    futimens(to, &times(stat))
}

fn copy_xattrs(from: &OwnedFd, to: &OwnedFd) -> rustix::io::Result<()> {
    let mut list = vec![0_u8; MAX_XATTR];
    let length = match flistxattr(from, &mut list) {
        Err(Errno::NOTSUP) => return Ok(()),
        other => other?,
    };
    let mut value = vec![0_u8; MAX_XATTR];
    for name in
        list.get(..length).unwrap_or_default().split(|&byte| byte == 0).filter(|name| !name.is_empty())
    {
        // Those of the overlay belong to it and not to the file.
        if name.starts_with(b"trusted.overlay.") {
            continue;
        }
        let length = fgetxattr(from, name, &mut value)?;
        fsetxattr(to, name, value.get(..length).unwrap_or_default(), XattrFlags::empty())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    fn directory(path: &std::path::Path) -> OwnedFd {
        open_directory(CWD.as_fd(), path).unwrap()
    }

    fn image() -> tempfile::TempDir {
        let image = tempfile::tempdir().unwrap();
        let path = image.path();
        std::fs::create_dir(path.join("inner")).unwrap();
        std::fs::write(path.join("inner/file"), "content").unwrap();
        std::fs::set_permissions(path.join("inner/file"), std::fs::Permissions::from_mode(0o4640)).unwrap();
        symlink("inner/file", path.join("link")).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o2750)).unwrap();
        image
    }

    #[test]
    fn a_new_volume_gets_what_the_image_has() {
        let (image, volume) = (image(), tempfile::tempdir().unwrap());
        std::fs::create_dir(volume.path().join("lost+found")).unwrap();
        fill(&directory(image.path()), &directory(volume.path())).unwrap();
        let path = volume.path();
        assert_eq!(std::fs::read(path.join("inner/file")).unwrap(), b"content");
        assert_eq!(std::fs::metadata(path.join("inner/file")).unwrap().mode() & 0o7777, 0o4640);
        assert_eq!(std::fs::read_link(path.join("link")).unwrap().to_str(), Some("inner/file"));
        assert_eq!(std::fs::metadata(path).unwrap().mode() & 0o7777, 0o2750);
        assert_eq!(std::fs::read_dir(path).unwrap().count(), 2);
        let times = |path: &std::path::Path| std::fs::metadata(path).unwrap().modified().unwrap();
        assert_eq!(times(&path.join("inner")), times(&image.path().join("inner")));
    }

    #[test]
    fn a_volume_in_use_is_left_as_it_is() {
        let (image, volume) = (image(), tempfile::tempdir().unwrap());
        std::fs::write(volume.path().join("mine"), "").unwrap();
        fill(&directory(image.path()), &directory(volume.path())).unwrap();
        assert_eq!(std::fs::read_dir(volume.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_copy_that_was_interrupted_starts_over() {
        let (image, volume) = (image(), tempfile::tempdir().unwrap());
        std::fs::write(volume.path().join(COPYING), "").unwrap();
        std::fs::create_dir_all(volume.path().join("inner/half/deep")).unwrap();
        std::fs::write(volume.path().join("inner/half/deep/file"), "").unwrap();
        fill(&directory(image.path()), &directory(volume.path())).unwrap();
        assert!(!volume.path().join("inner/half").exists() && !volume.path().join(COPYING).exists());
        assert_eq!(std::fs::read(volume.path().join("inner/file")).unwrap(), b"content");
    }

    #[test]
    fn a_path_must_lead_somewhere_below_the_root() {
        for path in ["", "data", "/", "//", "/a/../b"] {
            let volume = VolumeConfig { device: "/dev/vdz".into(), path: path.into(), read_only: false };
            assert_eq!(mount_volume(&volume).unwrap_err().kind, FailureKind::BadConfig, "{path}");
        }
    }
}
