//! What lies where. Guest memory is 64 MiB; each region says who may write to it.

use crate::cpu;

/// Rings of well-behaved drivers, 64 KiB a device: devices write to their used rings only.
pub const RINGS: u64 = 0x40_0000;
/// Descriptor tables for attacks, and what second processors change: devices read them, never write.
pub const TABLES: u64 = 0x60_0000;
pub const TABLES_END: u64 = 0x80_0000;
/// Anybody may write here, and does.
pub const ARENA: u64 = 0x100_0000;
pub const ARENA_END: u64 = 0x200_0000;
/// Given back to the host by the balloon; may be zero at any time.
pub const GIVEN: u64 = 0x280_0000;
pub const GIVEN_END: u64 = 0x300_0000;
/// The end of memory.
pub const END: u64 = 0x400_0000;

/// The last of it, for buffers and rings that reach beyond.
pub const EDGE: u64 = END - 0x1_0000;

/// Nobody writes here: below and above the arena, and before the edge. First address and the one behind the last.
pub const CANARIES: [(u64, u64); 3] = [(0xf0_0000, ARENA), (ARENA_END, 0x210_0000), (0x3e0_0000, EDGE)];

fn canary(at: u64) -> u64 {
    at.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5a5a_5a5a_5a5a_5a5a
}

pub fn plant_canaries() {
    for (first, end) in CANARIES {
        (first..end).step_by(8).for_each(|at| cpu::write64(at, canary(at)));
    }
}

/// The first address whose canary is dead.
pub fn dead_canary() -> Option<u64> {
    let mut all = CANARIES.into_iter().flat_map(|(first, end)| (first..end).step_by(8));
    all.find(|at| cpu::read64(*at) != canary(*at))
}

pub fn fill(at: u64, bytes: u64, value: u8) {
    (at..at + bytes).for_each(|at| cpu::write8(at, value));
}
