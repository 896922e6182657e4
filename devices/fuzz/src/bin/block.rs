//! The block device with any ring and any request: files keep their length, and what is read was written.
#![no_main]
#![allow(clippy::panic, reason = "only fuzzers run this")]

use std::{fs, num::NonZeroU64, path::PathBuf, sync::LazyLock};

use devices::{
    testing::{Guest, TestClock},
    virtio::{
        block::{Backend, Block},
        rate::Rate,
        throttle::Throttle,
    },
};
use devices_fuzz::{Input, directory, driver_step, start};
use libfuzzer_sys::fuzz_target;

const BYTES: u64 = 64 << 10;

static FILES: LazyLock<Vec<PathBuf>> = LazyLock::new(|| {
    let dir = directory("block");
    let lengths = [BYTES, 700, 0, 4096];
    let file = |(n, length): (usize, u64)| {
        let path = dir.join(n.to_string());
        let _ = fs::write(&path, vec![0x5a; length as usize]);
        path
    };
    lengths.into_iter().enumerate().map(file).collect()
});

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let read_only = input.u8() & 1 != 0;
    let files = if read_only { &FILES[1..] } else { &FILES[..1] };
    let Ok(backend) = Backend::open(files, read_only) else { return };
    let fault = Box::new(|fault| panic!("the host did not fail: {fault}"));
    let Ok(device) = Block::new(backend, "fuzz", fault) else { return };
    let clock = TestClock::new();
    let rate =
        Rate { bytes: NonZeroU64::new(input.u32().into()), operations: NonZeroU64::new(input.u8().into()) };
    let mut guest = Guest::new(device.with_throttle(Throttle::with_alarm(rate, Box::new(clock.clone()))));
    start(&mut guest, &mut input);
    while !input.is_empty() {
        match input.u8() {
            0..64 => driver_step(&mut guest, &mut input),
            64..80 => {
                clock.advance(u64::from(input.u32()) << 4);
                guest.run();
            }
            _ => request(&mut guest, &mut input),
        }
    }
    drop(guest);
    if !read_only {
        assert_eq!(
            fs::metadata(&FILES[0]).map(|file| file.len()).ok(),
            Some(BYTES),
            "the file's length has changed"
        );
    }
});

/// A request in one of many framings; mostly good enough to be carried out.
fn request(guest: &mut Guest, input: &mut Input) {
    guest.free_memory();
    let kind = [0, 1, 4, 8, 11, 13, 13, input.u8().into()][usize::from(input.u8() % 8)];
    let sector = if input.u8() < 250 { u64::from(input.u8()) } else { input.u64() };
    let mut header: Vec<u8> = [u32::to_le_bytes(kind), [0; 4]].concat();
    header.extend(sector.to_le_bytes());
    let most = usize::from(input.u8() % 40);
    let ranges = input.bytes(most);
    let mut buffers = Vec::new();
    if kind == 11 || kind == 13 {
        header.extend([ranges, &[0; 16]].concat().iter().take(ranges.len().next_multiple_of(16)));
    }
    let cut = u32::from(input.u8()) + 1;
    let at = guest.place(&header);
    for from in (0..header.len() as u32).step_by(cut as usize) {
        buffers.push((at + u64::from(from), cut.min(header.len() as u32 - from), false));
    }
    let data = u32::from(input.u8()) * 512;
    let place = guest.allocate((data + 1).into());
    if kind == 1 {
        buffers.push((place, data, false));
        buffers.push((place + u64::from(data), 1, true));
    } else {
        buffers.push((place, data + 1, true));
    }
    guest.add(0, &buffers);
    guest.kick(0);
    guest.used(0);
}
