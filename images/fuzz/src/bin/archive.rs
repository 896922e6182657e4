//! A tar that may be an image's, as `docker save` or an OCI tool writes it.
#![no_main]
#![allow(clippy::expect_used)]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

static DIRECTORY: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().expect("there is room for files"));

fuzz_target!(|data: &[u8]| images::fuzzing::archive(DIRECTORY.path(), data));
