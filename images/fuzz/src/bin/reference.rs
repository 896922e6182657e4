//! Image references, digests and platforms as a user types them, and as an image names them.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| images::fuzzing::reference(data));
