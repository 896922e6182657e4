//! The entropy device with any ring.
#![no_main]

use devices::{testing::Guest, virtio::rng::Rng};
use devices_fuzz::{Input, driver_step, start};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let Ok(device) = Rng::new() else { return };
    let mut guest = Guest::new(device);
    start(&mut guest, &mut input);
    while !input.is_empty() {
        driver_step(&mut guest, &mut input);
    }
});
