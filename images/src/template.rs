//! Empty ext4 filesystems, made once by mke2fs and copied.
//!
//! mke2fs costs more than a boot would (10 to 20 ms), a sparse copy of what it made does not. The options are chosen here
//! and nowhere else; `/etc/mke2fs.conf` is not read, so that every host makes the same filesystem.
//!
//! - **Rootfs**: 64 GiB logical at most, so that no image is too large, and then 196 KiB on the disk; less for most, as a mount looks at
//!   each group of 128 MiB. Without a journal (a failed unpack
//!   is thrown away, a finished one never written again), without backup superblocks worth the name (`sparse_super2`),
//!   all group metadata in one place (`packed_meta_blocks`, one flex group), no reserved blocks, an inode for 16 KiB. Checksums
//!   only of group descriptors: each layer's SHA-256 was checked, and the file can be made anew.
//! - **Disk**: a machine's own writable disk. It outlives kills of the machine, so it has a journal, of 16 MiB: the usual
//!   64 MiB are for many writers on slow disks, and a suspended machine's disk is copied for every clone. Metadata has
//!   checksums, for there is no second copy of what it holds.
//!
//! - **Volume**: as a disk, but laid out so that a mounted one can grow, which the kernel does not do with `sparse_super2`
//!   (fs/ext4/resize.c).
//!
//! In all of them the inode tables count as zeroed (they are holes), so that the guest's kernel starts no lazy initialization that
//! would write a gigabyte of zeros into them. UUID and hash seed are fixed: the same options give the same filesystem.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::{Error, Result, Store, store::files};

/// The largest root filesystem, in bytes. Sparse: an empty one takes about 200 KiB.
pub const ROOTFS_BYTES: u64 = 64 << 30;
/// Size of a machine's own disk unless the user says otherwise, in bytes.
pub const DISK_DEFAULT_BYTES: u64 = 10 << 30;
/// The smallest filesystem, in bytes: below this the journal has no room.
pub const MIN_BYTES: u64 = 64 << 20;
/// The largest filesystem, in bytes: 32-bit block numbers end at 16 TiB.
pub const MAX_BYTES: u64 = 8 << 40;

/// Raised when the options below change, so that old templates are not taken for new ones.
const OPTIONS_VERSION: u32 = 1;
const BLOCK_BYTES: u64 = 4096;
/// Enough of what mke2fs complains of.
const STDERR_LIMIT: usize = 2000;

/// What an empty filesystem is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TemplateKind {
    /// An image's unpacked root filesystem: written once by the unpack VM, then only read.
    Rootfs,
    /// A machine's own disk.
    Disk,
    /// A volume, which outlives machines and can grow.
    Volume,
}

impl TemplateKind {
    fn name(self) -> &'static str {
        match self {
            Self::Rootfs => "rootfs",
            Self::Disk => "disk",
            Self::Volume => "volume",
        }
    }

    fn options(self) -> &'static [&'static str] {
        match self {
            Self::Rootfs => &[
                "-O",
                "none,extent,flex_bg,filetype,dir_index,large_file,huge_file,sparse_super2,dir_nlink,extra_isize,\
                 ext_attr,uninit_bg",
                "-G",
                "512",
                "-E",
                "lazy_itable_init=1,discard,root_owner=0:0,num_backup_sb=0,packed_meta_blocks=1,\
                 hash_seed=666c7972-756e-4001-8000-726f6f746673",
                "-U",
                "666c7972-756e-4000-8000-726f6f746673",
                "-L",
                "rootfs",
            ],
            Self::Disk => &[
                "-O",
                "none,has_journal,extent,flex_bg,filetype,dir_index,large_file,huge_file,sparse_super2,dir_nlink,\
                 extra_isize,ext_attr,64bit,metadata_csum",
                "-J",
                "size=16",
                "-E",
                "lazy_itable_init=1,lazy_journal_init=1,discard,root_owner=0:0,num_backup_sb=1,packed_meta_blocks=1,\
                 hash_seed=666c7972-756e-4001-8000-00006469736b",
                "-U",
                "666c7972-756e-4000-8000-00006469736b",
                "-L",
                "disk",
            ],
            Self::Volume => &[
                "-O",
                "none,has_journal,extent,flex_bg,filetype,dir_index,large_file,huge_file,sparse_super,dir_nlink,\
                 extra_isize,ext_attr,64bit,metadata_csum,metadata_csum_seed",
                "-J",
                "size=16",
                "-E",
                "lazy_itable_init=1,lazy_journal_init=1,discard,root_owner=0:0,\
                 hash_seed=666c7972-756e-4001-8000-766f6c756d65",
                "-U",
                "666c7972-756e-4000-8000-766f6c756d65",
                "-L",
                "volume",
            ],
        }
    }
}

