//! A snapshot that was exported elsewhere.
#![no_main]
#![allow(clippy::expect_used)]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

static DIRECTORY: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().expect("there is room for files"));

fuzz_target!(|data: &[u8]| flyrun::fuzzing::snapshot_archive(DIRECTORY.path(), data));
