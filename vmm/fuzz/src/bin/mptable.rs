//! The table of CPUs and interrupts, for any number of CPUs and any lines, read as Linux does (arch/x86/kernel/mpparse.c).
#![no_main]
#![allow(clippy::expect_used, reason = "only fuzzers run this")]

use std::sync::LazyLock;

use devices::virtio::Memory;
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vmm::{memory::reserve, mptable, snapshot::pages::discard};

const MEMORY_END: u64 = 1 << 20;
/// Once: guest memory lives as long as its process.
static MEMORY: LazyLock<Memory> = LazyLock::new(|| reserve(1).expect("there is memory"));

const ROOM: usize = 1024;
const POINTER: usize = 16;
const HEADER: usize = 44;

fuzz_target!(|data: &[u8]| {
    let Some((cpus, lines)) = data.split_first() else { return };
    let memory = &*MEMORY;
    discard(memory, 0..MEMORY_END, false).expect("its pages can be given back");
    // A line that is told twice, or more lines than there are, nobody asks for.
    let mut lines = lines.to_vec();
    lines.sort_unstable();
    lines.dedup();
    mptable::write(memory, *cpus, &lines).expect("it fits");
    let mut bytes = [0; ROOM + 64];
    memory.read_slice(&mut bytes, GuestAddress(mptable::ADDRESS)).expect("there is memory");
    let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    let (room, beyond) = bytes.split_at(ROOM);
    assert!(beyond.iter().all(|byte| *byte == 0), "it runs over its KiB");
    let (pointer, table) = room.split_at(POINTER);
    assert_eq!((&pointer[..4], sum(pointer)), (&b"_MP_"[..], 0));
    let length = usize::from(u16::from_le_bytes([table[4], table[5]]));
    let table = &table[..length];
    assert_eq!((&table[..4], sum(table)), (&b"PCMP"[..], 0));
    let (mut rest, mut found, mut told) = (&table[HEADER..], 0, Vec::new());
    while let Some(kind) = rest.first() {
        if *kind == 3 {
            told.push(rest[5]);
        }
        found += u8::from(*kind == 0);
        rest = &rest[if *kind == 0 { 20 } else { 8 }..];
    }
    assert_eq!(found, (*cpus).clamp(1, mptable::MAX_CPUS));
    lines.retain(|line| *line < mptable::IRQ_LINES);
    assert_eq!(told, lines);
});
