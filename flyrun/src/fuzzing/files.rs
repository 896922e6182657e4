//! Files that another process, or another version of flyrun, may have written.

use std::fs;
use std::path::Path;

use serde::{Serialize, de::DeserializeOwned};

use crate::machine::{self, Changes, health::Health};
use crate::monitor::log::{FILE, Reader};
use crate::secrets::{key::Key, sealed};
use crate::serve::Choices;
use crate::{network, snapshot, usage, volume};

/// JSON that is read is the same when it is written and read again.
fn again<T: Serialize + DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    let read: T = serde_json::from_slice(bytes).ok()?;
    let written = serde_json::to_vec(&read).expect("what was read can be written");
    let read_again: T = serde_json::from_slice(&written).expect("what was written can be read");
    assert_eq!(serde_json::to_vec(&read_again).ok(), Some(written));
    Some(read)
}

/// Records of machines, snapshots, volumes, usage and what else is kept below the root.
pub fn records(bytes: &[u8]) {
    if let Some(record) = again::<machine::Record>(bytes) {
        let _ = (record.config.limits.needs_cgroup(), record.config.limits.disk_rate());
        let _ = record.config.limits.check_network(&record.config.network);
    }
    again::<snapshot::Record>(bytes);
    again::<volume::Volume>(bytes);
    again::<usage::Interval>(bytes);
    again::<Health>(bytes);
    again::<network::Facts>(bytes);
    again::<Choices>(bytes);
    again::<Changes>(bytes);
}

/// A machine's log: its lines, whole or not, in two files.
pub fn log(directory: &Path, bytes: &[u8]) {
    let half = bytes.len() / 2;
    let (older, newer) = bytes.split_at(half);
    fs::write(directory.join(format!("{FILE}.1")), older).expect("a file can be written");
    fs::write(directory.join(FILE), newer).expect("a file can be written");
    let mut reader = Reader::open(directory).expect("the files can be opened");
    let most = bytes.iter().filter(|byte| **byte == b'\n').count();
    let mut count = 0;
    while reader.next().expect("the files can be read").is_some() {
        count += 1;
        assert!(count <= most, "more entries than lines");
    }
}

/// A file of secrets that somebody has changed is not decrypted.
pub fn secrets(bytes: &[u8]) {
    let key = Key::example(7);
    assert!(sealed::open(&key, "web", bytes).is_err());
    let nonce = [1; ring::aead::NONCE_LEN];
    let mut file = sealed::seal(&key, "web", nonce, b"{}").expect("it can be sealed");
    let good = file.clone();
    file.iter_mut().zip(bytes).for_each(|(byte, other)| *byte ^= other);
    assert_eq!(sealed::open(&key, "web", &file).is_ok(), file == good);
    assert!(sealed::open(&key, "api", &good).is_err());
}
