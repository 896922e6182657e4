//! Whether a file is still the one that the guest knows. What can be large, a disk, is known by its length and the time of
//! its last change; a kernel whose file was only copied is known by its content.

use std::{
    fs::{File, Metadata},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::{FileExt, FileTypeExt, MetadataExt},
    path::Path,
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::refusal::Refusal;
use crate::spec::{DiskSpec, VmSpec};

/// A file as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileId {
    /// Its length in bytes.
    pub bytes: u64,
    /// When it was last written, in ns since 1970. `None` for a block device, which does not tell.
    pub modified_ns: Option<i64>,
}

/// A disk: its files, one behind another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskId {
    /// Each as it was.
    pub files: Vec<FileId>,
}

/// A kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelId {
    /// Its file as it was.
    pub file: FileId,
    /// `build-id:` and what the linker noted of its content, or `sha256:` and the digest of all of it.
    pub digest: Option<String>,
}

impl FileId {
    /// That of the file.
    ///
    /// # Errors
    /// The host's.
    pub fn of(path: &Path) -> io::Result<Self> {
        let found = path.metadata()?;
        if found.file_type().is_block_device() {
            return Ok(Self { bytes: block_device_bytes(found.rdev())?, modified_ns: None });
        }
        Ok(Self { bytes: found.len(), modified_ns: Some(modified_ns(&found)) })
    }

    /// That of an open file.
    ///
    /// # Errors
    /// The host's.
    pub fn of_open(mut file: &File) -> io::Result<Self> {
        let found = file.metadata()?;
        if found.file_type().is_block_device() {
            // Nobody reads or writes at the position.
            return Ok(Self { bytes: file.seek(SeekFrom::End(0))?, modified_ns: None });
        }
        Ok(Self { bytes: found.len(), modified_ns: Some(modified_ns(&found)) })
    }
}

/// What a machine's parts are known by, open as long as it lives: closing a disk's file would let go of the lock that this process
/// has on it (fcntl(2)), and a jailed machine cannot open one again.
#[derive(Debug)]
pub struct OpenFiles {
    /// The kernel, unless it is gone.
    pub kernel: Option<File>,
    /// Each disk's files.
    pub disks: Vec<Vec<File>>,
}

/// Not by opening it: closing it again would let go of the lock that this process has on its disk (fcntl(2)).
fn block_device_bytes(number: u64) -> io::Result<u64> {
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let sectors = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/size"))?;
    let sectors: u64 = sectors.trim().parse().map_err(io::Error::other)?;
    Ok(sectors.saturating_mul(512))
}

fn modified_ns(found: &Metadata) -> i64 {
    found.mtime().saturating_mul(1_000_000_000).saturating_add(found.mtime_nsec())
}

impl DiskId {
    /// That of the disk, whose files are open.
    ///
    /// # Errors
    /// The host's, with the path.
    pub fn of(disk: &DiskSpec, open: &[File]) -> Result<Self, String> {
        let id = |(path, file): (&std::path::PathBuf, &File)| {
            FileId::of_open(file).map_err(|error| format!("{}: {error}", path.display()))
        };
        Ok(Self { files: disk.files.iter().zip(open).map(id).collect::<Result<_, _>>()? })
    }
}

/// Refuses disks that are not as they were, unless the guest knows nothing of them.
///
/// # Errors
/// [`Refusal::ChangedDisk`].
pub fn check_disks(saved: Option<&[DiskId]>, spec: &VmSpec, open: &[Vec<File>]) -> Result<(), Refusal> {
    let Some(saved) = saved else { return Ok(()) };
    for (index, ((disk, open), saved)) in spec.disks.iter().zip(open).zip(saved).enumerate() {
        let changed = |fact: String| Refusal::ChangedDisk(format!("disk {index}: {fact}"));
        let found = DiskId::of(disk, open).map_err(changed)?;
        if found.files.len() != saved.files.len() {
            return Err(changed(format!("{} files, and {} then", found.files.len(), saved.files.len())));
        }
        for ((path, found), saved) in disk.files.iter().zip(&found.files).zip(&saved.files) {
            let path = path.display();
            if found.bytes != saved.bytes {
                return Err(changed(format!("{path} has {} bytes, and {} then", found.bytes, saved.bytes)));
            }
            if found.modified_ns != saved.modified_ns {
                return Err(changed(format!(
                    "{path} was written since (a copy must keep the time of change)"
                )));
            }
        }
    }
    Ok(())
}