impl Store {
    /// The store's template of this kind and size (rounded up to whole 4 KiB blocks), made by mke2fs if it is not there
    /// yet. It is never to be written: [`Store::copy_template`] copies it.
    ///
    /// # Errors
    /// [`Error::MissingProgram`] without mke2fs, [`Error::Program`] when it fails, [`Error::TooLarge`] beyond
    /// [`MAX_BYTES`], and what goes wrong with files.
    pub fn template(&self, kind: TemplateKind, size_bytes: u64) -> Result<PathBuf> {
        let size = checked_size(size_bytes)?;
        let name = format!("{}-{size}-v{OPTIONS_VERSION}.ext4", kind.name());
        let path = self.root().join("templates").join(&name);
        if path.exists() {
            return Ok(path);
        }
        self.make_layout()?;
        let draft = self.root().join("tmp").join(format!("template-{name}"));
        let Some(file) = files::open_fresh_draft(&draft, &|| path.exists(), &mut || {})? else {
            return Ok(path);
        };
        let made =
            make_filesystem(kind, size, &file, &draft).and_then(|()| files::publish(&file, &draft, &path));
        if made.is_err() {
            files::remove(&draft)?;
        }
        made.map(|()| path)
    }

    /// Makes an empty filesystem of this kind and size at `to`, which must not exist, readable and writable by its
    /// owner alone. Shares blocks with the template where the filesystem can (reflink), else copies its data and leaves
    /// its holes. Not synced: that is for whoever gives the file a meaning.
    ///
    /// # Errors
    /// As [`Store::template`].
    pub fn copy_template(&self, kind: TemplateKind, size_bytes: u64, to: &Path) -> Result<()> {
        use std::os::unix::fs::OpenOptionsExt;
        let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(to);
        let file = file.map_err(|error| Error::io("create", to, error))?;
        let filled = self.fill_from_template(kind, size_bytes, &file, to);
        if filled.is_err() {
            files::remove(to)?;
        }
        filled
    }

    /// Copies a template into an empty file.
    pub(crate) fn fill_from_template(
        &self,
        kind: TemplateKind,
        size_bytes: u64,
        to: &File,
        to_path: &Path,
    ) -> Result<()> {
        let path = self.template(kind, size_bytes)?;
        let template = File::open(&path).map_err(|error| Error::io("open", &path, error))?;
        if rustix::fs::ioctl_ficlone(to, &template).is_ok() {
            return Ok(());
        }
        copy_sparse(&template, to, &|| false).map_err(|error| Error::io("copy a template to", to_path, error))
    }
}

fn checked_size(size_bytes: u64) -> Result<u64> {
    if size_bytes > MAX_BYTES {
        return Err(Error::TooLarge { what: "the disk".into(), limit: MAX_BYTES, got: size_bytes });
    }
    if size_bytes < MIN_BYTES {
        let problem = format!("of {size_bytes} bytes is too small: give it at least {} MiB", MIN_BYTES >> 20);
        return Err(Error::Unsupported { what: "a disk".into(), problem });
    }
    Ok(rounded_bytes(size_bytes))
}

/// How long a filesystem is that is to have so many bytes: whole blocks.
pub fn rounded_bytes(size_bytes: u64) -> u64 {
    size_bytes.next_multiple_of(BLOCK_BYTES)
}

fn make_filesystem(kind: TemplateKind, size: u64, file: &File, path: &Path) -> Result<()> {
    file.set_len(size).map_err(|error| Error::io("resize", path, error))?;
    let common = ["-q", "-F", "-b", "4096", "-I", "256", "-i", "16384", "-m", "0", "-o", "Linux"];
    let output = Command::new("mke2fs")
        .args(common)
        .args(kind.options())
        .arg(path)
        .env("MKE2FS_CONFIG", "/dev/null")
        .env("PATH", search_path())
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output();
    let output = match output {
        Ok(output) => output,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Error::MissingProgram { program: "mke2fs", package: "e2fsprogs" });
        }
        Err(error) => return Err(Error::io("run mke2fs on", path, error)),
    };
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(output.stderr.get(..STDERR_LIMIT).unwrap_or(&output.stderr));
    Err(Error::Program { program: "mke2fs", status: output.status.to_string(), stderr: stderr.trim().into() })
}

/// An ordinary user's PATH often lacks the directories that mke2fs is in.
fn search_path() -> std::ffi::OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin");
    path
}

/// Copies a file to a new one that only its owner may read: by reference where the filesystem can, else with its holes. Not
/// synced.
///
/// # Errors
/// The system's. Nothing is left then.
pub fn copy_file(from: &Path, to: &Path) -> Result<()> {
    copy_file_unless(from, to, &|| false)
}

