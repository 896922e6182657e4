//! Files of variables and of secrets.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| flyrun::fuzzing::env_file(data));
