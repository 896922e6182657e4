//! The network device with any ring and any packet: what arrives complete arrives as it was sent.
#![no_main]

use std::{
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixDatagram,
    },
};

use devices::{
    testing::Guest,
    virtio::net::{Backend, Net, NetConfig, Offload},
};
use devices_fuzz::{Input, driver_step};
use libfuzzer_sys::fuzz_target;

struct Wire(UnixDatagram);

impl Backend for Wire {
    fn file(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn set_offload(&mut self, _: Offload) -> io::Result<()> {
        Ok(())
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let Ok((here, there)) = UnixDatagram::pair() else { return };
    if here.set_nonblocking(true).is_err() || there.set_nonblocking(true).is_err() {
        return;
    }
    let config = NetConfig { mac: [2, 0, 0, 0, 0, 1], mtu: 1500 };
    let Ok(device) = Net::new(Box::new(Wire(here)), config) else { return };
    let mut guest = Guest::new(device);
    let features = u64::from(input.u8() % 4) << 28 | u64::from(input.u8() & 1) << 15;
    guest.start(features, 1 << (input.u8() % 9));
    let mut received = vec![0; 70_000];
    while !input.is_empty() {
        match input.u8() {
            0..64 => driver_step(&mut guest, &mut input),
            64..128 => post(&mut guest, &mut input),
            128..192 => {
                let length = 12 + usize::from(input.u16()) % 66_000;
                let _ = there.send(&vec![0x5a; length]);
                guest.run();
            }
            _ => transmit(&mut guest, &mut input),
        }
        while let Ok(length) = there.recv(&mut received) {
            assert!((12..=65_565).contains(&length), "a packet of {length} bytes went out");
        }
    }
});

/// Gives the device buffers, in one chain or several.
fn post(guest: &mut Guest, input: &mut Input) {
    guest.free_memory();
    let length = input.u16();
    for _ in 0..input.u8() % 64 {
        let at = guest.allocate(length.into());
        guest.add(0, &[(at, length.into(), true)]);
    }
    guest.kick(0);
    while guest.used(0).is_some() {}
}

/// Sends a packet in pieces.
fn transmit(guest: &mut Guest, input: &mut Input) {
    guest.free_memory();
    let (pieces, length) = (u32::from(input.u8() % 20) + 1, u32::from(input.u16() % 9000));
    let at = guest.allocate(u64::from(pieces * length) + 16);
    let buffers: Vec<_> = (0..pieces).map(|n| (at + u64::from(n * length), length, false)).collect();
    guest.add(1, &buffers);
    guest.kick(1);
    while guest.used(1).is_some() {}
}
