//! Clauses of virtio 1.2 about the transport, from the driver's side.

use event_manager::{EventOps, Events, MutEventSubscriber};
use proptest::prelude::*;

use super::*;
use crate::{testing::Guest, virtio::ActivateError};

/// A device that does nothing but remember what was done to it.
#[derive(Default)]
struct Probe {
    activation: Option<Activation>,
    activations: usize,
    resets: usize,
    refuse: bool,
    config: [u8; 8],
}

impl MutEventSubscriber for Probe {
    fn init(&mut self, _: &mut EventOps) {}
    fn process(&mut self, _: Events, _: &mut EventOps) {}
}

impl VirtioDevice for Probe {
    fn device_type(&self) -> u32 {
        42
    }
    fn features(&self) -> u64 {
        1 << 5 | 1 << 40
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[16, 8]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = usize::try_from(at).ok().and_then(|at| self.config.get(at)).copied().unwrap_or(0);
        }
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (byte, at) in data.iter().zip(offset..) {
            if let Some(place) = self.config.get_mut(at as usize) {
                *place = *byte;
            }
        }
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if self.refuse {
            return Err(ActivateError::QueueMissing(1));
        }
        self.activations += 1;
        self.activation = Some(activation);
        Ok(())
    }
    fn reset(&mut self) {
        self.resets += 1;
        self.activation = None;
    }
}

fn guest() -> (Guest, Arc<Mutex<Probe>>) {
    let probe = Arc::new(Mutex::new(Probe::default()));
    (Guest::with_shared(probe.clone()), probe)
}

#[test]
fn s4_2_2_identity_registers() {
    let (guest, _) = guest();
    assert_eq!(guest.read(0x000), u32::from_le_bytes(*b"virt"));
    assert_eq!(guest.read(0x004), 2);
    assert_eq!(guest.read(0x008), 42);
}

#[test]
fn s4_2_2_features_are_offered_in_halves_with_those_of_ring_and_transport() {
    let (mut guest, _) = guest();
    let expected = 1 << 5 | 1 << 40 | F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC;
    assert_eq!(guest.offered_features(), expected);
    guest.write(0x14, 2);
    assert_eq!(guest.read(0x10), 0, "there are no features beyond bit 63");
}

#[test]
fn s3_1_1_a_driver_goes_live_and_the_device_gets_what_was_agreed() {
    let (mut guest, probe) = guest();
    guest.start(1 << 40 | F_EVENT_IDX, 8);
    assert_eq!(guest.status(), 15);
    assert!(guest.transport.is_active());
    let probe = probe.lock().unwrap();
    let activation = probe.activation.as_ref().unwrap();
    assert_eq!(activation.features, 1 << 40 | F_EVENT_IDX | F_VERSION_1);
    let queue = &activation.queues[1].as_ref().unwrap().queue;
    assert_eq!((queue.size(), queue.desc_table()), (8, guest.queues[1].table()));
    assert_eq!((queue.avail_ring(), queue.used_ring()), (guest.queues[1].avail(), guest.queues[1].used()));
    assert!(queue.event_idx_enabled());
}

#[test]
fn s2_2_2_features_not_offered_are_refused() {
    let (mut guest, _) = guest();
    assert!(!guest.negotiate(1 << 7));
    assert_eq!(guest.status(), 3);
}

#[test]
fn s6_1_a_driver_without_version_1_is_refused() {
    let (mut guest, _) = guest();
    for status in [0, 1, 3, 11] {
        guest.write(0x70, status);
    }
    assert_eq!(guest.status(), 3);
}

#[test]
fn s2_1_1_status_bits_do_not_go_back_or_out_of_order() {
    let (mut guest, probe) = guest();
    guest.write(0x70, 2);
    assert_eq!(guest.status(), 0, "DRIVER without ACKNOWLEDGE");
    guest.write(0x70, 5);
    assert_eq!(guest.status(), 0, "DRIVER_OK without FEATURES_OK");
    guest.write(0x70, 3);
    guest.write(0x70, 1);
    assert_eq!(guest.status(), 3, "a bit cannot be cleared alone");
    guest.write(0x70, 3 | 16 | 32);
    assert_eq!(guest.status(), 3, "reserved bits");
    assert_eq!(probe.lock().unwrap().activations, 0);
}

