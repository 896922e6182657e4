//! The second processor: it changes memory that devices are just reading.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use crate::{
    cpu,
    memory::{TABLES, TABLES_END},
    random::Random,
};

static AWAKE: AtomicBool = AtomicBool::new(false);
/// What is to be changed, or 0: the descriptors' address, and their number in the upper bits.
static TARGET: AtomicU64 = AtomicU64::new(0);
static BUSY: AtomicBool = AtomicBool::new(false);

pub fn awake() -> bool {
    AWAKE.load(SeqCst)
}

/// Has a descriptor table changed until [`leave`].
pub fn change(table: u64, descriptors: u16) {
    TARGET.store(table | u64::from(descriptors) << 48, SeqCst);
}

/// Returns when nothing is changed any more.
pub fn leave() {
    TARGET.store(0, SeqCst);
    while BUSY.load(SeqCst) {
        core::hint::spin_loop();
    }
}

pub extern "C" fn main() -> ! {
    AWAKE.store(true, SeqCst);
    let mut random = Random::new(2);
    loop {
        BUSY.store(true, SeqCst);
        let target = TARGET.load(SeqCst);
        if target != 0 {
            scribble(target & ((1 << 48) - 1), target >> 48, &mut random);
        }
        BUSY.store(false, SeqCst);
        if target == 0 {
            cpu::rest(500);
        }
    }
}

/// Swaps good for bad and back, field by field.
fn scribble(table: u64, descriptors: u64, random: &mut Random) {
    for _ in 0..64 {
        let at = table + 16 * random.below(descriptors);
        match random.below(5) {
            0 => cpu::write64(at, random.writable()),
            1 => cpu::write32(at + 8, random.length()),
            2 => cpu::write16(at + 12, random.below(8) as u16),
            3 => cpu::write16(at + 14, random.below(descriptors + 2) as u16),
            // A table of descriptors, for the one that has become indirect.
            _ => cpu::write64(at, TABLES + random.below(TABLES_END - TABLES - 4096)),
        }
    }
}