impl KernelId {
    /// That of the kernel that was read from this file when it was like `booted`. A file that has changed since tells
    /// nothing of the running kernel.
    pub fn of(kernel: Option<&File>, booted: FileId) -> Self {
        let unchanged = kernel.filter(|file| FileId::of_open(file).is_ok_and(|now| now == booted));
        let digest = unchanged.and_then(|file| digest(file).ok());
        Self { file: booted, digest }
    }

    /// Refuses a machine that is to run another kernel. A kernel whose file is gone is not missed.
    ///
    /// # Errors
    /// [`Refusal::OtherKernel`].
    pub fn check(&self, path: &Path, kernel: Option<&File>) -> Result<(), Refusal> {
        let Some(kernel) = kernel else { return Ok(()) };
        let found = FileId::of_open(kernel).ok();
        if found.as_ref() == Some(&self.file) || self.digest.is_some() && digest(kernel).ok() == self.digest {
            return Ok(());
        }
        Err(Refusal::OtherKernel(format!("the guest runs another kernel than {}", path.display())))
    }
}

const ELF_HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const PT_NOTE: u32 = 4;
const NT_GNU_BUILD_ID: u32 = 3;
/// More than any kernel's notes, in bytes.
const MAX_NOTES_BYTES: u64 = 64 << 10;
/// The most program headers looked at.
const MAX_PROGRAM_HEADERS: u16 = 64;

