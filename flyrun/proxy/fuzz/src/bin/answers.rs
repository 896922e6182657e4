//! What machines answer: heads of HTTP/1.1, and what of them is for the proxy.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| proxy::fuzzing::answers(data));
