//! A disk that is held to a rate, with a clock that the test turns.

use std::num::NonZeroU64;

use super::*;
use crate::{testing::TestClock, virtio::rate::Rate};

const SECOND_NS: u64 = 1_000_000_000;
const KIB: u64 = 1 << 10;

struct Limited {
    guest: Guest,
    clock: TestClock,
    _dir: TempDir,
}

impl Limited {
    /// A disk of 1 MiB.
    fn to(bytes: u64, operations: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        fs::write(&path, vec![0; 1 << 20]).unwrap();
        let clock = TestClock::new();
        let rate = Rate { bytes: NonZeroU64::new(bytes), operations: NonZeroU64::new(operations) };
        let throttle = Throttle::with_alarm(rate, Box::new(clock.clone()));
        let backend = Backend::open(&[path], false).unwrap();
        let block = Block::new(backend, "", Box::new(|fault| panic!("{fault}"))).unwrap();
        let mut guest = Guest::new(block.with_throttle(throttle));
        guest.start(F_EVENT_IDX, 256);
        Limited { guest, clock, _dir: dir }
    }

    /// Makes a request of so many bytes available.
    fn ask(&mut self, kind: u32, bytes: u32) {
        let header = [kind.to_le_bytes().as_slice(), &[0; 12]].concat();
        self.guest.free_memory();
        let header = self.guest.place(&header);
        let data = self.guest.allocate(u64::from(bytes) + 16);
        let rest: &[_] = match kind {
            OUT => &[(data, bytes, false), (data + u64::from(bytes), 1, true)],
            _ => &[(data, bytes + 1, true)],
        };
        self.guest.add(0, &[&[(header, 16, false)], rest].concat()).unwrap();
    }

    /// How many requests have been served since this was last asked.
    fn served(&mut self) -> usize {
        self.guest.run();
        std::iter::from_fn(|| self.guest.used(0)).count()
    }

    /// Lets time pass up to the next alarm.
    fn wait(&mut self) -> u64 {
        let wait = self.clock.next_call_ns().expect("nobody waits");
        self.clock.advance(wait);
        wait
    }
}

#[test]
fn requests_wait_in_the_queue_until_the_alarm_and_none_is_lost() {
    let mut disk = Limited::to(100 * KIB, 0);
    for _ in 0..10 {
        disk.ask(IN, 4096);
    }
    disk.guest.kick(0);
    // The bucket holds 10 KiB, and the third request brings it into debt.
    assert_eq!(disk.served(), 3);
    assert_eq!(disk.guest.take_interrupt(), 1);
    disk.guest.kick(0);
    assert_eq!(disk.served(), 0, "a notification does not help");
    let (mut served, mut waited) = (3, 0);
    while served < 10 {
        waited += disk.wait();
        served += disk.served();
    }
    // What passed before the last request began.
    assert!(waited * 100 * KIB / SECOND_NS + 10 * KIB >= 9 * 4096);
    assert!(waited <= 9 * 4096 * SECOND_NS / (100 * KIB));
}

#[test]
fn notifications_come_again_once_the_queue_is_empty() {
    let mut disk = Limited::to(100 * KIB, 0);
    disk.ask(OUT, 64 << 10);
    disk.guest.kick(0);
    assert_eq!(disk.served(), 1);
    disk.wait();
    assert_eq!(disk.served(), 0);
    assert_eq!(disk.clock.next_call_ns(), None, "nothing is waited for with an empty queue");
    disk.ask(IN, 512);
    disk.guest.kick(0);
    assert_eq!(disk.served(), 1);
}

#[test]
fn reads_and_writes_share_one_bucket_and_flushes_cost_no_bytes() {
    let mut disk = Limited::to(10 * KIB, 0);
    disk.ask(IN, 512);
    disk.ask(OUT, 1024);
    disk.guest.kick(0);
    assert_eq!(disk.served(), 2);
    disk.ask(IN, 512);
    disk.guest.kick(0);
    assert_eq!(disk.served(), 0);
    disk.wait();
    assert_eq!(disk.served(), 1);
    disk.clock.advance(SECOND_NS);
    for _ in 0..50 {
        disk.ask(FLUSH, 0);
    }
    disk.guest.kick(0);
    assert_eq!(disk.served(), 50);
}

#[test]
fn requests_are_counted_whatever_they_are() {
    let mut disk = Limited::to(0, 20);
    for kind in [IN, FLUSH, 99, OUT] {
        disk.ask(kind, 512);
    }
    disk.guest.kick(0);
    assert_eq!(disk.served(), 2);
    assert_eq!((disk.wait(), disk.served()), (SECOND_NS / 20, 1));
    assert_eq!((disk.wait(), disk.served()), (SECOND_NS / 20, 1));
}

#[test]
fn zeroes_are_bytes_because_the_host_may_have_to_write_them_and_discards_are_not() {
    let mut disk = Limited::to(100 * KIB, 0);
    let ask = |disk: &mut Limited, kind: u32| {
        let request = [&kind.to_le_bytes()[..], &[0; 12], &range(0, 1024, 0)].concat();
        let at = disk.guest.place(&request);
        let status = disk.guest.allocate(1);
        disk.guest.add(0, &[(at, request.len() as u32, false), (status, 1, true)]).unwrap();
        disk.guest.kick(0);
        disk.served()
    };
    assert_eq!((ask(&mut disk, DISCARD), ask(&mut disk, DISCARD)), (1, 1));
    assert_eq!((ask(&mut disk, WRITE_ZEROES), ask(&mut disk, FLUSH)), (1, 0));
    assert!(disk.wait() > 5 * SECOND_NS - SECOND_NS / 5);
    assert_eq!(disk.served(), 1);
}

#[test]
fn a_reset_does_not_fill_the_bucket() {
    let mut disk = Limited::to(100 * KIB, 0);
    disk.ask(IN, 64 << 10);
    disk.guest.kick(0);
    assert_eq!(disk.served(), 1);
    disk.guest.start(F_EVENT_IDX, 256);
    disk.ask(IN, 512);
    disk.guest.kick(0);
    assert_eq!(disk.served(), 0);
    disk.wait();
    assert_eq!(disk.served(), 1);
}
