//! What the store has written down of an image.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| images::fuzzing::record(data));
