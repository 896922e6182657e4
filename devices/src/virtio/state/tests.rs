use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    sync::{Arc, Mutex},
};

use proptest::prelude::*;

use super::*;
use crate::{
    testing::Guest,
    virtio::{
        VirtioDevice,
        block::{Backend, Block},
        mmio::F_EVENT_IDX,
        rng::Rng,
        vsock::Vsock,
    },
};

fn shared(device: impl VirtioDevice + 'static) -> Arc<Mutex<dyn VirtioDevice>> {
    Arc::new(Mutex::new(device))
}

fn rng() -> Arc<Mutex<dyn VirtioDevice>> {
    shared(Rng::new().unwrap())
}

/// Through the bytes of a snapshot and back.
fn stored(state: &TransportState) -> TransportState {
    postcard::from_bytes(&postcard::to_allocvec(state).unwrap()).unwrap()
}

fn asks(guest: &mut Guest) -> Option<(u16, u32)> {
    let buffer = guest.allocate(16);
    guest.add(0, &[(buffer, 16, true)]);
    guest.kick(0);
    guest.used(0)
}

#[test]
fn a_driver_does_not_notice_that_its_device_is_another_one() {
    for features in [0, F_EVENT_IDX] {
        let mut guest = Guest::with_shared(rng());
        guest.start(features, 8);
        for _ in 0..13 {
            assert_eq!(asks(&mut guest).unwrap().1, 16);
        }
        let state = stored(&guest.transport.save().unwrap());
        let mut next = guest.continued(rng(), &state).unwrap();
        assert_eq!(next.status(), 15);
        for _ in 0..13 {
            assert_eq!(asks(&mut next).unwrap().1, 16);
        }
    }
}

#[test]
fn a_notification_that_nobody_has_seen_is_not_lost() {
    let mut guest = Guest::with_shared(rng());
    guest.start(0, 8);
    let buffer = guest.allocate(16);
    guest.add(0, &[(buffer, 16, true)]);
    let state = stored(&guest.transport.save().unwrap());
    let mut next = guest.continued(rng(), &state).unwrap();
    next.run();
    assert_eq!(next.used(0).unwrap().1, 16);
}

#[test]
fn an_interrupt_that_the_driver_has_not_acknowledged_comes_again() {
    let mut guest = Guest::with_shared(rng());
    guest.start(0, 8);
    asks(&mut guest);
    let state = stored(&guest.transport.save().unwrap());
    let next = guest.continued(rng(), &state).unwrap();
    assert_eq!(next.irq.read().unwrap(), 1);
    assert_eq!(next.read(0x60), 1);
}

#[test]
fn a_device_without_driver_is_continued_without_one() {
    let guest = Guest::with_shared(rng());
    let state = stored(&guest.transport.save().unwrap());
    assert_eq!(state.active, None);
    let mut next = guest.continued(rng(), &state).unwrap();
    next.start(0, 8);
    assert!(asks(&mut next).is_some());
}

#[test]
fn a_failed_device_still_needs_its_reset() {
    let mut guest = Guest::with_shared(rng());
    guest.start(0, 8);
    guest.queues[0].set_avail_idx(&guest.memory, 100);
    guest.kick(0);
    assert_eq!(guest.status() & 64, 64);
    let state = stored(&guest.transport.save().unwrap());
    let mut next = guest.continued(rng(), &state).unwrap();
    assert_eq!(next.status() & 64, 64);
    next.start(0, 8);
    assert!(asks(&mut next).is_some());
}

#[test]
fn another_device_is_refused() {
    let mut guest = Guest::with_shared(rng());
    guest.start(0, 8);
    let state = guest.transport.save().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4096).unwrap();
    let block = Block::new(Backend::open(&[file.path()], true).unwrap(), "x", Box::new(|_| {})).unwrap();
    assert_eq!(
        guest.continued(shared(block), &state).err().unwrap(),
        RestoreError::DeviceType { saved: 4, here: 2 }
    );
}

#[test]
fn states_that_no_device_has_are_refused() {
    let mut guest = Guest::with_shared(rng());
    guest.start(0, 8);
    let good = guest.transport.save().unwrap();
    assert!(guest.continued(rng(), &good).is_ok());
    let refused = |what: &str, break_it: &dyn Fn(&mut TransportState)| {
        let mut state = good.clone();
        break_it(&mut state);
        assert!(guest.continued(rng(), &state).is_err(), "{what}");
    };
    let ring = |state: &mut TransportState, avail, used| {
        let device = state.active.as_mut().unwrap();
        device.rings = vec![Some(RingState { next_avail: avail, next_used: used })];
    };
    refused("no queue", &|state| state.queues.clear());
    refused("more queues", &|state| state.queues.push(QueueState::default()));
    refused("a ring outside of memory", &|state| state.queues[0].descriptors = 1 << 40);
    refused("a ring at an odd address", &|state| state.queues[0].device_area |= 1);
    refused("a ring at the end of the address space", &|state| state.queues[0].driver_area = u64::MAX - 1);
    refused("a size that is no power of two", &|state| state.queues[0].size = 7);
    refused("a size that is too large", &|state| state.queues[0].size = 1 << 20);
    refused("more chains than the ring has", &|state| ring(state, 9, 0));
    refused("no ring", &|state| state.active.as_mut().unwrap().rings.clear());
    refused("a ring that is not enabled", &|state| state.queues[0].ready = false);
    refused("a driver that is not there", &|state| state.status = 7);
    refused("a status out of order", &|state| state.status = 12);
    refused("a device that has failed and runs", &|state| state.irq.failed = true);
    refused("features that are not on offer", &|state| state.driver_features |= 1 << 50);
}

