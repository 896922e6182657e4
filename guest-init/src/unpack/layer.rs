//! Applies one layer to a tree, by the rules of the OCI image specification (layer.md).

use std::{collections::BTreeMap, io::BufRead};

use protocol::FailureKind;
use rustix::{
    fs::{
        AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, chmodat, chownat, fchmod, fchown,
        ftruncate, futimens, linkat, makedev, mkdirat, mknodat, openat, symlinkat, utimensat,
    },
    io::{Errno, pwrite},
};

use super::{
    path::CleanPath,
    tar::{Archive, Entry, Kind, TarError, Time},
    tree::{Directory, Tree, is_directory, kernel_failure, proc_path},
    xattr,
};
use crate::failure::Failure;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Names that aufs kept for itself, and that are in layers which it made.
const AUFS: &[u8] = b".wh..wh.";

/// What may still be unpacked.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of files.
    pub bytes: u64,
    /// Entries of archives.
    pub entries: u64,
}

/// An image's layers being applied one after another.
#[derive(Debug)]
pub struct Applier {
    tree: Tree,
    limits: Limits,
    layers: usize,
    /// Into a tree in use: nothing is hidden, and no directory gives way to anything else.
    is_copy: bool,
    /// Modification times of directories, set when nothing is made in them any more.
    directory_times: BTreeMap<CleanPath, Time>,
}

/// A run of zeros at least this long is left out of the file: a block of the filesystem.
const MIN_HOLE_BYTES: usize = 4096;

impl Applier {
    /// Applies layers to this tree, within these limits for all of them together.
    pub fn new(tree: Tree, limits: Limits) -> Self {
        Self { tree, limits, layers: 0, is_copy: false, directory_times: BTreeMap::new() }
    }

    /// Unpacks one archive into a tree that somebody uses: whiteouts are files like others, and a directory that is
    /// there is never replaced.
    pub fn copy_into(tree: Tree) -> Self {
        let limits = Limits { bytes: u64::MAX, entries: u64::MAX };
        Self { is_copy: true, ..Self::new(tree, limits) }
    }

    /// Applies one layer on top of those before. The stream may hold more behind the archive's end.
    ///
    /// # Errors
    /// [`Failure`] naming the entry; the tree is then of no use.
    pub fn apply(&mut self, archive: &mut Archive<impl BufRead>) -> Result<(), Failure> {
        self.tree.begin_layer(self.layers > 0);
        self.layers += 1;
        let mut last = None;
        loop {
            let entry = match archive.next_entry() {
                Ok(Some(entry)) => entry,
                Ok(None) => return Ok(()),
                Err(error) => return Err(behind(last.as_ref(), archive_failure(error))),
            };
            if let Err(failure) = self.apply_entry(&entry, archive) {
                return Err(at(&entry, failure));
            }
            last = Some(entry);
        }
    }

    /// Sets the directories' times. To be called behind the last layer.
    ///
    /// # Errors
    /// [`FailureKind::Setup`] when the disk fails.
    pub fn finish(mut self) -> Result<(), Failure> {
        for (path, time) in std::mem::take(&mut self.directory_times) {
            let (above, name) = path.split().unwrap_or((CleanPath::default(), b"."));
            // A later layer may have removed it, or the way to it.
            let Ok(Some(parent)) = self.tree.open(&above) else { continue };
            let Some(stat) = self.tree.stat(&parent, name)? else { continue };
            if is_directory(&stat) {
                let times = Timestamps { last_access: timespec(time), last_modification: timespec(time) };
                utimensat(&parent, name, &times, AtFlags::SYMLINK_NOFOLLOW).map_err(kernel_failure)?;
            }
        }
        Ok(())
    }

    /// The tree as it is now.
    pub fn tree(&mut self) -> &mut Tree {
        &mut self.tree
    }

