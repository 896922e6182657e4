//! The filesystem tree that is being made: every operation stays below its root, whatever links the tree holds.
//!
//! Directories are opened with openat2's `RESOLVE_IN_ROOT`, so that symbolic links of the image, absolute ones too,
//! are followed within it and never out of it. The last component of a path is never followed.

use std::{
    collections::HashSet,
    hash::{BuildHasher, RandomState},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    rc::Rc,
};

use protocol::FailureKind;
use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, mkdirat, openat, openat2,
        readlinkat, statat, unlinkat,
    },
    io::Errno,
};

use super::path::CleanPath;
use crate::failure::Failure;

/// Directories nested deeper than any path names are only removed to this depth: each level holds a descriptor.
const MAX_DEPTH: usize = 2100;
/// How many symbolic links may lead to one missing directory.
const MAX_LINKS: usize = 40;

/// A directory of the tree.
#[derive(Clone, Debug)]
pub struct Directory {
    fd: Rc<OwnedFd>,
    inode: u64,
}

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The tree below one directory of this machine.
#[derive(Debug)]
pub struct Tree {
    root: Directory,
    /// The directory used last: archives name the files of a directory one after another.
    last: Option<(CleanPath, Directory)>,
    /// The entries that the current layer has made, as hashes of directory and name. With a secret key, so that no
    /// archive can aim at a collision.
    made: HashSet<u64>,
    has_lower: bool,
    hasher: RandomState,
}

/// An error of the kernel about a path of the tree.
pub fn kernel_failure(errno: Errno) -> Failure {
    let kind = match errno {
        Errno::NOSPC | Errno::DQUOT => FailureKind::NoSpace,
        Errno::IO | Errno::NOMEM | Errno::MFILE | Errno::NFILE | Errno::ROFS => FailureKind::Setup,
        _ => FailureKind::BadLayer,
    };
    let hint = match errno {
        Errno::NOSPC => "the disk for its files is full",
        Errno::NOTDIR => "a part of its path is not a directory",
        Errno::LOOP => "too many symbolic links lead to it",
        _ => return Failure::new(kind, errno.to_string()),
    };
    Failure::new(kind, hint)
}

impl Tree {
    /// The tree below `root`.
    ///
    /// # Errors
    /// [`FailureKind::Setup`] if it is no directory.
    pub fn new(root: OwnedFd) -> Result<Self, Failure> {
        let inode = fstat(&root).map_err(kernel_failure)?.st_ino;
        Ok(Self {
            root: Directory { fd: Rc::new(root), inode },
            last: None,
            made: HashSet::new(),
            has_lower: true,
            hasher: RandomState::new(),
        })
    }

    /// The root directory.
    pub fn root(&self) -> &Directory {
        &self.root
    }

    /// Forgets which entries were made: what is there now is below the layer that follows. With nothing below it, a
    /// layer has nothing that it could hide, and what it makes need not be remembered.
    pub fn begin_layer(&mut self, has_lower: bool) {
        self.made.clear();
        self.has_lower = has_lower;
    }

    fn key(&self, directory: &Directory, name: &[u8]) -> u64 {
        self.hasher.hash_one((directory.inode, name))
    }

    /// Notes that the current layer has made this entry.
    pub fn note_made(&mut self, directory: &Directory, name: &[u8]) {
        if self.has_lower {
            self.made.insert(self.key(directory, name));
        }
    }

