//! The probe's guest: what every kernel does in its first milliseconds, in ring 0, with a word on a port after each.

use std::arch::global_asm;

/// Where the code is loaded, and what it finds in memory. Every page is one of the first 64 KiB.
pub mod place {
    /// The code.
    pub const CODE: u64 = 0x1_0000;
    /// The interrupt descriptor table, whose entry 3 the host points at the handler.
    pub const IDT: u64 = 0x2000;
    /// 16 zero bytes for cmpxchg16b.
    pub const CELL: u64 = 0x3000;
    /// A zeroed XSAVE area, which stands for the initial state.
    pub const XSAVE: u64 = 0x4000;
    /// First byte behind the stack.
    pub const STACK: u64 = 0x8000;
}

/// The port that hears the last step done.
pub const PORT: u16 = 0xf4;
/// The loop of step [`STEPS`] takes this many instructions.
pub const LOOP_INSTRUCTIONS: u64 = 400_000;
/// What has just been done when the port hears 1, 2, 3…; the failing one is named in a verdict.
pub const STEPS: [&str; 6] =
    ["first instruction", "popcnt", "cmpxchg16b", "int3", "xsetbv and xrstor", "counted loop"];

// r14 is 1 if the CPU has XSAVE. A wrong result ends in hlt before the step's word.
global_asm!(
    ".pushsection .rodata.flyrun_probe, \"a\", @progbits",
    ".globl flyrun_probe_start, flyrun_probe_handler, flyrun_probe_end",
    "flyrun_probe_start:",
    "mov al, 1",
    "out 0xf4, al",
    "movabs rax, 0x0123456789abcdef",
    "popcnt rbx, rax",
    "cmp rbx, 32",
    "jne 9f",
    "mov al, 2",
    "out 0xf4, al",
    "mov edi, 0x3000",
    "xor eax, eax",
    "xor edx, edx",
    "mov ebx, 1",
    "mov ecx, 2",
    "lock cmpxchg16b [rdi]",
    "jnz 9f",
    "mov al, 3",
    "out 0xf4, al",
    "xor r15d, r15d",
    "int3",
    "cmp r15, 1",
    "jne 9f",
    "mov al, 4",
    "out 0xf4, al",
    "test r14, r14",
    "jz 2f",
    "xor ecx, ecx",
    "xor edx, edx",
    "mov eax, 3",
    "xsetbv",
    "mov edi, 0x4000",
    "xrstor [rdi]",
    "2:",
    "mov al, 5",
    "out 0xf4, al",
    "mov ecx, 200000",
    "3:",
    "dec ecx",
    "jnz 3b",
    "mov al, 6",
    "out 0xf4, al",
    "9:",
    "hlt",
    "jmp 9b",
    "flyrun_probe_handler:",
    "inc r15",
    "iretq",
    "flyrun_probe_end:",
    ".popsection",
);

unsafe extern "C" {
    static flyrun_probe_start: u8;
    static flyrun_probe_handler: u8;
    static flyrun_probe_end: u8;
}

/// The code's bytes.
pub fn bytes() -> &'static [u8] {
    let start = &raw const flyrun_probe_start;
    let length = (&raw const flyrun_probe_end).addr() - start.addr();
    // SAFETY: both symbols bound the one read-only section above, in that order, and it is never written.
    unsafe { std::slice::from_raw_parts(start, length) }
}

/// Where in [`bytes`] the handler of int3 begins.
pub fn handler_offset() -> u64 {
    ((&raw const flyrun_probe_handler).addr() - (&raw const flyrun_probe_start).addr()) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_is_one_small_piece_with_its_handler_inside() {
        let code = bytes();
        assert_eq!(code[..4], [0xb0, 1, 0xe6, PORT as u8]);
        assert!(code.len() < 256);
        assert!(handler_offset() < code.len() as u64);
        assert_eq!(code[handler_offset() as usize..], [0x49, 0xff, 0xc7, 0x48, 0xcf]);
    }
}
