//! Memory, registers and ports, each access one instruction of exactly the width that is asked for. Beside it, start.rs and
//! library.rs alone have unsafe code.
//!
//! These functions are safe to call as far as Rust goes: what this kernel has of its own (code, stacks, tables) lies below
//! [`crate::memory::RINGS`], and nobody writes there by address.

use core::arch::asm;

macro_rules! accesses {
    ($read:ident, $write:ident, $type:ty, $class:ident, $modifier:literal) => {
        pub fn $read(at: u64) -> $type {
            let value: $type;
            // SAFETY: 4 GiB are mapped, and reading has no effect on what Rust owns.
            unsafe {
                asm!(concat!("mov {v", $modifier, "}, [{a}]"), v = out($class) value, a = in(reg) at,
                    options(nostack, preserves_flags));
            }
            value
        }

        pub fn $write(at: u64, value: $type) {
            // SAFETY: as the module says, nothing of Rust's is at an address that is written to.
            unsafe {
                asm!(concat!("mov [{a}], {v", $modifier, "}"), v = in($class) value, a = in(reg) at,
                    options(nostack, preserves_flags));
            }
        }
    };
}

accesses!(read8, write8, u8, reg_byte, "");
accesses!(read16, write16, u16, reg, ":x");
accesses!(read32, write32, u32, reg, ":e");
accesses!(read64, write64, u64, reg, "");

pub fn out8(port: u16, value: u8) {
    // SAFETY: ports reach devices only.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) };
}

pub fn out16(port: u16, value: u16) {
    // SAFETY: as above.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nostack, preserves_flags)) };
}

pub fn out32(port: u16, value: u32) {
    // SAFETY: as above.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags)) };
}

pub fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack, preserves_flags)) };
    value
}

pub fn in16(port: u16) -> u16 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in ax, dx", in("dx") port, out("ax") value, options(nostack, preserves_flags)) };
    value
}

pub fn in32(port: u16) -> u32 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack, preserves_flags)) };
    value
}

/// Writes so many bytes from memory to a port, by one string instruction.
pub fn out_string(port: u16, from: u64, bytes: u64) {
    // SAFETY: reads memory, and ports reach devices only.
    unsafe {
        asm!("rep outsb", in("dx") port, inout("rsi") from => _, inout("rcx") bytes => _, options(nostack));
    }
}

/// Reads so many bytes from a port into memory, by one string instruction.
pub fn in_string(port: u16, to: u64, bytes: u64) {
    // SAFETY: as the module says of writes.
    unsafe {
        asm!("rep insb", in("dx") port, inout("rdi") to => _, inout("rcx") bytes => _, options(nostack))
    };
}

/// Orders memory before and after, as a driver must between its ring and its notification.
pub fn fence() {
    core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
}

/// Lets others go on for a while.
pub fn rest(rounds: u32) {
    (0..rounds).for_each(|_| core::hint::spin_loop());
}
