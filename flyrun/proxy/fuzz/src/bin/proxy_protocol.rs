//! The header that a proxy in front begins with: read, it is the same when it is written anew.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| proxy::fuzzing::proxy_header(data));
