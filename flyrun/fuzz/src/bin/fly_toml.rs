//! fly.toml.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| flyrun::fuzzing::fly_toml(data));
