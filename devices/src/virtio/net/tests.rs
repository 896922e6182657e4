//! The user-space card, driven as a guest would, with a socket pair in place of the TAP.

use std::{
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixDatagram,
    },
    sync::{Arc, Mutex},
};

use proptest::prelude::*;

use super::*;
use crate::virtio::throttle::Throttle;
use crate::{
    testing::{Descriptor, Guest, NEXT, WRITE},
    virtio::mmio::status,
};

mod pairs;
mod throttle;

const MRG: u64 = config::F_MRG_RXBUF;
const EVENT_IDX: u64 = crate::virtio::mmio::F_EVENT_IDX;
const CONFIG: NetConfig = NetConfig { mac: [2, 0xf1, 1, 2, 3, 4], mtu: 1400, pairs: 1 };

struct Wire {
    socket: UnixDatagram,
    offload: Arc<Mutex<Offload>>,
}

impl Backend for Wire {
    fn file(&self, pair: usize) -> Option<BorrowedFd<'_>> {
        (pair == 0).then(|| self.socket.as_fd())
    }

    fn set_pairs(&mut self, count: usize) -> io::Result<()> {
        if count == 1 { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }

    fn set_offload(&mut self, offload: Offload) -> io::Result<()> {
        *self.offload.lock().unwrap() = offload;
        Ok(())
    }
}

/// A wire, its other end, and the offload that it was told.
fn wire() -> (Wire, UnixDatagram, Arc<Mutex<Offload>>) {
    let (here, there) = UnixDatagram::pair().unwrap();
    for socket in [&here, &there] {
        socket.set_nonblocking(true).unwrap();
    }
    let offload = Arc::default();
    (Wire { socket: here, offload: Arc::clone(&offload) }, there, offload)
}

/// A started guest, the other end of its wire, and the offload that the wire was told.
fn guest(features: u64, size: u16) -> (Guest, UnixDatagram, Arc<Mutex<Offload>>) {
    let (wire, there, offload) = wire();
    let mut guest = Guest::new(Net::new(Box::new(wire), CONFIG).unwrap());
    guest.start(features, size);
    (guest, there, offload)
}

fn packet(length: usize) -> Vec<u8> {
    (0..length).map(|n| (n % 251) as u8).collect()
}

/// What arrives for `packet`: num_buffers is the device's.
fn arrived(packet: &[u8], buffers: u16) -> Vec<u8> {
    let mut expected = packet.to_vec();
    expected[10..12].copy_from_slice(&buffers.to_le_bytes());
    expected
}

fn post(guest: &mut Guest, length: u32) -> u64 {
    let address = guest.allocate(length.into());
    guest.add(0, &[(address, length, true)]).unwrap();
    address
}

#[test]
fn the_configuration_space_tells_address_link_and_mtu() {
    let (guest, ..) = guest(0, 16);
    let mut data = [0xff; 16];
    guest.transport.read(0x100, &mut data);
    assert_eq!(data, [2, 0xf1, 1, 2, 3, 4, 1, 0, 1, 0, 0x78, 5, 0, 0, 0, 0]);
}

#[test]
fn offload_follows_the_features_and_needs_checksums() {
    let told = |features| *guest(features, 16).2.lock().unwrap();
    assert_eq!(told(0), Offload::default());
    assert_eq!(told(1 << 7), Offload::default());
    let all = 1 << 1 | 1 << 7 | 1 << 8 | 1 << 9;
    assert_eq!(told(all), Offload { checksum: true, tso4: true, tso6: true, ecn: true });
}

#[test]
fn a_packet_goes_out_whole_from_several_buffers() {
    let (mut guest, wire, _) = guest(0, 16);
    let bytes = packet(1012);
    let at = guest.place(&bytes);
    guest.add(1, &[(at, 5, false), (at + 5, 7, false), (at + 12, 1000, false)]).unwrap();
    guest.kick(1);
    let mut got = [0; 2000];
    assert_eq!(wire.recv(&mut got).unwrap(), 1012);
    assert_eq!(got[..1012], bytes);
    assert_eq!(guest.used(1).unwrap().1, 0);
    assert_eq!(guest.take_interrupt(), 1);
}

#[test]
fn buffers_that_wait_for_a_packet_are_there_again_after_a_snapshot() {
    for features in [0, MRG | EVENT_IDX] {
        let (mut guest, ..) = guest(features, 16);
        for _ in 0..5 {
            post(&mut guest, 2000);
        }
        guest.kick(0);
        let state = guest.transport.save().unwrap();
        let (here, there) = UnixDatagram::pair().unwrap();
        here.set_nonblocking(true).unwrap();
        let wire = Wire { socket: here, offload: Arc::default() };
        let device = Arc::new(Mutex::new(Net::new(Box::new(wire), CONFIG).unwrap()));
        let mut next = guest.continued(device, &state).unwrap();
        next.run();
        for _ in 0..5 {
            there.send(&packet(500)).unwrap();
        }
        next.run();
        for _ in 0..5 {
            assert_eq!(next.used(0).unwrap().1, 500);
        }
        assert_eq!(next.used(0), None);
    }
}