#[test]
fn s2_1_failed_stops_the_device_until_reset() {
    let (mut guest, probe) = guest();
    guest.start(0, 8);
    guest.write(0x70, 15 | 128);
    assert_eq!(guest.status(), 15 | 128);
    assert!(probe.lock().unwrap().activation.is_none());
    guest.write(0x70, 15);
    assert_eq!(guest.status(), 15 | 128);
    guest.start(0, 8);
    assert_eq!(guest.status(), 15);
    assert_eq!(probe.lock().unwrap().activations, 2);
}

#[test]
fn s2_2_features_are_fixed_after_features_ok() {
    let (mut guest, probe) = guest();
    assert!(guest.negotiate(0));
    guest.write(0x24, 0);
    guest.write(0x20, 1 << 5);
    guest.write(0x70, 15);
    assert_eq!(probe.lock().unwrap().activation.as_ref().unwrap().features, F_VERSION_1);
}

#[test]
fn s2_4_reset_takes_queues_and_memory_away() {
    let (mut guest, probe) = guest();
    guest.start(0, 8);
    guest.write(0x70, 0);
    assert_eq!(guest.status(), 0);
    assert!(probe.lock().unwrap().activation.is_none());
    guest.write(0x30, 0);
    assert_eq!(guest.read(0x44), 0);
    guest.write(0x50, 0);
    assert!(guest.transport.queue_notify_events()[0].read().is_err(), "a kick after reset goes nowhere");
}

#[test]
fn s4_2_2_queue_registers_are_those_of_the_selected_queue() {
    let (mut guest, _) = guest();
    let max = |guest: &mut Guest, index| {
        guest.write(0x30, index);
        guest.read(0x34)
    };
    assert_eq!([0, 1, 2, u32::MAX].map(|index| max(&mut guest, index)), [16, 8, 0, 0]);
}

#[test]
fn s4_2_2_a_queue_not_enabled_is_none() {
    let (mut guest, probe) = guest();
    assert!(guest.negotiate(0));
    guest.set_up_queue(1, 8);
    guest.write(0x70, 15);
    let probe = probe.lock().unwrap();
    let queues = &probe.activation.as_ref().unwrap().queues;
    assert!(queues[0].is_none() && queues[1].is_some());
}

#[test]
fn s2_7_bad_rings_fail_the_device_with_an_interrupt() {
    let bad: [(&str, &[(u64, u32)]); 9] = [
        ("size 0", &[(0x38, 0)]),
        ("size not a power of 2", &[(0x38, 6)]),
        ("size above the maximum", &[(0x38, 32)]),
        ("size beyond 16 bits", &[(0x38, 0x1_0008)]),
        ("table outside memory", &[(0x84, 1)]),
        ("used ring at the last bytes of the address space", &[(0xa0, 0xffff_fffc), (0xa4, 0xffff_ffff)]),
        ("table unaligned", &[(0x80, 0x1_0008)]),
        ("available ring unaligned", &[(0x90, 0x1_8001)]),
        ("table at 0", &[(0x80, 0)]),
    ];
    for (what, writes) in bad {
        let (mut guest, probe) = guest();
        assert!(guest.negotiate(0));
        guest.set_up_queue(0, 8);
        guest.write(0x44, 0);
        for (register, value) in writes {
            guest.write(*register, *value);
        }
        guest.write(0x44, 1);
        guest.write(0x70, 15);
        assert_eq!(guest.status(), 15 | 64, "{what}");
        assert_eq!(guest.read(0x60), 2, "{what}");
        assert_eq!(guest.irq.read().unwrap(), 1, "{what}");
        assert_eq!(probe.lock().unwrap().activations, 0, "{what}");
    }
}

#[test]
fn s2_1_2_a_device_that_refuses_needs_reset_and_recovers() {
    let (mut guest, probe) = guest();
    probe.lock().unwrap().refuse = true;
    guest.start(0, 8);
    assert_eq!(guest.status(), 15 | 64);
    probe.lock().unwrap().refuse = false;
    guest.start(0, 8);
    assert_eq!(guest.status(), 15);
    assert_eq!(guest.read(0x60), 0);
}

#[test]
fn s4_2_2_queue_registers_are_fixed_while_ready() {
    let (mut guest, probe) = guest();
    assert!(guest.negotiate(0));
    let queue = guest.set_up_queue(0, 8);
    guest.write(0x80, 0x4000);
    guest.write(0x70, 15);
    guest.write(0x80, 0x4000);
    let probe = probe.lock().unwrap();
    assert_eq!(
        probe.activation.as_ref().unwrap().queues[0].as_ref().unwrap().queue.desc_table(),
        queue.table()
    );
}