/// As [`copy_file`], which may take a while: ends with an error soon after `given_up` says so.
///
/// # Errors
/// The system's, and [`io::ErrorKind::Interrupted`]. Nothing is left then.
pub fn copy_file_unless(from: &Path, to: &Path, given_up: &dyn Fn() -> bool) -> Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let source = File::open(from).map_err(|error| Error::io("open", from, error))?;
    let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(to);
    let file = file.map_err(|error| Error::io("create", to, error))?;
    if rustix::fs::ioctl_ficlone(&file, &source).is_ok() {
        return Ok(());
    }
    let copied = copy_sparse(&source, &file, given_up);
    if copied.is_err() {
        files::remove(to)?;
    }
    copied.map_err(|error| Error::io("copy a file to", to, error))
}

/// Copies the data of a file and leaves its holes.
fn copy_sparse(from: &File, to: &File, given_up: &dyn Fn() -> bool) -> io::Result<()> {
    use rustix::fs::{SeekFrom, seek};
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let mut buffer = vec![0; 64 * 1024];
    let mut end = 0;
    while end < length {
        let mut at = match seek(from, SeekFrom::Data(end)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        end = seek(from, SeekFrom::Hole(at))?;
        while at < end {
            let wanted = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
            let count = from.read_at(buffer.get_mut(..wanted).unwrap_or_default(), at)?;
            if count == 0 {
                break;
            }
            to.write_all_at(buffer.get(..count).unwrap_or_default(), at)?;
            at += count as u64;
            if given_up() {
                return Err(io::ErrorKind::Interrupted.into());
            }
        }
    }
    Ok(())
}

/// Bytes that a file takes on the disk.
#[cfg(test)]
fn allocated(path: &Path) -> u64 {
    files::allocated_bytes(&std::fs::metadata(path).unwrap())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn check(path: &Path) {
        let fsck = Command::new("e2fsck").args(["-f", "-n"]).arg(path).env("PATH", search_path()).output();
        let fsck = fsck.expect("e2fsck is missing: apt install e2fsprogs");
        assert!(fsck.status.success(), "{}", String::from_utf8_lossy(&fsck.stdout));
    }

    #[test]
    fn both_kinds_are_sound_sparse_and_equal_to_their_template() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path().join("store"));
        for (kind, size, limit) in [
            (TemplateKind::Rootfs, ROOTFS_BYTES, 300 << 10),
            (TemplateKind::Disk, DISK_DEFAULT_BYTES, 600 << 10),
        ] {
            let copy = directory.path().join(kind.name());
            store.copy_template(kind, size, &copy).unwrap();
            check(&copy);
            let template = store.template(kind, size).unwrap();
            assert_eq!(fs::metadata(&copy).unwrap().len(), size);
            println!(
                "{}: {} bytes on disk, template {}",
                kind.name(),
                allocated(&copy),
                allocated(&template)
            );
            assert!(allocated(&copy) <= limit, "{kind:?} takes {} bytes", allocated(&copy));
            assert!(fs::read_dir(directory.path().join("store/tmp")).unwrap().next().is_none());
        }
    }

    #[test]
    fn inode_tables_need_no_lazy_initialization_in_the_guest() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path());
        for (kind, size) in [(TemplateKind::Rootfs, ROOTFS_BYTES), (TemplateKind::Disk, DISK_DEFAULT_BYTES)] {
            let template = store.template(kind, size).unwrap();
            let dump = Command::new("dumpe2fs").arg(template).env("PATH", search_path()).output();
            let dump = String::from_utf8(dump.expect("apt install e2fsprogs").stdout).unwrap();
            let groups = size.div_ceil(128 << 20) as usize;
            assert_eq!(dump.matches("ITABLE_ZEROED").count(), groups, "{dump}");
        }
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path());
        assert!(matches!(store.template(TemplateKind::Disk, MAX_BYTES + 1), Err(Error::TooLarge { .. })));
        assert!(matches!(store.template(TemplateKind::Disk, 1), Err(Error::Unsupported { .. })));
        let smallest = store.template(TemplateKind::Disk, MIN_BYTES).unwrap();
        check(&smallest);
    }

    #[test]
    fn a_copy_that_is_given_up_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("a"), directory.path().join("b"));
        let file = File::create(&from).unwrap();
        file.set_len(1 << 30).unwrap();
        file.write_all_at(b"data", 1 << 29).unwrap();
        // A filesystem that copies by reference is done before it asks.
        if copy_file_unless(&from, &to, &|| true).is_err() {
            assert!(!to.exists());
            copy_file(&from, &to).unwrap();
        }
        assert_eq!(fs::metadata(&to).unwrap().len(), 1 << 30);
        assert!(allocated(&to) <= 64 << 10);
    }

    #[test]
    fn a_copy_never_overwrites() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path().join("store"));
        let to = directory.path().join("disk.ext4");
        fs::write(&to, b"precious").unwrap();
        assert!(store.copy_template(TemplateKind::Disk, MIN_BYTES, &to).is_err());
        assert_eq!(fs::read(&to).unwrap(), b"precious");
    }
}