/// What tells this content from any other. A linker's note of it is found in microseconds; hashing a kernel of 11 MB takes
/// more than all the rest of a suspend.
fn digest(mut file: &File) -> io::Result<String> {
    if let Some(id) = build_id(file)? {
        return Ok(format!("build-id:{}", hex(&id)));
    }
    file.seek(SeekFrom::Start(0))?;
    let mut hash = Sha256::new();
    let mut chunk = vec![0; 1 << 16];
    loop {
        match file.read(&mut chunk) {
            Ok(0) => return Ok(format!("sha256:{}", hex(&hash.finalize()))),
            Ok(count) => hash.update(chunk.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The digest of some bytes, in hexadecimal digits.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Bytes in hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The GNU build id of a 64-bit ELF file, if it is one and has one.
fn build_id(file: &File) -> io::Result<Option<Vec<u8>>> {
    let Some(header) = read::<ELF_HEADER_BYTES>(file, 0)? else { return Ok(None) };
    if !header.starts_with(b"\x7fELF\x02\x01") {
        return Ok(None);
    }
    let (first, size) = (number(&header, 32, 8), number(&header, 54, 2));
    let count = number(&header, 56, 2).min(MAX_PROGRAM_HEADERS.into());
    if size != PROGRAM_HEADER_BYTES as u64 {
        return Ok(None);
    }
    for index in 0..count {
        let Some(at) = first.checked_add(index * size) else { return Ok(None) };
        let Some(program) = read::<PROGRAM_HEADER_BYTES>(file, at)? else { return Ok(None) };
        if number(&program, 0, 4) != u64::from(PT_NOTE) {
            continue;
        }
        let mut notes = vec![0; number(&program, 32, 8).min(MAX_NOTES_BYTES) as usize];
        if file.read_exact_at(&mut notes, number(&program, 8, 8)).is_ok()
            && let Some(id) = gnu_build_id(&notes)
        {
            return Ok(Some(id));
        }
    }
    Ok(None)
}

/// Notes are: length of the name, length of the content, type, name, content, each padded to four bytes.
fn gnu_build_id(mut notes: &[u8]) -> Option<Vec<u8>> {
    while let Some((head, rest)) = notes.split_at_checked(12) {
        let (name_bytes, bytes) = (number(head, 0, 4) as usize, number(head, 4, 4) as usize);
        let content_at = name_bytes.checked_next_multiple_of(4)?;
        let name = rest.get(..name_bytes)?;
        let content = rest.get(content_at..content_at.checked_add(bytes)?)?;
        if number(head, 8, 4) == u64::from(NT_GNU_BUILD_ID) && name == b"GNU\0" && !content.is_empty() {
            return Some(content.to_vec());
        }
        notes = rest.get(content_at.checked_add(bytes.checked_next_multiple_of(4)?)?..)?;
    }
    None
}

/// `None` behind the file's end.
fn read<const N: usize>(file: &File, at: u64) -> io::Result<Option<[u8; N]>> {
    let mut bytes = [0; N];
    match file.read_exact_at(&mut bytes, at) {
        Ok(()) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        // An offset that no file has.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(None),
        Err(error) => Err(error),
    }
}

/// A little-endian number of that many bytes; zero beyond the end.
fn number(bytes: &[u8], at: usize, count: usize) -> u64 {
    let bytes = bytes.get(at..at + count).unwrap_or_default();
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF file with a note of another kind before that of the build id.
    fn elf(id: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 64 + 56];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[32] = 64;
        (file[54], file[56]) = (56, 1);
        file[64] = PT_NOTE as u8;
        file[72] = 120;
        let mut notes = Vec::new();
        for (kind, name, content) in [(1u32, &b"Xen\0"[..], &b"other"[..]), (3, b"GNU\0", id)] {
            notes.extend((name.len() as u32).to_le_bytes());
            notes.extend((content.len() as u32).to_le_bytes());
            notes.extend(kind.to_le_bytes());
            notes.extend(name);
            notes.extend(content);
            notes.resize(notes.len().next_multiple_of(4), 0);
        }
        file[96] = notes.len() as u8;
        file.extend(notes);
        file
    }

    fn at(dir: &tempfile::TempDir, name: &str, bytes: &[u8]) -> std::path::PathBuf {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn open(path: &Path) -> File {
        File::open(path).unwrap()
    }

    #[test]
    fn a_kernel_is_known_by_its_build_id_and_else_by_its_content() {
        let dir = tempfile::tempdir().unwrap();
        let digest = |name, bytes: &[u8]| digest(&open(&at(&dir, name, bytes))).unwrap();
        assert_eq!(digest("elf", &elf(&[0xab, 0xcd, 1])), "build-id:abcd01");
        assert_eq!(digest("plain", b"abc"), format!("sha256:{}", sha256(b"abc")));
        let good = elf(&[1, 2, 3, 4]);
        for end in 0..good.len() {
            assert!(digest("cut", &good[..end]).starts_with("sha256:"), "{end}");
        }
    }

    #[test]
    fn a_copy_is_the_same_kernel_and_another_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = at(&dir, "kernel", b"one");
        let id = KernelId::of(Some(&open(&path)), FileId::of(&path).unwrap());
        let check = |path: &Path| id.check(path, File::open(path).ok().as_ref());
        assert_eq!(check(&path), Ok(()));
        assert_eq!(check(&at(&dir, "copy", b"one")), Ok(()));
        assert_eq!(check(Path::new("/no/such/kernel")), Ok(()));
        assert_eq!(check(&at(&dir, "other", b"another")).unwrap_err().name(), "other-kernel");
    }

    #[test]
    fn a_kernel_that_was_replaced_since_the_boot_has_no_digest() {
        let dir = tempfile::tempdir().unwrap();
        let path = at(&dir, "kernel", b"one");
        let booted = FileId { bytes: 7, modified_ns: Some(1) };
        assert_eq!(KernelId::of(Some(&open(&path)), booted).digest, None);
    }

    #[test]
    fn a_disk_that_was_written_or_resized_is_refused_by_its_number() {
        let dir = tempfile::tempdir().unwrap();
        let path = at(&dir, "disk", &[0; 1024]);
        let spec: VmSpec = serde_json::from_value(serde_json::json!({
            "cpus": 1, "memory_mib": 16, "kernel": "/k",
            "disks": [{"files": [&path], "read_only": true}],
        }))
        .unwrap();
        let files = [vec![open(&path)]];
        let saved = vec![DiskId::of(&spec.disks[0], &files[0]).unwrap()];
        assert_eq!(check_disks(Some(&saved), &spec, &files), Ok(()));
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_modified(std::time::SystemTime::UNIX_EPOCH)
            .unwrap();
        let refusal = check_disks(Some(&saved), &spec, &files).unwrap_err();
        assert!(refusal.name() == "changed-disk" && refusal.to_string().starts_with("disk 0: "), "{refusal}");
        at(&dir, "disk", &[0; 512]);
        assert!(check_disks(Some(&saved), &spec, &files).unwrap_err().to_string().contains("512 bytes"));
    }
}
