//! The encrypted file of an app's secrets.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| flyrun::fuzzing::secrets(data));
