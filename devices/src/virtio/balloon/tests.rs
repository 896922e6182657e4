//! The balloon as a guest sees it.

use std::sync::Mutex;

use super::*;
use crate::{
    testing::Guest,
    virtio::mmio::{F_EVENT_IDX, F_INDIRECT_DESC},
};

/// Writes down what is given back.
#[derive(Clone, Default)]
struct Recorder {
    ranges: Arc<Mutex<Vec<(u64, u32)>>>,
    refuses: bool,
}

impl Reclaim for Recorder {
    fn reclaim(&mut self, address: GuestAddress, length: u32) -> io::Result<()> {
        self.ranges.lock().unwrap().push((address.0, length));
        if self.refuses { Err(io::ErrorKind::OutOfMemory.into()) } else { Ok(()) }
    }
}

impl Recorder {
    fn taken(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut self.ranges.lock().unwrap())
    }
}

fn device(recorder: &Recorder) -> Arc<Mutex<Balloon>> {
    Arc::new(Mutex::new(Balloon::new(Box::new(recorder.clone())).unwrap()))
}

fn live(features: u64) -> (Guest, Recorder) {
    let recorder = Recorder::default();
    let mut guest = Guest::with_shared(device(&recorder));
    guest.start(features, 32);
    (guest, recorder)
}

fn report(guest: &mut Guest, blocks: &[(u64, u32)]) -> Option<(u16, u32)> {
    let buffers: Vec<_> = blocks.iter().map(|(address, length)| (*address, *length, true)).collect();
    guest.add(REPORTING, &buffers).unwrap();
    guest.kick(REPORTING);
    guest.used(REPORTING)
}

fn set_poison(guest: &mut Guest, value: u32) {
    guest.write(0x100 + POISON as u64, value);
}

#[test]
fn s5_5_6_7_reported_pages_are_given_back_and_their_buffers_used() {
    let (mut guest, recorder) = live(F_REPORTING | F_EVENT_IDX | F_INDIRECT_DESC);
    let blocks = [(0x20_0000, 0x20_0000), (0x60_0000, 0x1000)];
    assert!(matches!(report(&mut guest, &blocks), Some((_, 0))));
    assert_eq!(recorder.taken(), blocks);
    assert_eq!(guest.take_interrupt(), 1);
}

#[test]
fn a_full_queue_of_reports_is_served_with_one_notification() {
    let (mut guest, recorder) = live(F_REPORTING);
    for n in 0..32 {
        guest.add(REPORTING, &[(0x20_0000 + n * 0x1000, 0x1000, true)]).unwrap();
    }
    guest.kick(REPORTING);
    assert_eq!((recorder.taken().len(), std::iter::from_fn(|| guest.used(REPORTING)).count()), (32, 32));
}

#[test]
fn what_the_driver_only_lets_read_is_no_report() {
    let (mut guest, recorder) = live(F_REPORTING);
    guest.add(REPORTING, &[(0x20_0000, 0x1000, false), (0x30_0000, 0x1000, true)]).unwrap();
    guest.kick(REPORTING);
    assert_eq!((recorder.taken(), guest.used(REPORTING).is_some()), (vec![(0x30_0000, 0x1000)], true));
}

#[test]
fn s5_5_6_7_pages_keep_a_poison_that_is_not_zero() {
    for (features, poison, given_back) in [
        (F_REPORTING, None, true),
        (F_REPORTING, Some(7), true),
        (F_REPORTING | F_PAGE_POISON, Some(0), true),
        (F_REPORTING | F_PAGE_POISON, Some(0xaaaa_aaaa), false),
        // A driver that has not told yet.
        (F_REPORTING | F_PAGE_POISON, None, false),
        (F_PAGE_POISON, Some(0), false),
    ] {
        let (mut guest, recorder) = live(features);
        if let Some(poison) = poison {
            set_poison(&mut guest, poison);
        }
        assert!(report(&mut guest, &[(0x20_0000, 0x1000)]).is_some());
        assert_eq!(!recorder.taken().is_empty(), given_back, "{features:#x} {poison:?}");
    }
}

