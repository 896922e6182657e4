//! Unpacks layers into a directory of their own, beside one that must stay untouched.

use std::{
    fs,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use guest_init::{
    failure::Failure,
    unpack::{image::Unpacker, layer::Limits},
};
use protocol::Compression;
use sha2::{Digest, Sha256};

use crate::{snapshot, tarball};

/// What every image gets.
pub const ADDED: [&str; 11] = [
    "dev",
    "etc",
    "etc/hostname",
    "etc/hosts",
    "etc/resolv.conf",
    "proc",
    "run",
    "run/flyrun",
    "sys",
    "tmp",
    "var",
];

pub const LIMITS: Limits = Limits { bytes: 1 << 30, entries: 1 << 20 };

/// A directory that holds `root`, and `outside` with a file that nothing may reach.
pub struct Unpacked {
    directory: tempfile::TempDir,
}

impl Unpacked {
    pub fn empty() -> Self {
        rustix::process::umask(rustix::fs::Mode::empty());
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("root")).unwrap();
        fs::create_dir(directory.path().join("outside")).unwrap();
        fs::write(directory.path().join("outside/secret"), "untouched").unwrap();
        Self { directory }
    }

    pub fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }

    pub fn outside(&self) -> PathBuf {
        self.directory.path().join("outside")
    }

    pub fn unpack_raw(
        &self,
        layers: &[(Vec<u8>, Compression, [u8; 32])],
        limits: Limits,
    ) -> Result<(), Failure> {
        let root: OwnedFd = fs::File::open(self.root()).unwrap().into();
        let mut unpacker = Unpacker::new(root, limits)?;
        for (bytes, compression, diff_id) in layers {
            unpacker.apply(&bytes[..], *compression, diff_id)?;
        }
        unpacker.finish()
    }

    pub fn unpack_tars(&self, tars: &[Vec<u8>]) -> Result<(), Failure> {
        let layers: Vec<_> =
            tars.iter().map(|tar| (tar.clone(), Compression::None, Sha256::digest(tar).into())).collect();
        self.unpack_raw(&layers, LIMITS)
    }

    /// Nothing but the root has changed.
    pub fn assert_outside_untouched(&self) {
        let names = |path: &Path| {
            let mut names: Vec<_> =
                fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        assert_eq!(names(self.directory.path()), ["outside", "root"]);
        assert_eq!(names(&self.outside()), ["secret"]);
        assert_eq!(fs::read_to_string(self.outside().join("secret")).unwrap(), "untouched");
    }

    pub fn read(&self, path: &str) -> String {
        fs::read_to_string(self.root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// All paths below the root but those that every image gets.
    pub fn paths(&self) -> Vec<String> {
        let all = snapshot::take(&self.root()).into_keys();
        all.filter(|path| !path.is_empty() && !ADDED.contains(&path.as_str())).collect()
    }
}

/// Unpacks layers that must be good.
pub fn unpack(layers: &[&[tarball::Item]]) -> Unpacked {
    let unpacked = Unpacked::empty();
    let tars: Vec<_> = layers.iter().map(|items| tarball::tar(items)).collect();
    unpacked.unpack_tars(&tars).unwrap();
    unpacked.assert_outside_untouched();
    unpacked
}

/// Unpacks one layer that must be refused.
pub fn refuse(items: &[tarball::Item]) -> Failure {
    let unpacked = Unpacked::empty();
    let failure = unpacked.unpack_tars(&[tarball::tar(items)]).unwrap_err();
    unpacked.assert_outside_untouched();
    failure
}
