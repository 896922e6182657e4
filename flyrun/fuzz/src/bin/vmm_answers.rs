//! What flyrun-vmm answers, which its guest may have taken over.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| flyrun::fuzzing::vmm_answers(data));
