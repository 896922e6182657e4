//! The transport's registers in any order, width and value: the life cycle holds, and a reset makes all as new.
#![no_main]

use devices::{testing::Guest, virtio::rng::Rng};
use devices_fuzz::{Input, driver_step};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let Ok(device) = Rng::new() else { return };
    let mut guest = Guest::new(device);
    while !input.is_empty() {
        match input.u8() % 8 {
            // The registers that lead on in the life cycle, with values that do.
            0 => guest.write(0x70, [0, 1, 3, 11, 15, 64, 128, 143][usize::from(input.u8() % 8)]),
            1 => {
                guest.negotiate(u64::from(input.u8() % 4) << 28);
            }
            2 => {
                let queue = guest.set_up_queue(0, 1 << (input.u8() % 8));
                guest.queues = vec![queue];
            }
            3 => {
                let offset = u64::from(input.u16()) % 0x110;
                guest.transport.write(offset, input.bytes(8));
            }
            4 => {
                let offset = [0x24, 0x20, 0x30, 0x38, 0x44, 0x50, 0x64, 0x80, 0x84, 0x90, 0xa0]
                    [usize::from(input.u8() % 11)];
                let value = if input.u8() & 1 == 0 { input.address() as u32 } else { input.u8().into() };
                guest.write(offset, value);
            }
            5 => guest.run(),
            _ => driver_step(&mut guest, &mut input),
        }
        let status = guest.status();
        assert!([0, 1, 3, 11, 15].contains(&(status & 15)) && status & 0x30 == 0, "status {status:#x}");
        assert!(!guest.transport.is_active() || status == 15, "active with status {status:#x}");
    }
    guest.write(0x70, 0);
    guest.start(0, 8);
    let address = guest.allocate(8);
    guest.add(0, &[(address, 8, true)]);
    guest.kick(0);
    assert_eq!(guest.used(0).map(|used| used.1), Some(8), "a reset makes all as new");
});
