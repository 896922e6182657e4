//! The files of a snapshot, opened before anything of them is read: who reads them may be in a jail, where no path leads to them.
//!
//! Whoever wrote the snapshot may have been in the hands of its guest: no name is followed if it is a link, nothing but a plain file
//! is read, and nothing is opened for writing, as other machines may be mapped from the same file.

use std::{
    fs::File,
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use super::{BASE, MEMORY, STATE, WORKING_SET, refusal::Refusal};

/// A snapshot's files.
#[derive(Debug)]
pub struct Files {
    /// Where they are, for messages.
    pub dir: PathBuf,
    /// All but memory.
    pub state: File,
    /// Memory.
    pub memory: MemoryFiles,
    /// What to read ahead of it.
    pub working_set: Option<File>,
}

/// The files that hold a machine's memory. Whether they are needed the state tells.
#[derive(Debug)]
pub struct MemoryFiles {
    own: Opened,
    base: Opened,
}

#[derive(Debug)]
struct Opened {
    path: PathBuf,
    file: io::Result<File>,
}

/// Opens a plain file to read it, without waiting for what else it may be.
///
/// # Errors
/// The host's; a link is `ELOOP`.
pub fn open_to_read(path: &Path) -> io::Result<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    File::options().read(true).custom_flags(flags).open(path)
}

/// Opens `state`.
///
/// # Errors
/// There is none, or it is no file.
pub fn open_state(dir: &Path) -> Result<File, Refusal> {
    let path = dir.join(STATE);
    let missing = |error: io::Error| Refusal::Missing(format!("{}: {error}", path.display()));
    let file = open_to_read(&path).map_err(missing)?;
    match file.metadata().map_err(missing)? {
        found if found.is_file() => Ok(file),
        _ => Err(Refusal::Corrupted(format!("{} is no file", path.display()))),
    }
}

impl Files {
    /// Opens a snapshot.
    ///
    /// # Errors
    /// There is none.
    pub fn open(dir: &Path) -> Result<Self, Refusal> {
        let state = open_state(dir)?;
        let working_set = open_to_read(&dir.join(WORKING_SET)).ok();
        Ok(Self { dir: dir.to_path_buf(), state, memory: MemoryFiles::open(dir), working_set })
    }
}

impl MemoryFiles {
    /// Opens those of the snapshot in that directory.
    pub fn open(dir: &Path) -> Self {
        let open = |name| {
            let path = dir.join(name);
            Opened { file: open_to_read(&path), path }
        };
        Self { own: open(MEMORY), base: open(BASE) }
    }

    /// `memory`, which has that length.
    ///
    /// # Errors
    /// It is not there, or not as long.
    pub fn own(&self, bytes: u64) -> Result<File, Refusal> {
        self.own.of_length(bytes)
    }

    /// `base`, which has that length.
    ///
    /// # Errors
    /// It is not there, or not as long.
    pub fn base(&self, bytes: u64) -> Result<File, Refusal> {
        self.base.of_length(bytes)
    }
}

impl Opened {
    fn of_length(&self, bytes: u64) -> Result<File, Refusal> {
        let path = self.path.display();
        let missing = |error: &io::Error| Refusal::Missing(format!("{path}: {error}"));
        let file = self.file.as_ref().map_err(missing)?.try_clone().map_err(|error| missing(&error))?;
        let found = file.metadata().map_err(|error| missing(&error))?;
        if !found.is_file() {
            return Err(Refusal::Corrupted(format!("{path} is no file")));
        }
        match found.len() {
            length if length < bytes => {
                Err(Refusal::Truncated { what: path.to_string(), wanted: bytes, found: length })
            }
            length if length > bytes => {
                Err(Refusal::Corrupted(format!("{path} has {length} bytes, and the machine has {bytes}")))
            }
            _ => Ok(file),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn what_a_hostile_machine_leaves_in_the_place_of_a_file_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let other = dir.path().join("another-machines-memory");
        std::fs::write(&other, [7; 4096]).unwrap();
        for name in [STATE, MEMORY, WORKING_SET] {
            symlink(&other, dir.path().join(name)).unwrap();
        }
        assert_eq!(open_state(dir.path()).unwrap_err().name(), "missing");
        assert_eq!(MemoryFiles::open(dir.path()).own(4096).unwrap_err().name(), "missing");
        for name in [STATE, MEMORY] {
            std::fs::remove_file(dir.path().join(name)).unwrap();
            rustix::fs::mknodat(
                rustix::fs::CWD,
                dir.path().join(name),
                rustix::fs::FileType::Fifo,
                rustix::fs::Mode::RUSR,
                0,
            )
            .unwrap();
        }
        assert_eq!(open_state(dir.path()).unwrap_err().name(), "corrupted");
        assert_eq!(MemoryFiles::open(dir.path()).own(4096).unwrap_err().name(), "corrupted");
    }

    #[test]
    fn memory_is_never_opened_for_writing() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(MEMORY), [7; 4096]).unwrap();
        let mut file = MemoryFiles::open(dir.path()).own(4096).unwrap();
        assert!(io::Write::write(&mut file, b"x").is_err());
    }
}