    fn apply_entry(&mut self, entry: &Entry, archive: &mut Archive<impl BufRead>) -> Result<(), Failure> {
        self.limits.entries = self.limits.entries.checked_sub(1).ok_or_else(|| {
            Failure::new(FailureKind::LimitExceeded, "the image has more entries than the limit allows")
        })?;
        let path = CleanPath::new(&entry.path)?;
        let Some((above, name)) = path.split() else {
            return self.apply_root(entry);
        };
        if let Some(hidden) = name.strip_prefix(WHITEOUT).filter(|_| !self.is_copy) {
            return self.apply_whiteout(&above, name, hidden);
        }
        if !self.is_copy && above.bytes().split(|byte| *byte == b'/').any(|part| part.starts_with(AUFS)) {
            return Ok(());
        }
        let parent = self.tree.open_or_make(&above)?;
        match entry.kind {
            Kind::File => self.make_file(&parent, name, entry, archive)?,
            Kind::HardLink => self.make_hard_link(&parent, name, entry)?,
            Kind::Directory => {
                self.make_directory(&parent, name, entry)?;
                self.directory_times.insert(path.clone(), entry.mtime);
            }
            Kind::Symlink => {
                self.replace(&parent, name, || symlinkat(entry.link.as_slice(), &parent, name))?
            }
            Kind::CharDevice => self.make_node(&parent, name, FileType::CharacterDevice, entry)?,
            Kind::BlockDevice => self.make_node(&parent, name, FileType::BlockDevice, entry)?,
            Kind::Fifo => self.make_node(&parent, name, FileType::Fifo, entry)?,
        }
        self.tree.note_made(&parent, name);
        match entry.kind {
            Kind::File | Kind::HardLink => Ok(()),
            _ => set_metadata(&parent, name, entry),
        }
    }

    fn apply_root(&mut self, entry: &Entry) -> Result<(), Failure> {
        if entry.kind != Kind::Directory {
            return Err(Failure::new(FailureKind::BadLayer, "the root must be a directory"));
        }
        let root = self.tree.root().clone();
        self.directory_times.insert(CleanPath::default(), entry.mtime);
        set_metadata(&root, b".", entry)
    }

