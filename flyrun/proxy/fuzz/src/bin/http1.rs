//! HTTP/1.1 of clients: in any pieces the same requests, and each that is passed on is one request to the machine too.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((piece, data)) = data.split_first() else { return };
    proxy::fuzzing::requests(data, usize::from(*piece));
});
