//! Rings as drivers should and should not make them (virtio 1.2, section 2.7).

use proptest::prelude::*;
use vm_memory::GuestMemoryMmap;

use super::*;
use crate::testing::{Descriptor, INDIRECT, NEXT, WRITE, write_descriptor};

const SIZE: u16 = 8;
const TABLE: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const DATA: u64 = 0x4000;
const MEMORY: u64 = 0x1_0000;

struct Setup {
    memory: Memory,
    ring: Ring,
    avail: u16,
}

impl Setup {
    fn new() -> Self {
        Self::at(0, false)
    }

    fn at(index: u16, event_idx: bool) -> Self {
        let half = MEMORY as usize / 2;
        let memory =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), half), (GuestAddress(half as u64), half)])
                .unwrap();
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_size(SIZE);
        queue.set_desc_table_address(Some(TABLE as u32), Some(0));
        queue.set_avail_ring_address(Some(AVAIL as u32), Some(0));
        queue.set_used_ring_address(Some(USED as u32), Some(0));
        queue.set_event_idx(event_idx);
        queue.set_next_avail(index);
        queue.set_next_used(index);
        queue.set_ready(true);
        assert!(queue.is_valid(&memory));
        memory.write_obj(index, GuestAddress(AVAIL + 2)).unwrap();
        Setup { memory, ring: Ring::new(queue), avail: index }
    }

    fn descriptor(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        write_descriptor(
            &self.memory,
            TABLE + 16 * u64::from(index),
            Descriptor { address, length, flags, next },
        );
    }

    fn offer(&mut self, head: u16) {
        let slot = AVAIL + 4 + 2 * u64::from(self.avail % SIZE);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.avail = self.avail.wrapping_add(1);
        self.memory.write_obj(self.avail, GuestAddress(AVAIL + 2)).unwrap();
    }

    fn pop(&mut self) -> Result<Option<Chain>, RingError> {
        let mut chain = Chain::default();
        Ok(self.ring.pop(&self.memory, &mut chain)?.then_some(chain))
    }
}

fn buffer(address: u64, length: u32) -> Buffer {
    Buffer { address: GuestAddress(address), length }
}

#[test]
fn s2_7_5_a_chain_comes_whole_and_in_order() {
    let mut setup = Setup::new();
    setup.descriptor(3, DATA, 16, NEXT, 1);
    setup.descriptor(1, DATA + 0x100, 512, NEXT | WRITE, 7);
    setup.descriptor(7, DATA + 0x400, 1, WRITE, 0);
    setup.offer(3);
    let chain = setup.pop().unwrap().unwrap();
    assert_eq!(chain.head(), 3);
    assert_eq!(chain.readable(), [buffer(DATA, 16)]);
    assert_eq!(chain.writable(), [buffer(DATA + 0x100, 512), buffer(DATA + 0x400, 1)]);
    assert!(setup.pop().unwrap().is_none());
}

#[test]
fn s2_7_5_a_loop_is_an_error() {
    let mut setup = Setup::new();
    setup.descriptor(0, DATA, 1, NEXT, 1);
    setup.descriptor(1, DATA, 1, NEXT, 0);
    setup.offer(0);
    assert!(matches!(setup.pop(), Err(RingError::BrokenChain { head: 0, length: 8 })));
}

#[test]
fn s2_7_5_an_index_outside_the_table_is_an_error() {
    let mut setup = Setup::new();
    setup.descriptor(0, DATA, 1, NEXT, SIZE);
    setup.offer(0);
    assert!(matches!(setup.pop(), Err(RingError::BrokenChain { head: 0, length: 1 })));
    setup.offer(SIZE);
    assert!(matches!(setup.pop(), Err(RingError::BrokenChain { head: SIZE, length: 0 })));
}

#[test]
fn s2_7_4_2_readable_behind_writable_is_an_error() {
    let mut setup = Setup::new();
    setup.descriptor(0, DATA, 1, NEXT | WRITE, 1);
    setup.descriptor(1, DATA, 1, 0, 0);
    setup.offer(0);
    assert!(matches!(setup.pop(), Err(RingError::ReadableBehindWritable { head: 0 })));
}

#[test]
fn s2_7_5_buffers_outside_memory_are_errors() {
    for (address, length) in
        [(MEMORY, 1), (MEMORY - 1, 2), (u64::MAX, 1), (u64::MAX, u32::MAX), (DATA, u32::MAX)]
    {
        let mut setup = Setup::new();
        setup.descriptor(0, address, length, 0, 0);
        setup.offer(0);
        assert!(matches!(setup.pop(), Err(RingError::NotInMemory { .. })), "{length} bytes at {address:#x}");
    }
}