    /// Removes from lower layers what this entry hides (layer.md, "Whiteouts"). What this layer has made stays,
    /// whether it came before or comes behind.
    fn apply_whiteout(&mut self, above: &CleanPath, name: &[u8], hidden: &[u8]) -> Result<(), Failure> {
        let is_opaque = name == OPAQUE;
        if !is_opaque && name.starts_with(AUFS) {
            return Ok(());
        }
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(Failure::new(FailureKind::BadLayer, "a whiteout must name what it hides"));
        }
        let Some(parent) = self.tree.open_lower(above)? else { return Ok(()) };
        if is_opaque {
            self.tree.remove_lower_content(&parent)
        } else {
            self.tree.remove_lower(&parent, hidden)
        }
    }

    /// Makes an entry, removing what is in its place.
    fn replace<T>(
        &mut self,
        parent: &Directory,
        name: &[u8],
        mut make: impl FnMut() -> rustix::io::Result<T>,
    ) -> Result<T, Failure> {
        match make() {
            Err(Errno::EXIST) => {
                self.make_way(parent, name)?;
                make().map_err(kernel_failure)
            }
            other => other.map_err(kernel_failure),
        }
    }

    /// Removes what is in the place of an entry.
    fn make_way(&mut self, parent: &Directory, name: &[u8]) -> Result<(), Failure> {
        if self.is_copy && self.tree.stat(parent, name)?.is_some_and(|stat| is_directory(&stat)) {
            return Err(Failure::new(FailureKind::BadLayer, "there is a directory in its place"));
        }
        self.tree.remove(parent, name)
    }

    fn make_file(
        &mut self,
        parent: &Directory,
        name: &[u8],
        entry: &Entry,
        archive: &mut Archive<impl BufRead>,
    ) -> Result<(), Failure> {
        let stored = entry.segments.iter().fold(0u64, |sum, segment| sum.saturating_add(segment.length));
        self.limits.bytes = self.limits.bytes.checked_sub(stored).ok_or_else(|| {
            Failure::new(FailureKind::LimitExceeded, "the image has more bytes than the limit allows")
        })?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(entry.mode);
        let file =
            self.replace(parent, name, || openat(parent, name, flags, mode & Mode::from_raw_mode(0o777)))?;

        // Holes are the archive's, or zeros that need no room; a file may end in one.
        let mut file_end = 0;
        for segment in entry.segments.iter().filter(|segment| segment.length > 0) {
            let mut offset = segment.offset;
            let end = segment.offset.saturating_add(segment.length);
            while offset < end {
                let chunk = archive.fill_data().map_err(archive_failure)?;
                let length = chunk.len().min(usize::try_from(end - offset).unwrap_or(usize::MAX));
                let chunk = chunk.get(..length).filter(|chunk| !chunk.is_empty());
                let chunk = chunk.ok_or_else(|| archive_failure(TarError::Truncated))?;
                let done = if chunk.len() >= MIN_HOLE_BYTES && chunk.iter().all(|byte| *byte == 0) {
                    chunk.len()
                } else {
                    let written = pwrite(&file, chunk, offset).map_err(kernel_failure)?;
                    file_end = offset.saturating_add(written as u64);
                    written
                };
                archive.consume(done);
                offset = offset.saturating_add(done as u64);
            }
        }
        if file_end != entry.size {
            ftruncate(&file, entry.size).map_err(kernel_failure)?;
        }
        let (uid, gid) = owner(entry)?;
        fchown(&file, Some(uid), Some(gid)).map_err(kernel_failure)?;
        // Behind the change of owner, which clears these bits.
        if entry.mode & 0o7000 != 0 {
            fchmod(&file, mode).map_err(kernel_failure)?;
        }
        if !entry.xattrs.is_empty() {
            xattr::set(&proc_path(parent, name), &entry.xattrs)?;
        }
        futimens(&file, &times(entry)).map_err(kernel_failure)
    }

    fn make_hard_link(&mut self, parent: &Directory, name: &[u8], entry: &Entry) -> Result<(), Failure> {
        let missing = || {
            let target = String::from_utf8_lossy(&entry.link).into_owned();
            Failure::new(
                FailureKind::BadLayer,
                format!("the target {target:?} of the hard link does not exist"),
            )
        };
        let target = CleanPath::new(&entry.link)?;
        let (target_above, target_name) = target.split().ok_or_else(missing)?;
        let target_parent = self.tree.open(&target_above)?.ok_or_else(missing)?;
        let target_stat = self.tree.stat(&target_parent, target_name)?.ok_or_else(missing)?;
        if is_directory(&target_stat) {
            return Err(Failure::new(FailureKind::BadLayer, "the target of a hard link is a directory"));
        }
        if let Some(stat) = self.tree.stat(parent, name)?
            && (stat.st_dev, stat.st_ino) == (target_stat.st_dev, target_stat.st_ino)
        {
            return Ok(());
        }
        let link = || linkat(&target_parent, target_name, parent, name, AtFlags::empty());
        match link() {
            Err(Errno::EXIST) => {
                self.make_way(parent, name)?;
                // What was removed may have held the target.
                link().map_err(|errno| if errno == Errno::NOENT { missing() } else { kernel_failure(errno) })
            }
            other => other.map_err(kernel_failure),
        }
    }

    /// A directory that is there keeps its content and gets this entry's metadata, all of it.
    fn make_directory(&mut self, parent: &Directory, name: &[u8], entry: &Entry) -> Result<(), Failure> {
        let mode = Mode::from_raw_mode(entry.mode & 0o777);
        match mkdirat(parent, name, mode) {
            Err(Errno::EXIST) => {}
            other => return other.map_err(kernel_failure),
        }
        if self.tree.stat(parent, name)?.is_some_and(|stat| is_directory(&stat)) {
            return xattr::remove_others(&proc_path(parent, name), &entry.xattrs);
        }
        if self.is_copy {
            return Err(Failure::new(
                FailureKind::BadLayer,
                "there is something else in the directory's place",
            ));
        }
        self.tree.remove(parent, name)?;
        mkdirat(parent, name, mode).map_err(kernel_failure)
    }

    fn make_node(
        &mut self,
        parent: &Directory,
        name: &[u8],
        kind: FileType,
        entry: &Entry,
    ) -> Result<(), Failure> {
        let mode = Mode::from_raw_mode(entry.mode & 0o777);
        let device = makedev(entry.device.0, entry.device.1);
        self.replace(parent, name, || mknodat(parent, name, kind, mode, device))
    }
}

