//! A ring in memory that the input has filled: chains come out bounded, or an error.
#![no_main]

use devices::virtio::{
    Memory,
    ring::{Chain, Ring, section, total},
};
use devices_fuzz::Input;
use libfuzzer_sys::fuzz_target;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

const MEMORY: u64 = 0x1_0000;

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let half = MEMORY as usize / 2;
    let Ok(memory) = Memory::from_ranges(&[(GuestAddress(0), half), (GuestAddress(half as u64), half)])
    else {
        return;
    };
    let size = 1 << (input.u8() % 6);
    let Ok(mut queue) = Queue::new(256) else { return };
    queue.set_size(size);
    // The three parts may overlap each other and the buffers.
    queue.set_desc_table_address(Some(u32::from(input.u8()) * 16 + 16), Some(0));
    queue.set_avail_ring_address(Some(0x1000 + u32::from(input.u8()) * 2), Some(0));
    queue.set_used_ring_address(Some(0x1400 + u32::from(input.u8()) * 4), Some(0));
    queue.set_event_idx(input.u8() & 1 != 0);
    let start = input.u16();
    queue.set_next_avail(start);
    queue.set_next_used(start);
    queue.set_ready(true);
    assert!(queue.is_valid(&memory));
    let avail = queue.avail_ring();
    let mut ring = Ring::new(queue);
    let mut chain = Chain::default();
    while !input.is_empty() {
        let address = u64::from(input.u16()) % 0x1800;
        let _ = memory.write_slice(input.bytes(48), GuestAddress(address));
        let ahead = start.wrapping_add(u16::from(input.u8()));
        let _ = memory.write_obj(ahead, GuestAddress(avail + 2));
        match ring.pop(&memory, &mut chain) {
            Ok(true) => {}
            Ok(false) => {
                let _ = ring.enable_notification(&memory);
                continue;
            }
            Err(_) => return,
        }
        let count = chain.readable().len() + chain.writable().len();
        assert!(count <= usize::from(size));
        let inside = chain.readable().iter().chain(chain.writable());
        assert!(inside.into_iter().all(|buffer| buffer.address.0 + u64::from(buffer.length) <= MEMORY));
        let (offset, length) = (u64::from(input.u16()), u64::from(input.u16()));
        let expected = total(chain.readable()).saturating_sub(offset).min(length);
        assert_eq!(
            section(chain.readable(), offset, length).map(|part| u64::from(part.length)).sum::<u64>(),
            expected
        );
        let mut out = vec![0; length as usize];
        assert_eq!(chain.read(&memory, offset, &mut out).is_ok(), expected == length);
        let _ = chain.write(&memory, offset, &out);
        if input.u8() & 1 == 0 {
            ring.put_back();
        } else if ring.push(&memory, chain.head(), length as u32).is_err() {
            return;
        }
        let _ = ring.needs_interrupt(&memory);
        let _ = ring.disable_notification(&memory);
    }
});
