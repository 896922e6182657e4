//! The entropy device as a guest sees it.

use super::*;
use crate::{
    testing::Guest,
    virtio::mmio::{F_EVENT_IDX, F_INDIRECT_DESC},
};

fn live(features: u64) -> Guest {
    let mut guest = Guest::new(Rng::new().unwrap());
    guest.start(features, 16);
    guest
}

#[test]
fn s5_4_5_a_buffer_is_filled_with_random_bytes() {
    let mut guest = live(F_EVENT_IDX);
    let address = guest.allocate(64);
    let head = guest.add(0, &[(address, 64, true)]).unwrap();
    guest.kick(0);
    assert_eq!(guest.used(0), Some((head, 64)));
    // 64 zero bytes by chance: once in 2^512 runs.
    assert_ne!(guest.bytes(address, 64), vec![0; 64]);
    assert_eq!(guest.take_interrupt(), 1);
}

#[test]
fn s5_4_6_a_large_request_gets_at_least_one_byte_and_a_bounded_number() {
    let mut guest = live(0);
    let address = guest.allocate(1 << 20);
    guest.add(0, &[(address, 1 << 20, true)]).unwrap();
    guest.kick(0);
    assert_eq!(guest.used(0).unwrap().1, 256);
}

#[test]
fn s5_4_6_1_readable_buffers_are_left_alone() {
    let mut guest = live(0);
    let address = guest.place(&[7; 16]);
    guest.add(0, &[(address, 16, false)]).unwrap();
    guest.kick(0);
    assert_eq!(guest.used(0).unwrap().1, 0);
    assert_eq!(guest.bytes(address, 16), vec![7; 16]);
}

#[test]
fn requests_go_on_through_the_wrap_of_the_indexes() {
    let mut guest = live(F_EVENT_IDX | F_INDIRECT_DESC);
    let address = guest.allocate(8);
    for n in 0..70_000u32 {
        guest.queues[0].set_used_event(&guest.memory, n as u16);
        guest.add(0, &[(address, 8, true)]).unwrap();
        // The event loop's rounds cost more than the ring does.
        if n % 16 == 15 {
            guest.kick(0);
            for _ in 0..16 {
                assert_eq!(guest.used(0).unwrap().1, 8);
            }
        }
    }
}

#[test]
fn more_than_a_round_of_requests_is_served_without_another_kick() {
    let mut guest = live(0);
    let address = guest.allocate(8);
    for _ in 0..16 {
        guest.add(0, &[(address, 8, true)]).unwrap();
    }
    guest.kick(0);
    assert_eq!(std::iter::from_fn(|| guest.used(0)).count(), 16);
}

#[test]
fn s2_1_2_a_broken_ring_stops_the_device_and_a_reset_restores_it() {
    let mut guest = live(0);
    guest.add(0, &[(u64::MAX - 3, 8, true)]).unwrap();
    guest.kick(0);
    assert_eq!(guest.status(), 15 | 64);
    assert_eq!(guest.take_interrupt(), 2);
    let address = guest.allocate(8);
    guest.add(0, &[(address, 8, true)]).unwrap();
    guest.kick(0);
    assert_eq!(guest.used(0), None);
    guest.start(0, 16);
    guest.add(0, &[(address, 8, true)]).unwrap();
    guest.kick(0);
    assert_eq!(guest.used(0).unwrap().1, 8);
}

#[test]
fn a_device_without_its_queue_is_not_activated() {
    let mut guest = Guest::new(Rng::new().unwrap());
    assert!(guest.negotiate(0));
    guest.write(0x70, 15);
    assert_eq!(guest.status(), 15 | 64);
}
