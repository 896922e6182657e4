//! A card that is held to a rate, with clocks that the test turns.

use std::num::NonZeroU64;

use super::*;
use crate::{testing::TestClock, virtio::rate::Rate};

const SECOND_NS: u64 = 1_000_000_000;
const HEADER: usize = HEADER_BYTES as usize;

struct Limited {
    guest: Guest,
    wire: UnixDatagram,
    receive: TestClock,
    transmit: TestClock,
}

fn limited(bytes: u64, packets: u64) -> Limited {
    let rate = Rate { bytes: NonZeroU64::new(bytes), operations: NonZeroU64::new(packets) };
    let (receive, transmit) = (TestClock::new(), TestClock::new());
    let throttle = |clock: &TestClock| Throttle::with_alarm(rate, Box::new(clock.clone()));
    let (wire, there, _) = wire();
    let net = Net::new(Box::new(wire), CONFIG).unwrap();
    let mut guest = Guest::new(net.with_throttles(throttle(&receive), throttle(&transmit)));
    guest.start(MRG | EVENT_IDX, 64);
    Limited { guest, wire: there, receive, transmit }
}

fn pass(clock: &TestClock) -> u64 {
    let wait = clock.next_call_ns().expect("nobody waits");
    clock.advance(wait);
    wait
}

impl Limited {
    fn send(&mut self, payload: usize) {
        let at = self.guest.place(&packet(HEADER + payload));
        self.guest.add(1, &[(at, (HEADER + payload) as u32, false)]).unwrap();
        self.guest.kick(1);
    }

    /// Packets that have come out since this was last asked.
    fn sent(&mut self) -> usize {
        self.guest.run();
        while self.guest.used(1).is_some() {}
        std::iter::from_fn(|| self.wire.recv(&mut [0; 70_000]).ok()).count()
    }

    fn received(&mut self) -> usize {
        self.guest.run();
        std::iter::from_fn(|| self.guest.used(0)).count()
    }
}

#[test]
fn packets_of_the_guest_wait_in_its_queue_and_go_out_when_they_may() {
    let mut card = limited(100_000, 0);
    for _ in 0..20 {
        card.send(1000);
    }
    // The bucket holds a tenth of a second's bytes: ten packets, without virtio's header.
    assert_eq!(card.sent(), 10);
    let mut waited = 0;
    for _ in 0..10 {
        waited += pass(&card.transmit);
        assert_eq!(card.sent(), 1);
    }
    assert!((SECOND_NS / 10 - SECOND_NS / 50..=SECOND_NS / 10).contains(&waited), "{waited}");
    assert_eq!(card.receive.next_call_ns(), None, "the other direction has a bucket of its own");
}

#[test]
fn packets_of_the_host_stay_with_it_until_they_may_come_in() {
    let mut card = limited(0, 50);
    for _ in 0..60 {
        post(&mut card.guest, 1536);
    }
    card.guest.kick(0);
    for _ in 0..8 {
        card.wire.send(&packet(100)).unwrap();
    }
    assert_eq!(card.received(), 5);
    card.guest.kick(0);
    assert_eq!(card.received(), 0);
    for _ in 0..3 {
        assert_eq!(pass(&card.receive), SECOND_NS / 50);
        assert_eq!(card.received(), 1);
    }
    card.send(10);
    assert_eq!(card.sent(), 1, "the other direction has a bucket of its own");
}

#[test]
fn what_is_due_within_a_millisecond_goes_together() {
    let mut card = limited(0, 10_000);
    for n in 0..20 {
        card.transmit.advance(u64::from(n == 0));
        for _ in 0..60 {
            card.send(1);
            card.sent();
        }
        if card.transmit.next_call_ns().is_some() {
            assert_eq!(pass(&card.transmit), SECOND_NS / 1000);
            assert_eq!(card.sent(), 10);
            return;
        }
        card.guest.free_memory();
    }
    panic!("no packet had to wait");
}

#[test]
fn what_is_no_packet_is_paid_for_too() {
    let mut card = limited(0, 10);
    let at = card.guest.allocate(8);
    for _ in 0..3 {
        card.guest.add(1, &[(at, 8, false)]).unwrap();
    }
    card.guest.kick(1);
    assert!(card.guest.used(1).is_some() && card.guest.used(1).is_none());
}
