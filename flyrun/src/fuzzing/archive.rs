//! A snapshot that was exported elsewhere.

use std::fs;
use std::path::Path;

use images::{Digest, Store};
use serde_json::{Value, json};
use tar::{Builder, EntryType, Header};

use super::assert_harmless;
use crate::snapshot::Snapshots;
use crate::snapshot::archive::{digest_of, import};

const BLOCK: usize = 512;
/// The longest header of any kind that is given its checksum.
const MAX_SIZE: usize = 1 << 20;

/// An archive is imported, or refused in a line, and then nothing of it is left. The first byte says what the others are: a tar, whose
/// headers are given checksums, or its files divided by empty lines, whose lengths and digests are then right.
pub fn snapshot_archive(directory: &Path, bytes: &[u8]) {
    let Some((form, bytes)) = bytes.split_first() else { return };
    let archive = if form & 1 == 0 { sealed(bytes) } else { built(directory, bytes) };
    let root = directory.join("root");
    fs::create_dir_all(root.join("snapshots")).expect("a directory can be made");
    let (snapshots, store) = (Snapshots::new(root.join("snapshots")), Store::open(&root));
    match import(&snapshots, &store, &archive[..], None) {
        Ok((record, _)) => {
            assert_eq!(snapshots.find(&record.id).expect("it is there").id, record.id);
            assert!(record.machine.config.volumes.is_empty() && record.machine.config.shares.is_empty());
            assert!(record.machine.config.secrets.is_none() && record.machine.config.kernel.is_none());
            fs::remove_dir_all(&root).expect("it can be removed");
        }
        Err(error) => {
            assert_harmless(&error.to_string());
            let left = fs::read_dir(root.join("snapshots")).expect("it is there").count();
            assert_eq!(left, 0, "what was refused has left something");
        }
    }
    assert!(!directory.join("outside").exists());
}

/// The files of an archive: the manifest, and those that it names in their order.
fn built(directory: &Path, bytes: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(bytes);
    let mut pieces = text.split("\n\n");
    let manifest = pieces.next().unwrap_or_default();
    let contents: Vec<&str> = pieces.collect();
    let mut value: Value = serde_json::from_str(manifest).unwrap_or_default();
    let mut names = Vec::new();
    if let Some(files) = value.get_mut("files").and_then(Value::as_array_mut) {
        for (file, content) in files.iter_mut().zip(contents.iter().chain(std::iter::repeat(&""))) {
            let Some(file) = file.as_object_mut() else { continue };
            names.push(file.get("name").and_then(Value::as_str).unwrap_or_default().to_string());
            file.insert("bytes".into(), json!(content.len()));
            file.insert("digest".into(), json!(digest_of_text(directory, content).to_string()));
        }
    }
    let manifest = if value.is_object() { value.to_string() } else { manifest.to_string() };
    let mut tar = Builder::new(Vec::new());
    let named = names.iter().map(String::as_str).zip(contents);
    for (name, content) in std::iter::once(("snapshot.json", manifest.as_str())).chain(named) {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Regular);
        header.set_size(content.len() as u64);
        // A name that no header can have is the end of it.
        if tar.append_data(&mut header, name, content.as_bytes()).is_err() {
            break;
        }
    }
    tar.into_inner().unwrap_or_default()
}

fn digest_of_text(directory: &Path, text: &str) -> Digest {
    let path = directory.join("content");
    fs::write(&path, text).expect("a file can be written");
    digest_of(&fs::File::open(&path).expect("it is there")).expect("it can be read")
}

fn sealed(bytes: &[u8]) -> Vec<u8> {
    let mut tar = bytes.to_vec();
    let mut at = 0;
    while let Some(block) = tar.get_mut(at..at + BLOCK) {
        let mut header = Header::new_old();
        header.as_mut_bytes().copy_from_slice(block);
        header.set_cksum();
        block.copy_from_slice(header.as_bytes());
        let size = header.entry_size().ok().and_then(|size| usize::try_from(size).ok());
        at += BLOCK + size.filter(|size| *size < MAX_SIZE).unwrap_or(0).next_multiple_of(BLOCK);
    }
    tar
}
