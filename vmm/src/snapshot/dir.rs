//! The directory that a snapshot is written to, by its descriptor: a jailed machine reaches it by no path, and is given it with the
//! request.

use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use rustix::fs::{AtFlags, Mode, OFlags, openat, renameat, unlinkat};

/// An open directory. No name in it is followed if it is a link.
#[derive(Debug)]
pub struct Dir {
    /// For messages.
    path: PathBuf,
    open: File,
}

impl Dir {
    /// The directory at the path.
    ///
    /// # Errors
    /// The host's.
    pub fn at(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_path_buf(), open: File::open(path)? })
    }

    /// The directory that its owner has opened; the path is only told.
    pub fn given(path: &Path, open: OwnedFd) -> Self {
        Self { path: path.to_path_buf(), open: open.into() }
    }

    /// What to call it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// An empty file of this name, for its owner alone: the guest's secrets are in there.
    ///
    /// # Errors
    /// The host's.
    pub fn create(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(openat(&self.open, name, flags, Mode::RUSR | Mode::WUSR)?.into())
    }

    /// A file that is there, to be written.
    ///
    /// # Errors
    /// The host's.
    pub fn write(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(openat(&self.open, name, flags, Mode::empty())?.into())
    }

    /// Has a file take the place of another.
    ///
    /// # Errors
    /// The host's.
    pub fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(renameat(&self.open, from, &self.open, to)?)
    }

    /// Removes a file.
    ///
    /// # Errors
    /// The host's.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        Ok(unlinkat(&self.open, name, AtFlags::empty())?)
    }

    /// Waits until its names are on the disk.
    ///
    /// # Errors
    /// The host's.
    pub fn sync(&self) -> io::Result<()> {
        self.open.sync_all()
    }

    /// Whether the open file is the one of this name.
    pub fn holds(&self, file: &File, name: &str) -> bool {
        let there =
            openat(&self.open, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
        let metadata = |there: OwnedFd| File::from(there).metadata();
        match (file.metadata(), there.map_err(io::Error::from).and_then(metadata)) {
            (Ok(open), Ok(there)) => (open.dev(), open.ino()) == (there.dev(), there.ino()),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn a_link_is_not_followed() {
        let temporary = tempfile::tempdir().unwrap();
        let outside = temporary.path().join("outside");
        fs::write(&outside, "mine").unwrap();
        let dir = Dir::at(temporary.path()).unwrap();
        symlink(&outside, dir.path().join("state.new")).unwrap();
        assert!(dir.create("state.new").is_err() && dir.write("state.new").is_err());
        assert_eq!(fs::read_to_string(&outside).unwrap(), "mine");
        dir.remove("state.new").unwrap();
        let mut file = dir.create("state.new").unwrap();
        file.write_all(b"x").unwrap();
        assert!(dir.holds(&file, "state.new") && !dir.holds(&file, "state"));
        dir.rename("state.new", "state").unwrap();
        dir.sync().unwrap();
        assert!(dir.holds(&file, "state"));
    }
}
