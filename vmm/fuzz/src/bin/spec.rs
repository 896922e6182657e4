//! A machine's spec of any bytes: one that is valid is the same when it is written and read again.
#![no_main]
#![allow(clippy::expect_used, reason = "only fuzzers run this")]

use libfuzzer_sys::fuzz_target;
use vmm::{
    spec::{VmSpec, queue_pairs},
    validate::validate,
};

fuzz_target!(|data: &[u8]| {
    let Ok(spec) = serde_json::from_slice::<VmSpec>(data) else { return };
    match validate(&spec) {
        Ok(()) => {
            assert!(queue_pairs(spec.cpus) >= 1);
            let written = serde_json::to_vec(&spec).expect("it can be written");
            assert_eq!(serde_json::from_slice::<VmSpec>(&written).ok(), Some(spec));
        }
        Err(error) => assert!(error.to_string().lines().count() == 1, "{error}"),
    }
});
