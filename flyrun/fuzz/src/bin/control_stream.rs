//! Guest-init's control connection, as the host reads it.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| flyrun::fuzzing::control_stream(data));