/// Found by fuzzing: a range of no bytes is in memory wherever it begins.
#[test]
fn empty_buffers_are_left_out_wherever_they_point() {
    let mut setup = Setup::new();
    setup.descriptor(0, u64::MAX, 0, NEXT, 1);
    setup.descriptor(1, DATA, 4, NEXT | WRITE, 2);
    setup.descriptor(2, MEMORY + 1, 0, WRITE, 0);
    setup.offer(0);
    let chain = setup.pop().unwrap().unwrap();
    assert_eq!((chain.readable(), chain.writable()), (&[][..], &[buffer(DATA, 4)][..]));
}

#[test]
fn s2_7_5_2_a_chain_beyond_4_gib_is_an_error() {
    let mut setup = Setup::new();
    for n in 0..4 {
        setup.descriptor(n, DATA, u32::MAX / 2, NEXT, n + 1);
    }
    setup.offer(0);
    assert!(setup.pop().is_err());
}

#[test]
fn s2_7_13_an_available_index_more_than_a_queue_ahead_is_an_error() {
    let mut setup = Setup::new();
    setup.descriptor(0, DATA, 1, 0, 0);
    setup.memory.write_obj(SIZE + 1, GuestAddress(AVAIL + 2)).unwrap();
    assert!(matches!(setup.pop(), Err(RingError::Ring(_))));
}

#[test]
fn s2_7_6_indexes_wrap() {
    let mut setup = Setup::at(u16::MAX - 1, false);
    for n in 0..4 {
        setup.descriptor(n, DATA, 1, 0, 0);
        setup.offer(n);
    }
    for n in 0..4 {
        assert_eq!(setup.pop().unwrap().unwrap().head(), n);
        setup.ring.push(&setup.memory, n, 0).unwrap();
    }
    assert_eq!(setup.memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), 2);
}

#[test]
fn s2_7_5_3_an_indirect_table_is_followed() {
    let mut setup = Setup::new();
    setup.descriptor(0, DATA, 32, INDIRECT, 0);
    write_descriptor(&setup.memory, DATA, Descriptor { address: 0x5000, length: 4, flags: NEXT, next: 1 });
    write_descriptor(
        &setup.memory,
        DATA + 16,
        Descriptor { address: 0x6000, length: 8, flags: WRITE, next: 0 },
    );
    setup.offer(0);
    let chain = setup.pop().unwrap().unwrap();
    assert_eq!((chain.readable(), chain.writable()), (&[buffer(0x5000, 4)][..], &[buffer(0x6000, 8)][..]));
}

#[test]
fn s2_7_5_3_1_bad_indirect_tables_are_errors() {
    let nested = |setup: &Setup| {
        setup.descriptor(0, DATA, 16, INDIRECT, 0);
        write_descriptor(
            &setup.memory,
            DATA,
            Descriptor { address: DATA, length: 16, flags: INDIRECT, next: 0 },
        );
    };
    let longer_than_the_queue = |setup: &Setup| {
        setup.descriptor(0, DATA, 16 * 9, INDIRECT, 0);
        for n in 0..9 {
            let flags = if n == 8 { 0 } else { NEXT };
            let descriptor = Descriptor { address: 0x8000, length: 1, flags, next: n + 1 };
            write_descriptor(&setup.memory, DATA + 16 * u64::from(n), descriptor);
        }
    };
    let endless = |setup: &Setup| {
        setup.descriptor(0, DATA, 16 * 1024, INDIRECT, 0);
        write_descriptor(&setup.memory, DATA, Descriptor { address: DATA, length: 1, flags: NEXT, next: 0 });
    };
    type Build<'a> = &'a dyn Fn(&Setup);
    let cases: [(&str, Build); 7] = [
        ("nested", &nested),
        ("longer than the queue", &longer_than_the_queue),
        ("endless", &endless),
        ("empty", &|setup| setup.descriptor(0, DATA, 0, INDIRECT, 0)),
        ("not a multiple of 16", &|setup| setup.descriptor(0, DATA, 17, INDIRECT, 0)),
        ("larger than any table", &|setup| setup.descriptor(0, DATA, u32::MAX - 15, INDIRECT, 0)),
        ("outside memory", &|setup| setup.descriptor(0, MEMORY, 16, INDIRECT, 0)),
    ];
    for (what, build) in cases {
        let mut setup = Setup::new();
        build(&setup);
        setup.offer(0);
        assert!(matches!(setup.pop(), Err(RingError::BrokenChain { .. })), "{what}");
    }
}

