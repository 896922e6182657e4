//! The network device with any ring and any packet: what arrives complete arrives as it was sent.
#![no_main]

use std::{
    io,
    num::NonZeroU64,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixDatagram,
    },
};

use devices::{
    testing::{Guest, TestClock},
    virtio::{
        net::{Backend, Net, NetConfig, Offload},
        rate::Rate,
        throttle::Throttle,
    },
};
use devices_fuzz::{Input, driver_step};
use libfuzzer_sys::fuzz_target;

/// One for each pair of queues.
struct Wires(Vec<UnixDatagram>);

impl Backend for Wires {
    fn file(&self, pair: usize) -> Option<BorrowedFd<'_>> {
        self.0.get(pair).map(UnixDatagram::as_fd)
    }

    fn set_pairs(&mut self, count: usize) -> io::Result<()> {
        assert!((1..=self.0.len()).contains(&count), "{count} pairs");
        Ok(())
    }

    fn set_offload(&mut self, _: Offload) -> io::Result<()> {
        Ok(())
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let pairs = u16::from(input.u8() % 3) + 1;
    let (mut here, mut there) = (Vec::new(), Vec::new());
    for _ in 0..pairs {
        let Ok((ours, theirs)) = UnixDatagram::pair() else { return };
        if ours.set_nonblocking(true).is_err() || theirs.set_nonblocking(true).is_err() {
            return;
        }
        here.push(ours);
        there.push(theirs);
    }
    let config = NetConfig { mac: [2, 0, 0, 0, 0, 1], mtu: 1500, pairs };
    let Ok(device) = Net::new(Box::new(Wires(here)), config) else { return };
    let clock = TestClock::new();
    let rate =
        Rate { bytes: NonZeroU64::new(input.u32().into()), operations: NonZeroU64::new(input.u8().into()) };
    let throttle = || Throttle::with_alarm(rate, Box::new(clock.clone()));
    let mut guest =
        Guest::new(device.with_throttles(throttle(), throttle()).with_command_throttle(throttle()));
    let mut features = u64::from(input.u8() % 4) << 28 | u64::from(input.u8() & 1) << 15;
    if pairs > 1 {
        features |= u64::from(input.u8() & 1) << 17 | u64::from(input.u8() & 1) << 22;
    }
    guest.start(features, 1 << (input.u8() % 9));
    let mut received = vec![0; 70_000];
    while !input.is_empty() {
        match input.u8() {
            0..48 => driver_step(&mut guest, &mut input),
            48..56 => {
                clock.advance(input.u32().into());
                guest.run();
            }
            56..64 => command(&mut guest, &mut input),
            64..128 => post(&mut guest, &mut input),
            128..192 => {
                let length = 12 + usize::from(input.u16()) % 66_000;
                let _ = there[usize::from(input.u8()) % there.len()].send(&vec![0x5a; length]);
                guest.run();
            }
            _ => transmit(&mut guest, &mut input),
        }
        for wire in &there {
            while let Ok(length) = wire.recv(&mut received) {
                assert!((12..=65_565).contains(&length), "a packet of {length} bytes went out");
            }
        }
    }
});

/// Asks for some number of pairs, where the control queue may be.
fn command(guest: &mut Guest, input: &mut Input) {
    guest.free_memory();
    let queue = usize::from(input.u8() % 4) * 2;
    let at = guest.place(&[4, 0, input.u8() % 6, 0]);
    guest.add(queue, &[(at, 4, false), (at + 8, 1, true)]);
    guest.kick(queue);
    guest.used(queue);
}

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