proptest! {
    #[test]
    fn any_state_is_refused_or_harmless(
        bytes in prop::collection::vec(any::<u8>(), 0..60), at in 0usize..80, with in any::<u8>(),
    ) {
        let mut guest = Guest::with_shared(rng());
        guest.start(F_EVENT_IDX, 8);
        asks(&mut guest);
        let mut saved = postcard::to_allocvec(&guest.transport.save().unwrap()).unwrap();
        let at = at % saved.len();
        saved[at] ^= with;
        for bytes in [saved, bytes] {
            if let Ok(state) = postcard::from_bytes(&bytes)
                && let Ok(mut next) = guest.continued(rng(), &state)
            {
                next.run();
                asks(&mut next);
            }
        }
    }
}

/// A guest whose vsock driver has posted buffers as Linux does.
fn vsock_guest(dir: &std::path::Path) -> Guest {
    let mut guest = Guest::with_shared(shared(Vsock::new(3, &dir.join("v")).unwrap()));
    guest.start(F_EVENT_IDX, 16);
    for _ in 0..8 {
        let buffer = guest.allocate(4096);
        guest.add(0, &[(buffer, 4096, true)]);
    }
    for _ in 0..8 {
        let buffer = guest.allocate(4);
        guest.add(2, &[(buffer, 4, true)]);
    }
    guest.kick(0);
    guest
}

#[test]
fn clause_5_10_6_7_a_restored_guest_is_told_that_its_connections_are_gone_before_new_ones_come() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = vsock_guest(dir.path());
    let mut before = UnixStream::connect(dir.path().join("v")).unwrap();
    before.write_all(b"CONNECT 10\n").unwrap();
    guest.run_until(|guest| guest.used(0).is_some());
    let state = stored(&guest.transport.save().unwrap());
    assert_eq!(state.active.as_ref().unwrap().detail, Detail::Vsock { next_port: (1 << 30) + 1 });

    let mut next = guest.continued(shared(Vsock::new(3, &dir.path().join("v")).unwrap()), &state).unwrap();
    let mut client = UnixStream::connect(dir.path().join("v")).unwrap();
    client.write_all(b"CONNECT 10\n").unwrap();
    next.run();
    let (_, written) = next.used(2).unwrap();
    assert_eq!(written, 4);
    assert_eq!(next.take_interrupt() & 1, 1);
    assert_eq!(next.used(0), None, "no packet before the driver has handled the event");

    let buffer = next.allocate(4);
    next.add(2, &[(buffer, 4, true)]);
    next.kick(2);
    next.run_until(|guest| guest.used(0).is_some());
    assert_eq!(next.used(2), None, "the event comes once");
}

#[test]
fn a_restored_guest_is_told_before_the_event_loop_runs_and_once() {
    let dir = tempfile::tempdir().unwrap();
    let guest = vsock_guest(dir.path());
    let state = stored(&guest.transport.save().unwrap());
    let mut next = guest.continued(shared(Vsock::new(3, &dir.path().join("v")).unwrap()), &state).unwrap();
    let mut client = UnixStream::connect(dir.path().join("v")).unwrap();
    client.write_all(b"CONNECT 10\n").unwrap();
    next.take_interrupt();
    next.transport.begin();
    assert_eq!(next.used(2).unwrap().1, 4);
    assert_eq!(next.take_interrupt() & 1, 1);
    next.transport.begin();
    next.run();
    assert_eq!((next.used(2), next.used(0)), (None, None), "nothing before the driver has handled the event");

    let buffer = next.allocate(4);
    next.add(2, &[(buffer, 4, true)]);
    next.kick(2);
    next.run_until(|guest| guest.used(0).is_some());
    assert_eq!(next.used(2), None);
}

#[test]
fn a_snapshot_that_is_given_up_leaves_connections_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = vsock_guest(dir.path());
    let listener = UnixListener::bind(dir.path().join("v_99")).unwrap();
    drop(listener);
    let mut client = UnixStream::connect(dir.path().join("v")).unwrap();
    client.write_all(b"CONNECT 10\n").unwrap();
    guest.run_until(|guest| guest.used(0).is_some());
    guest.transport.save().unwrap();
    guest.transport.go_on();
    guest.run();
    client.set_nonblocking(true).unwrap();
    let end = client.read(&mut [0]).unwrap_err();
    assert_eq!(end.kind(), std::io::ErrorKind::WouldBlock);
}