#[test]
fn what_is_no_packet_is_returned_and_not_sent() {
    let (mut guest, wire, _) = guest(0, 16);
    let at = guest.allocate(70_000);
    guest.add(1, &[(at, 11, false)]).unwrap();
    guest.add(1, &[(at, 70_000, false)]).unwrap();
    guest.add(1, &[(at, 100, true)]).unwrap();
    guest.kick(1);
    for _ in 0..3 {
        assert_eq!(guest.used(1).unwrap().1, 0);
    }
    assert_eq!(wire.recv(&mut [0; 10]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
}

#[test]
fn a_packet_that_came_before_its_buffer_is_received_with_it() {
    let (mut guest, wire, _) = guest(0, 16);
    let bytes = packet(100);
    wire.send(&bytes).unwrap();
    guest.run();
    assert!(guest.used(0).is_none());
    let at = post(&mut guest, 1600);
    guest.kick(0);
    assert_eq!(guest.used(0).unwrap().1, 100);
    assert_eq!(guest.bytes(at, 100), arrived(&bytes, 1));
    assert_eq!(guest.take_interrupt(), 1);
}

#[test]
fn a_large_packet_is_spread_over_merged_buffers_that_appear_together() {
    for features in [MRG, MRG | EVENT_IDX] {
        let (mut guest, wire, _) = guest(features, 64);
        let places: Vec<_> = (0..64).map(|_| post(&mut guest, 1536)).collect();
        guest.kick(0);
        for length in [65_000usize, 60] {
            let bytes = packet(length);
            wire.send(&bytes).unwrap();
            guest.run();
            let count = length.div_ceil(1536);
            let mut got = Vec::new();
            let first = if length == 60 { 43 } else { 0 };
            for place in &places[first..first + count] {
                let written = guest.used(0).unwrap().1 as usize;
                got.extend(guest.bytes(*place, written));
            }
            assert!(guest.used(0).is_none());
            assert_eq!(got, arrived(&bytes, count as u16));
            if features == MRG {
                assert_eq!(guest.take_interrupt(), 1);
            }
        }
    }
}

#[test]
fn a_packet_waits_for_more_buffers_where_they_are_merged() {
    let (mut guest, wire, _) = guest(MRG, 16);
    let bytes = packet(3000);
    let first = post(&mut guest, 1536);
    guest.kick(0);
    wire.send(&bytes).unwrap();
    guest.run();
    assert!(guest.used(0).is_none());
    let second = post(&mut guest, 1536);
    guest.kick(0);
    assert_eq!((guest.used(0).unwrap().1, guest.used(0).unwrap().1), (1536, 1464));
    assert_eq!([guest.bytes(first, 1536), guest.bytes(second, 1464)].concat(), arrived(&bytes, 2));
}

#[test]
fn a_packet_too_large_for_any_room_is_lost_and_the_next_arrives() {
    for (features, buffers) in [(0, 1), (MRG, 4)] {
        let (mut guest, wire, _) = guest(features, 4);
        let at: Vec<_> = (0..buffers).map(|_| post(&mut guest, 200)).collect();
        guest.kick(0);
        wire.send(&packet(1000)).unwrap();
        wire.send(&packet(150)).unwrap();
        guest.run();
        assert_eq!(guest.used(0).unwrap().1, 150);
        assert_eq!(guest.bytes(at[0], 150), arrived(&packet(150), 1));
    }
}

#[test]
fn a_broken_ring_stops_the_device_and_a_reset_revives_it() {
    let (mut guest, wire, _) = guest(0, 16);
    let loops = Descriptor { address: 0x10_0000, length: 10, flags: NEXT | WRITE, next: 0 };
    let Guest { queues, memory, .. } = &mut guest;
    queues[0].set_descriptor(memory, 0, loops);
    queues[0].make_available(memory, 0);
    guest.kick(0);
    assert_ne!(guest.status() & status::NEEDS_RESET, 0);
    guest.start(0, 16);
    let at = post(&mut guest, 1600);
    guest.kick(0);
    wire.send(&packet(90)).unwrap();
    guest.run();
    assert_eq!(guest.bytes(at, 90), arrived(&packet(90), 1));
}

#[test]
fn an_interface_that_is_not_there_is_not_made() {
    assert_eq!(Tap::open("flyrun-none", 1).unwrap_err().raw_os_error(), Some(libc::ENODEV));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever the sizes of packets and buffers, each packet that fits arrives whole and in order.
    #[test]
    fn packets_arrive_in_order_and_whole(
        merged: bool,
        event_idx: bool,
        lengths in prop::collection::vec(12usize..5000, 1..40),
        buffers in 600u32..6000,
    ) {
        let features = if merged { MRG } else { 0 } | if event_idx { EVENT_IDX } else { 0 };
        let (mut guest, wire, _) = guest(features, 16);
        for length in lengths {
            guest.free_memory();
            // As many as one packet of any length here needs.
            let mut places = std::collections::HashMap::new();
            while places.len() < 12 {
                let at = guest.allocate(buffers.into());
                let Some(head) = guest.add(0, &[(at, buffers, true)]) else { break };
                places.insert(head, at);
            }
            guest.kick(0);
            let bytes = packet(length);
            wire.send(&bytes).unwrap();
            guest.run();
            let (mut got, mut count) = (Vec::new(), 0);
            while let Some((head, written)) = guest.used(0) {
                got.extend(guest.bytes(places[&head], written as usize));
                count += 1;
            }
            if merged || length <= buffers as usize {
                prop_assert_eq!(got, arrived(&bytes, count));
            } else {
                prop_assert_eq!(got.len(), 0);
            }
            // The next packet gets buffers of its own.
            guest.start(features, 16);
        }
    }
}
