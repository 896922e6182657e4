//! Unpacking: whatever two layers hold, nothing outside of the root changes and the limits hold.
#![no_main]
#![allow(clippy::expect_used)]

use std::{fs, path::Path};

use guest_init::unpack::{image::Unpacker, layer::Limits};
use guest_init_fuzz::seal;
use libfuzzer_sys::fuzz_target;
use protocol::Compression;
use rustix::fs::Mode;
use sha2::{Digest, Sha256};

const LIMITS: Limits = Limits { bytes: 1 << 20, entries: 200 };
/// Fixed, so that links of the corpus can lead here.
const DIRECTORY: &str = "/dev/shm/flyrun-fuzz";

fuzz_target!(|data: &[u8]| {
    let Some((split, data)) = data.split_first() else { return };
    let split = (usize::from(*split) * 512).min(data.len());
    let (lower, upper) = data.split_at(split);
    let directory = Path::new(DIRECTORY);
    let root = directory.join("root");
    prepare(directory, &root);
    let mut unpacker = Unpacker::new(fs::File::open(&root).expect("the root is there").into(), LIMITS)
        .expect("the root is a directory");
    let applied = [lower, upper].into_iter().try_for_each(|layer| {
        let mut layer = layer.to_vec();
        seal(&mut layer);
        unpacker.apply(&layer[..], Compression::None, &Sha256::digest(&layer).into())
    });
    if applied.is_ok() {
        unpacker.finish().expect("what was applied can be completed");
    }
    check_outside(directory);
});

fn prepare(directory: &Path, root: &Path) {
    rustix::process::umask(Mode::empty());
    if !directory.exists() {
        fs::create_dir_all(directory.join("outside")).expect("a directory can be made");
        fs::write(directory.join("outside/secret"), "untouched").expect("a file can be made");
    }
    if root.exists() {
        fs::remove_dir_all(root).expect("the last tree can be removed");
    }
    fs::create_dir(root).expect("a directory can be made");
}

fn check_outside(directory: &Path) {
    let names = |path: &Path| {
        let entries = fs::read_dir(path).expect("the directory is there");
        let mut names: Vec<_> = entries.map(|entry| entry.expect("it can be read").file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(directory), ["outside", "root"]);
    assert_eq!(names(&directory.join("outside")), ["secret"]);
    let secret = fs::read(directory.join("outside/secret")).expect("the file is there");
    assert_eq!(secret, b"untouched");
}
