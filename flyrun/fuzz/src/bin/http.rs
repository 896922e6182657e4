//! What a machine answers to a health check, and requests for the web page.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| flyrun::fuzzing::http(data));