#[test]
fn a_reset_forgets_the_poison() {
    let (mut guest, recorder) = live(F_REPORTING | F_PAGE_POISON);
    set_poison(&mut guest, 0);
    guest.start(F_REPORTING | F_PAGE_POISON, 32);
    report(&mut guest, &[(0x20_0000, 0x1000)]);
    assert_eq!(recorder.taken(), []);
}

#[test]
fn s5_5_4_the_balloon_is_to_be_empty_and_the_driver_tells_what_is_in_it() {
    let (mut guest, _) = live(F_REPORTING);
    let config = |guest: &Guest| [0x100, 0x104, 0x108, 0x10c].map(|at| guest.read(at));
    assert_eq!(config(&guest), [0; 4]);
    for at in [0x100, 0x104, 0x108, 0x10c] {
        guest.write(at, 0x0102_0300 | at as u32 & 0xf);
    }
    assert_eq!(config(&guest), [0, 0x0102_0304, 0, 0x0102_030c]);
    guest.transport.write(0x107, &[9, 9]);
    assert_eq!(config(&guest), [0, 0x0902_0304, 0, 0x0102_030c]);
    let mut bytes = [1; 8];
    guest.transport.read(0x100 + 14, &mut bytes);
    assert_eq!(bytes, [2, 1, 0, 0, 0, 0, 0, 0]);
    guest.transport.write(u64::MAX, &[1; 8]);
}

#[test]
fn pages_of_a_balloon_that_was_not_asked_for_stay_and_are_acknowledged() {
    let (mut guest, recorder) = live(F_REPORTING);
    for queue in [0, 1] {
        let pages = guest.place(&[1, 0, 0, 0, 2, 0, 0, 0]);
        guest.add(queue, &[(pages, 8, false)]).unwrap();
        guest.kick(queue);
        assert!(guest.used(queue).is_some());
    }
    assert_eq!(recorder.taken(), []);
}

#[test]
fn a_host_that_does_not_take_memory_back_is_not_the_guests_fault() {
    let recorder = Recorder { refuses: true, ..Recorder::default() };
    let mut guest = Guest::with_shared(device(&recorder));
    guest.start(F_REPORTING, 32);
    assert!(report(&mut guest, &[(0x20_0000, 0x1000), (0x30_0000, 0x1000)]).is_some());
    assert_eq!((recorder.taken().len(), guest.status()), (2, 15));
}

#[test]
fn s2_1_2_a_broken_ring_stops_the_device_and_a_reset_restores_it() {
    let (mut guest, recorder) = live(F_REPORTING);
    guest.add(REPORTING, &[(u64::MAX - 3, 8, true)]).unwrap();
    guest.kick(REPORTING);
    assert_eq!((guest.status(), guest.take_interrupt()), (15 | 64, 2));
    guest.start(F_REPORTING, 32);
    assert!(report(&mut guest, &[(0x20_0000, 0x1000)]).is_some());
    assert_eq!(recorder.taken().len(), 1);
}

#[test]
fn reporting_needs_its_queue_and_nothing_else_does() {
    let start = |features: u64| {
        let mut guest = Guest::with_shared(device(&Recorder::default()));
        assert!(guest.negotiate(features));
        guest.write(0x70, 15);
        guest.status()
    };
    assert_eq!((start(F_REPORTING), start(0)), (15 | 64, 15));
}

#[test]
fn a_saved_balloon_goes_on_with_its_poison() {
    for (poison, given_back) in [(0, 1), (0xaa, 0)] {
        let (mut guest, recorder) = live(F_REPORTING | F_PAGE_POISON);
        set_poison(&mut guest, poison);
        guest.write(0x100 + ACTUAL as u64, 5);
        report(&mut guest, &[(0x20_0000, 0x1000)]);
        recorder.taken();
        let state = guest.transport.save().unwrap();
        let saved = state.active.as_ref().unwrap();
        assert_eq!(saved.detail, Detail::Balloon { actual: 5, poison: Some(poison) });
        let next = Recorder::default();
        let mut guest = guest.continued(device(&next), &state).unwrap();
        assert_eq!((guest.read(0x104), guest.read(0x10c)), (5, poison));
        assert!(report(&mut guest, &[(0x20_0000, 0x1000)]).is_some());
        assert_eq!(next.taken().len(), given_back);
    }
}