    /// Opens a directory; `None` if it, or one on the way to it, is missing.
    ///
    /// # Errors
    /// [`FailureKind::BadLayer`] if something on the way is not a directory.
    pub fn open(&mut self, path: &CleanPath) -> Result<Option<Directory>, Failure> {
        if path.is_root() {
            return Ok(Some(self.root.clone()));
        }
        if let Some((_, directory)) = self.last.as_ref().filter(|(known, _)| known == path) {
            return Ok(Some(directory.clone()));
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match self.resolve(path.bytes(), flags) {
            Ok(fd) => {
                let inode = fstat(&fd).map_err(kernel_failure)?.st_ino;
                let directory = Directory { fd: Rc::new(fd), inode };
                self.last = Some((path.clone(), directory.clone()));
                Ok(Some(directory))
            }
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(kernel_failure(errno)),
        }
    }

    /// Opens a directory of lower layers, for a whiteout; `None` if there is none to hide anything in.
    ///
    /// # Errors
    /// [`FailureKind::BadLayer`] when links lead nowhere.
    pub fn open_lower(&mut self, path: &CleanPath) -> Result<Option<Directory>, Failure> {
        if !self.has_lower {
            return Ok(None);
        }
        // Umoci has whiteouts below a directory that the same layer replaces by a file.
        match self.resolve(path.bytes(), OFlags::PATH | OFlags::CLOEXEC) {
            Err(Errno::NOTDIR) if !path.is_root() => Ok(None),
            Ok(fd) if !is_directory(&fstat(&fd).map_err(kernel_failure)?) => Ok(None),
            _ => self.open(path),
        }
    }

    fn resolve(&self, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        // The kernel says EAGAIN when anything on the machine was renamed while it resolved a "..".
        for _ in 0..1000 {
            match openat2(&self.root, path, flags, Mode::empty(), resolve) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return other,
            }
        }
        Err(Errno::AGAIN)
    }

    /// Opens a directory, making it and those on the way to it (mode 0755, root's) if they are missing.
    ///
    /// # Errors
    /// [`FailureKind::BadLayer`] if something on the way is not a directory, [`FailureKind::NoSpace`].
    pub fn open_or_make(&mut self, path: &CleanPath) -> Result<Directory, Failure> {
        self.open_or_make_within(path, MAX_LINKS)
    }

    fn open_or_make_within(&mut self, path: &CleanPath, links_left: usize) -> Result<Directory, Failure> {
        if let Some(directory) = self.open(path)? {
            return Ok(directory);
        }
        let mut parent = self.root.clone();
        for prefix in path.prefixes() {
            parent = match self.open(&prefix)? {
                Some(directory) => directory,
                None => self.make_missing(&parent, &prefix, links_left)?,
            };
        }
        Ok(parent)
    }

