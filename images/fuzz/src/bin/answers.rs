//! What a registry answers beside documents and blobs, and the head of the docker daemon's answer.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| images::fuzzing::answers(data));
