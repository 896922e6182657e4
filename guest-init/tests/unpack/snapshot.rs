//! A tree as a value: everything that an archive can say about it.

use std::{
    collections::BTreeMap,
    fmt, fs,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt},
    },
    path::Path,
};

use rustix::fs::{lgetxattr, llistxattr};
use sha2::{Digest, Sha256};

#[derive(Clone, PartialEq, Eq)]
pub struct Node {
    pub kind: &'static str,
    pub mode: u32,
    pub owner: (u32, u32),
    pub device: u64,
    pub mtime: (i64, i64),
    pub content: Vec<u8>,
    pub xattrs: Vec<(String, Vec<u8>)>,
    /// The first path, in order, that is a hard link to the same file.
    pub same_as: String,
}

impl fmt::Debug for Node {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, mode, owner, device, mtime, content, xattrs, same_as } = self;
        write!(
            formatter,
            "{kind} {mode:o} {owner:?} {device} {mtime:?} {xattrs:?} {same_as:?} {} bytes",
            content.len()
        )?;
        write!(formatter, ", {:x?}", Sha256::digest(content))
    }
}

/// Everything below a directory; itself has the path "".
pub fn take(root: &Path) -> BTreeMap<String, Node> {
    let mut nodes = BTreeMap::new();
    let mut inodes = BTreeMap::new();
    let mut pending = vec![root.to_path_buf()];
    let mut paths = Vec::new();
    while let Some(path) = pending.pop() {
        if fs::symlink_metadata(&path).unwrap().is_dir() {
            pending.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        paths.push(path);
    }
    paths.sort();
    for path in paths {
        let name = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
        let metadata = fs::symlink_metadata(&path).unwrap();
        let same_as =
            if metadata.is_dir() { &name } else { inodes.entry(metadata.ino()).or_insert(name.clone()) };
        nodes.insert(name.clone(), node(&path, &metadata, same_as.clone()));
    }
    nodes
}

fn node(path: &Path, metadata: &fs::Metadata, same_as: String) -> Node {
    let kind = metadata.file_type();
    let (kind, content) = if kind.is_file() {
        ("file", fs::read(path).unwrap())
    } else if kind.is_symlink() {
        ("symlink", fs::read_link(path).unwrap().as_os_str().as_bytes().to_vec())
    } else if kind.is_dir() {
        ("directory", Vec::new())
    } else if kind.is_fifo() {
        ("fifo", Vec::new())
    } else if kind.is_char_device() {
        ("char", Vec::new())
    } else if kind.is_block_device() {
        ("block", Vec::new())
    } else {
        ("other", Vec::new())
    };
    Node {
        kind,
        mode: metadata.mode() & 0o7777,
        owner: (metadata.uid(), metadata.gid()),
        device: metadata.rdev(),
        mtime: (metadata.mtime(), metadata.mtime_nsec()),
        content,
        xattrs: xattrs(path),
        same_as,
    }
}

fn xattrs(path: &Path) -> Vec<(String, Vec<u8>)> {
    let mut list = vec![0u8; 65_536];
    let length = llistxattr(path, &mut list[..]).unwrap_or(0);
    let mut xattrs = Vec::new();
    for name in list[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0u8; 65_536];
        let length = lgetxattr(path, name, &mut value[..]).unwrap();
        value.truncate(length);
        xattrs.push((String::from_utf8_lossy(name).into_owned(), value));
    }
    xattrs.sort();
    xattrs
}