/// Owner, mode, attributes and times of anything but a regular file.
fn set_metadata(parent: &Directory, name: &[u8], entry: &Entry) -> Result<(), Failure> {
    let (uid, gid) = owner(entry)?;
    chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).map_err(kernel_failure)?;
    if entry.kind != Kind::Symlink {
        chmodat(parent, name, Mode::from_raw_mode(entry.mode), AtFlags::empty()).map_err(kernel_failure)?;
    }
    if !entry.xattrs.is_empty() {
        xattr::set(&proc_path(parent, name), &entry.xattrs)?;
    }
    if entry.kind == Kind::Directory {
        return Ok(());
    }
    utimensat(parent, name, &times(entry), AtFlags::SYMLINK_NOFOLLOW).map_err(kernel_failure)
}

fn owner(entry: &Entry) -> Result<(Uid, Gid), Failure> {
    // The highest number means "no change" to the kernel and is no owner.
    let id = |id: i64| u32::try_from(id).ok().filter(|id| *id != u32::MAX);
    match (id(entry.uid), id(entry.gid)) {
        (Some(uid), Some(gid)) => Ok((Uid::from_raw(uid), Gid::from_raw(gid))),
        _ => {
            let message = format!("the owner {}:{} is out of range", entry.uid, entry.gid);
            Err(Failure::new(FailureKind::BadLayer, message))
        }
    }
}

fn times(entry: &Entry) -> Timestamps {
    Timestamps {
        last_access: timespec(entry.atime.unwrap_or(entry.mtime)),
        last_modification: timespec(entry.mtime),
    }
}

fn timespec(time: Time) -> Timespec {
    Timespec { tv_sec: time.seconds, tv_nsec: time.nanoseconds }
}

/// The failure that an archive's error is; one that the stream behind it has carried as an I/O error is unwrapped.
pub fn archive_failure(error: TarError) -> Failure {
    match error {
        TarError::Io(error) => io_failure(error),
        error => Failure::new(FailureKind::BadLayer, error.to_string()),
    }
}

/// The failure behind an I/O error of the layer's stream.
pub fn io_failure(error: std::io::Error) -> Failure {
    if let Some(failure) = error.get_ref().and_then(|inner| inner.downcast_ref::<Failure>()) {
        return failure.clone();
    }
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => {
            Failure::new(FailureKind::BadLayer, "the compressed data is truncated")
        }
        _ if error.raw_os_error().is_some() => {
            Failure::new(FailureKind::Setup, format!("reading the layer failed: {error}"))
        }
        _ => Failure::new(FailureKind::BadLayer, format!("the compressed data is damaged: {error}")),
    }
}

fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(path.get(..path.len().min(300)).unwrap_or_default()).into_owned()
}

fn at(entry: &Entry, failure: Failure) -> Failure {
    Failure::new(failure.kind, format!("entry {:?}: {}", shown(&entry.path), failure.message))
}

fn behind(last: Option<&Entry>, failure: Failure) -> Failure {
    let place = last.map_or("at its start".into(), |entry| format!("behind entry {:?}", shown(&entry.path)));
    Failure::new(failure.kind, format!("{place}: {}", failure.message))
}