#[test]
fn s4_2_2_2_taking_a_queue_from_a_running_device_stops_it() {
    let (mut guest, probe) = guest();
    guest.start(0, 8);
    guest.write(0x30, 0);
    guest.write(0x44, 0);
    assert_eq!(guest.read(0x44), 0);
    assert_eq!(guest.status(), 15 | 64);
    assert!(probe.lock().unwrap().activation.is_none());
}

#[test]
fn s4_2_2_interrupt_status_is_acknowledged_bit_by_bit() {
    let (mut guest, probe) = guest();
    guest.start(0, 8);
    let interrupt = probe.lock().unwrap().activation.as_ref().unwrap().interrupt.clone();
    let generation = guest.read(0xfc);
    interrupt.raise(InterruptReason::UsedRing);
    interrupt.raise(InterruptReason::Configuration);
    assert_eq!(guest.irq.read().unwrap(), 2);
    assert_eq!(guest.read(0x60), 3);
    guest.write(0x64, 1);
    assert_eq!(guest.read(0x60), 2);
    assert_ne!(guest.read(0xfc), generation, "section 2.5.1: the generation tells of the change");
}

#[test]
fn s4_2_2_notify_fires_the_queues_event() {
    let (mut guest, probe) = guest();
    guest.start(0, 8);
    guest.write(0x50, 1);
    guest.write(0x50, 7);
    let probe = probe.lock().unwrap();
    let queues = &probe.activation.as_ref().unwrap().queues;
    assert_eq!(queues[1].as_ref().unwrap().notify.read().unwrap(), 1);
    assert!(queues[0].as_ref().unwrap().notify.read().is_err());
}

#[test]
fn s4_2_2_a_shared_memory_region_that_is_not_there_has_length_minus_one() {
    let (mut guest, _) = guest();
    guest.write(0xac, 3);
    assert_eq!((guest.read(0xb0), guest.read(0xb4)), (u32::MAX, u32::MAX));
}

#[test]
fn s4_2_2_1_accesses_of_other_widths_do_nothing() {
    let (mut guest, _) = guest();
    for width in [0, 1, 2, 3, 5, 8, 16] {
        let mut data = vec![0xaa; width];
        guest.transport.read(0, &mut data);
        assert_eq!(data, vec![0; width]);
        guest.transport.write(0x70, &vec![1; width]);
        assert_eq!(guest.status(), 0);
    }
    assert_eq!(guest.read(1), 0);
}

#[test]
fn s4_2_2_the_configuration_space_takes_any_width_and_ends() {
    let (mut guest, probe) = guest();
    guest.transport.write(0x100, &[9]);
    assert_eq!(probe.lock().unwrap().config[0], 0, "nobody drives the device yet");
    guest.negotiate(0);
    guest.transport.write(0x102, &[1, 2]);
    let mut data = [0xff; 8];
    guest.transport.read(0x100, &mut data);
    assert_eq!(data, [0, 0, 1, 2, 0, 0, 0, 0]);
    guest.transport.read(u64::MAX - 2, &mut data);
    assert_eq!(data, [0; 8]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever the driver writes: the status stays one that section 2.1 allows, memory is the device's exactly while
    /// it is live, and a reset makes all as new.
    #[test]
    fn any_sequence_of_writes_keeps_the_life_cycle(
        writes in prop::collection::vec((0u64..0x48, prop_oneof![
            0u32..20, Just(11), Just(15), Just(128), any::<u32>(),
        ], 1usize..9), 0..200),
    ) {
        let (mut guest, probe) = guest();
        for (register, value, width) in writes {
            let bytes = u64::from(value).to_le_bytes();
            // Mostly whole registers, sometimes crooked ones.
            let width = if width < 6 { 4 } else { width };
            guest.transport.write(register * 4 + u64::from(width == 7), &bytes[..width]);
            let status = guest.status();
            let in_order = [0, 1, 3, 11, 15].contains(&(status & 15));
            prop_assert!(in_order && status & 0x30 == 0, "status {status:#x}");
            let live = probe.lock().unwrap().activation.is_some();
            prop_assert_eq!(live, guest.transport.is_active());
            prop_assert!(!live || status == 15);
        }
        guest.write(0x70, 0);
        guest.start(0, 8);
        prop_assert_eq!(guest.status(), 15);
    }
}
