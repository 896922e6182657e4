//! Archives and layouts of any bytes, imported into a store.

use std::{
    collections::BTreeMap,
    fs,
    io::{Cursor, Read},
    path::{Path, PathBuf},
};

use super::{Files, Import, Imported, TarIndex, docker, import_either, layout};
use crate::{Digest, NoProgress, Platform, Result, Store};

const BLOCK: usize = 512;
/// What the kind of a pax header, of a long name and of a long link is.
const KINDS_WITH_NAMES: [u8; 3] = [b'x', b'L', b'K'];

/// A tar whose headers have the checksums that they need to be looked at.
pub(crate) fn archive(directory: &Path, bytes: &[u8]) {
    let mut tar = bytes.to_vec();
    seal(&mut tar);
    let path = directory.join("image.tar");
    if fs::write(&path, &tar).is_err() {
        return;
    }
    let Ok(index) = TarIndex::open(&path) else { return };
    for name in ["manifest.json", "index.json", "blobs/sha256/x", "../image.tar", "/a", "a"] {
        let Some((mut section, size)) = index.file(name) else { continue };
        let mut content = Vec::new();
        let read = section.read_to_end(&mut content);
        assert!(size <= tar.len() as u64 && read.is_ok_and(|count| count as u64 == size), "{name}");
    }
    import(directory, |import| import_either(import, &index));
}

/// An OCI layout of these documents, divided by lines that are empty: `index.json` first. `$1` in one is the digest of the
/// document with number 1 behind it, and `%1` its length: digests nobody guesses.
pub(crate) fn layout(directory: &Path, bytes: &[u8]) {
    let mut files = Made::default();
    let mut documents: Vec<Vec<u8>> = Vec::new();
    for document in split(bytes).into_iter().rev().take(9) {
        let document = filled(document, &documents);
        files.contents.insert(format!("blobs/sha256/{}", Digest::of(&document).hex()), document.clone());
        documents.push(document);
    }
    if let Some(first) = documents.pop() {
        files.contents.insert(layout::INDEX.into(), first);
    }
    for tag in [None, Some("latest"), Some("a")] {
        import(directory, |import| layout::import(import, &files, tag));
    }
}

/// The head of what docker's daemon answers.
pub(crate) fn daemon(bytes: &[u8]) {
    let mut left = bytes;
    if let Ok(Some(_)) = docker::read_head(&mut left) {
        assert!(bytes.starts_with(b"HTTP/1.") && left.len() < bytes.len());
    }
}

fn import(directory: &Path, from: impl FnOnce(&Import<'_>) -> Result<Imported>) {
    let root = directory.join("store");
    let store = Store::open(&root);
    let import =
        Import { store: &store, name: "an image", platform: &Platform::default(), progress: &NoProgress };
    if let Ok(Imported { image, .. }) = from(&import) {
        assert!(!image.layers.is_empty() && image.layers.len() <= crate::oci::MAX_LAYERS);
        for layer in &image.layers {
            let kept = fs::read(&layer.path).unwrap_or_default();
            assert!(layer.path.starts_with(&root), "{layer:?}");
            assert_eq!((Digest::of(&kept), kept.len() as u64), (layer.digest, layer.size), "{layer:?}");
        }
    }
    // Blobs of one input must not answer for those of the next.
    let _ = fs::remove_dir_all(&root);
}

/// Files that are in no archive.
#[derive(Default)]
struct Made {
    contents: BTreeMap<String, Vec<u8>>,
    path: PathBuf,
}

impl Files for Made {
    fn open(&self, name: &str) -> Result<Option<(Box<dyn Read + '_>, u64)>> {
        let content = self.contents.get(name);
        Ok(content.map(|bytes| (Box::new(Cursor::new(bytes)) as Box<dyn Read>, bytes.len() as u64)))
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

fn split(bytes: &[u8]) -> Vec<&[u8]> {
    let mut parts = Vec::new();
    let mut rest = bytes;
    while let Some(at) = rest.windows(2).position(|pair| pair == b"\n\n") {
        let (part, after) = rest.split_at(at);
        parts.push(part);
        rest = after.get(2..).unwrap_or_default();
    }
    parts.push(rest);
    parts
}

fn filled(document: &[u8], behind: &[Vec<u8>]) -> Vec<u8> {
    let mut filled = Vec::with_capacity(document.len());
    let mut bytes = document.iter().peekable();
    while let Some(byte) = bytes.next() {
        let number = bytes.peek().filter(|next| next.is_ascii_digit()).map(|next| usize::from(**next - b'0'));
        // The last document was read first.
        let named = number.and_then(|number| behind.iter().rev().nth(number.checked_sub(1)?));
        match (byte, named) {
            (b'$', Some(named)) => filled.extend(Digest::of(named).to_string().bytes()),
            (b'%', Some(named)) => filled.extend(named.len().to_string().bytes()),
            _ => {
                filled.push(*byte);
                continue;
            }
        }
        bytes.next();
    }
    filled
}

/// Gives every header its checksum, walking the archive as its reader does.
fn seal(tar: &mut [u8]) {
    let mut at = 0;
    while let Some(block) = tar.get_mut(at..at + BLOCK) {
        if block.iter().all(|byte| *byte == 0) {
            return;
        }
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let has_data = matches!(block[156], b'0' | b'7' | b'g' | 0) || KINDS_WITH_NAMES.contains(&block[156]);
        let size = std::str::from_utf8(&block[124..135]).ok();
        let size = size.and_then(|text| usize::from_str_radix(text.trim_matches(['\0', ' ']), 8).ok());
        let size = size.filter(|size| has_data && *size < 1 << 20).unwrap_or(0);
        at += BLOCK + size.next_multiple_of(BLOCK);
    }
}
