//! Lines on the sockets of a monitor and of `flyrun serve`.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| flyrun::fuzzing::control(data));