    /// Makes a directory that `open` did not find: it is missing, or a symbolic link to one that is missing.
    fn make_missing(
        &mut self,
        parent: &Directory,
        path: &CleanPath,
        links_left: usize,
    ) -> Result<Directory, Failure> {
        let missing = || Failure::new(FailureKind::BadLayer, format!("its directory {path} cannot be made"));
        let (above, name) = path.split().ok_or_else(missing)?;
        match mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
            Ok(()) => self.note_made(parent, name),
            Err(Errno::EXIST) => {
                let links_left = links_left.checked_sub(1).ok_or_else(|| kernel_failure(Errno::LOOP))?;
                let target = readlinkat(parent, name, Vec::new()).map_err(|_| missing())?.into_bytes();
                let whole = match target.first() {
                    Some(b'/') => target,
                    _ => [above.bytes(), b"/", &target].concat(),
                };
                let whole = CleanPath::of_link(&whole).map_err(|_| missing())?;
                self.open_or_make_within(&whole, links_left)?;
            }
            Err(errno) => return Err(kernel_failure(errno)),
        }
        self.open(path)?.ok_or_else(missing)
    }

    /// What is at a name of a directory.
    ///
    /// # Errors
    /// The kernel's reason, except that nothing is there.
    pub fn stat(&self, directory: &Directory, name: &[u8]) -> Result<Option<Stat>, Failure> {
        match statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(kernel_failure(errno)),
        }
    }

    /// Removes what is at a name, with everything below it.
    ///
    /// # Errors
    /// [`FailureKind::LimitExceeded`] for directories nested too deep.
    pub fn remove(&mut self, directory: &Directory, name: &[u8]) -> Result<(), Failure> {
        self.sweep(directory, vec![name.to_vec()], false)
    }

    /// Removes what lower layers have at a name, and keeps what the current one has made there.
    ///
    /// # Errors
    /// As [`Tree::remove`].
    pub fn remove_lower(&mut self, directory: &Directory, name: &[u8]) -> Result<(), Failure> {
        self.sweep(directory, vec![name.to_vec()], true)
    }

    /// Removes what lower layers have in a directory, and keeps what the current one has made there.
    ///
    /// # Errors
    /// As [`Tree::remove`].
    pub fn remove_lower_content(&mut self, directory: &Directory) -> Result<(), Failure> {
        let names = names(directory).map_err(kernel_failure)?;
        self.sweep(directory, names, true)
    }

    /// Removes these names of a directory, deepest first. Not by recursion: an archive decides on the depth.
    fn sweep(&mut self, start: &Directory, names: Vec<Vec<u8>>, keep_made: bool) -> Result<(), Failure> {
        self.last = None;
        let mut levels = vec![Level { directory: start.clone(), name: Vec::new(), names, is_kept: true }];
        while let Some(level) = levels.last_mut() {
            let Some(name) = level.names.pop() else {
                self.leave(&mut levels)?;
                continue;
            };
            let is_made = keep_made && self.made.contains(&self.key(&level.directory, &name));
            let Some(stat) = self.stat(&level.directory, &name)? else { continue };
            if is_directory(&stat) {
                let level = Level::enter(&level.directory, name, stat.st_ino, is_made)?;
                levels.push(level);
            } else if is_made {
                level.is_kept = true;
            } else {
                unlinkat(&level.directory, &name, AtFlags::empty()).map_err(kernel_failure)?;
            }
            if levels.len() > MAX_DEPTH {
                let message = format!("directories are nested deeper than {MAX_DEPTH} levels");
                return Err(Failure::new(FailureKind::LimitExceeded, message));
            }
        }
        Ok(())
    }

    /// Goes up from a directory of which nothing more is to be looked at, and removes it unless it is needed.
    fn leave(&self, levels: &mut Vec<Level>) -> Result<(), Failure> {
        if let Some(done) = levels.pop()
            && let Some(above) = levels.last_mut()
        {
            if done.is_kept {
                above.is_kept = true;
            } else {
                unlinkat(&above.directory, &done.name, AtFlags::REMOVEDIR).map_err(kernel_failure)?;
            }
        }
        Ok(())
    }
}

/// Whether this is a directory.
pub fn is_directory(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

/// A directory on the way down of [`Tree::sweep`].
struct Level {
    directory: Directory,
    name: Vec<u8>,
    /// What is still to be looked at in it.
    names: Vec<Vec<u8>>,
    /// Whether it, or anything in it, stays.
    is_kept: bool,
}

impl Level {
    fn enter(parent: &Directory, name: Vec<u8>, inode: u64, is_kept: bool) -> Result<Self, Failure> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = openat(parent, &name, flags, Mode::empty()).map_err(kernel_failure)?;
        let directory = Directory { fd: Rc::new(fd), inode };
        let names = names(&directory).map_err(kernel_failure)?;
        Ok(Self { directory, name, names, is_kept })
    }
}

/// The names in a directory, without `.` and `..`.
fn names(directory: &Directory) -> rustix::io::Result<Vec<Vec<u8>>> {
    let readable =
        openat(directory, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut names = Vec::new();
    for entry in Dir::new(readable)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if !matches!(name, b"." | b"..") {
            names.push(name.to_vec());
        }
    }
    Ok(names)
}

/// A path by which calls that take no descriptor reach a name of a directory. Needs /proc.
pub fn proc_path(directory: &Directory, name: &[u8]) -> Vec<u8> {
    [format!("/proc/self/fd/{}/", directory.fd.as_raw_fd()).as_bytes(), name].concat()
}

/// Opens a directory of this machine to be the root of a tree.
///
/// # Errors
/// [`FailureKind::Setup`].
pub fn open_root(path: &str) -> Result<OwnedFd, Failure> {
    openat(CWD, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| Failure::new(FailureKind::Setup, format!("cannot open {path}: {errno}")))
}
