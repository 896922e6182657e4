//! The balloon with any rings and any configuration. Whatever it gives back lies in guest memory.
#![no_main]

use devices::{
    testing::{Guest, MEMORY_SIZE},
    virtio::balloon::{Balloon, Reclaim},
};
use devices_fuzz::{Input, driver_step, start};
use libfuzzer_sys::fuzz_target;
use vm_memory::GuestAddress;

struct Checked;

impl Reclaim for Checked {
    fn reclaim(&mut self, address: GuestAddress, length: u32) -> std::io::Result<()> {
        assert!(length > 0 && address.0.checked_add(length.into()).is_some_and(|end| end <= MEMORY_SIZE));
        if length.is_multiple_of(3) { Err(std::io::ErrorKind::OutOfMemory.into()) } else { Ok(()) }
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let Ok(device) = Balloon::new(Box::new(Checked)) else { return };
    let mut guest = Guest::new(device);
    start(&mut guest, &mut input);
    while !input.is_empty() {
        driver_step(&mut guest, &mut input);
    }
});