#[test]
fn buffers_may_cross_memory_regions() {
    let mut setup = Setup::new();
    let address = MEMORY / 2 - 3;
    setup.descriptor(0, address, 6, NEXT, 1);
    setup.descriptor(1, address, 6, WRITE, 0);
    setup.offer(0);
    let chain = setup.pop().unwrap().unwrap();
    chain.write(&setup.memory, 0, b"abcdef").unwrap();
    let mut out = [0; 4];
    chain.read(&setup.memory, 1, &mut out).unwrap();
    assert_eq!(&out, b"bcde");
}

#[test]
fn a_chain_too_short_for_its_request_says_by_how_much() {
    let mut setup = Setup::new();
    setup.descriptor(0, DATA, 4, NEXT, 1);
    setup.descriptor(1, DATA, 4, WRITE, 0);
    setup.offer(0);
    let chain = setup.pop().unwrap().unwrap();
    assert!(matches!(chain.read(&setup.memory, 2, &mut [0; 5]), Err(RingError::TooShort { needed: 3 })));
    assert!(matches!(chain.write(&setup.memory, u64::MAX, &[0; 5]), Err(RingError::TooShort { needed: 5 })));
}

#[test]
fn s2_7_7_2_interrupts_are_suppressed_as_the_driver_asks() {
    let mut setup = Setup::new();
    setup.ring.push(&setup.memory, 0, 0).unwrap();
    assert!(setup.ring.needs_interrupt(&setup.memory).unwrap());
    setup.memory.write_obj(1u16, GuestAddress(AVAIL)).unwrap();
    setup.ring.push(&setup.memory, 0, 0).unwrap();
    assert!(!setup.ring.needs_interrupt(&setup.memory).unwrap());

    let mut setup = Setup::at(0, true);
    let used_event = GuestAddress(AVAIL + 4 + 2 * u64::from(SIZE));
    setup.memory.write_obj(1u16, used_event).unwrap();
    setup.ring.push(&setup.memory, 0, 0).unwrap();
    assert!(!setup.ring.needs_interrupt(&setup.memory).unwrap());
    setup.ring.push(&setup.memory, 0, 0).unwrap();
    assert!(setup.ring.needs_interrupt(&setup.memory).unwrap());
}

proptest! {
    /// Whatever is in the table: popping ends, and a chain that comes out is within the bounds the device relies on.
    #[test]
    fn any_table_gives_a_bounded_chain_or_an_error(
        table in prop::collection::vec((0u64..MEMORY + 64, 0u32..0x9000, 0u16..8, 0u16..12), 64),
        heads in prop::collection::vec(0u16..10, 0..8),
    ) {
        let mut setup = Setup::new();
        for (n, (address, length, flags, next)) in table.into_iter().enumerate() {
            // The table itself is a likely indirect table.
            let (address, length) =
                if flags & INDIRECT != 0 { (TABLE + address % 256 / 16 * 16, length % 300) } else { (address, length) };
            write_descriptor(&setup.memory, TABLE + 16 * n as u64, Descriptor { address, length, flags, next });
        }
        for head in heads {
            setup.offer(head);
            if let Ok(Some(chain)) = setup.pop() {
                let all: Vec<_> = chain.readable().iter().chain(chain.writable()).collect();
                prop_assert!(all.len() <= usize::from(SIZE));
                for buffer in all {
                    prop_assert!(buffer.address.0 + u64::from(buffer.length) <= MEMORY);
                }
            }
        }
    }

    /// A section is the same bytes that slicing the joined buffers gives.
    #[test]
    fn a_section_is_a_slice_of_the_joined_buffers(
        lengths in prop::collection::vec(0u32..20, 0..6), offset in 0u64..60, length in 0u64..60,
    ) {
        let mut at = 1000;
        let mut buffers = Vec::new();
        for length in lengths {
            buffers.push(buffer(at, length));
            at += u64::from(length) + 100;
        }
        let bytes = |buffer: Buffer| buffer.address.0..buffer.address.0 + u64::from(buffer.length);
        let joined: Vec<u64> = buffers.iter().copied().flat_map(bytes).collect();
        let wanted: Vec<u64> = joined.into_iter().skip(offset as usize).take(length as usize).collect();
        let got: Vec<u64> = section(&buffers, offset, length).flat_map(bytes).collect();
        prop_assert_eq!(got, wanted);
    }
}
