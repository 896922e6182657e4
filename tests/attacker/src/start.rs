//! From the VMM's 64-bit entry point to Rust, on the first processor and on the second.

use core::arch::{asm, global_asm};

use crate::cpu;

// SSE is on before the first line of Rust, whose compiler uses it. RSI holds the zero page.
global_asm!(
    r#"
    .section .text.start, "ax"
    .code64
    .global _start
_start:
    cli
    lea rsp, [rip + first_stack_end]
    mov rax, cr0
    and rax, ~4
    or rax, 2
    mov cr0, rax
    mov rax, cr4
    or rax, 0x600
    mov cr4, rax
    mov rdi, rsi
    call {main}
1:  hlt
    jmp 1b

    .global second_start
second_start:
    lea rsp, [rip + second_stack_end]
    call {second}
2:  hlt
    jmp 2b

    // Copied to TRAMPOLINE. From real mode to long mode at once (AMD64 manual, volume 2, section 14.6).
    .code16
    .global trampoline, trampoline_end
trampoline:
    cli
    xor ax, ax
    mov ds, ax
    mov eax, 0x620
    mov cr4, eax
    mov eax, dword ptr [0x2f00]
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
    lgdtd [0x2f10]
    mov eax, 0x80000033
    mov cr0, eax
    // ljmp 0x10:second_start
    .byte 0x66, 0xea
    .long second_start
    .word 0x10
trampoline_end:
    .code64

    .section .bss
    .balign 16
    .skip 65536
first_stack_end:
    .skip 65536
second_stack_end:
    .text
"#,
    main = sym crate::main,
    second = sym crate::second::main,
);

/// A page below 1 MiB: where the second processor starts, with what it needs at the end of it.
pub const TRAMPOLINE: u64 = 0x2000;
const TRAMPOLINE_CR3: u64 = TRAMPOLINE + 0xf00;
const TRAMPOLINE_GDTR: u64 = TRAMPOLINE + 0xf10;

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;

/// Page tables and segments of our own: those of the VMM lie in low memory, which broken rings may write to.
#[repr(C, align(4096))]
struct Tables {
    top: [u64; 512],
    gibs: [u64; 512],
    pages: [[u64; 512]; 4],
    segments: [u64; 4],
}

static mut TABLES: Tables = Tables {
    top: [0; 512],
    gibs: [0; 512],
    pages: [[0; 512]; 4],
    // As the boot protocol has them: code at 0x10, data at 0x18.
    segments: [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff],
};

/// Maps the first 4 GiB to themselves, devices included.
pub fn map_everything() {
    let tables = &raw mut TABLES;
    // SAFETY: one processor runs, and nobody else has a reference to these tables.
    let tables = unsafe { &mut *tables };
    tables.top[0] = (&raw const tables.gibs) as u64 | PRESENT_WRITABLE;
    for gib in 0..4 {
        tables.gibs[gib] = (&raw const tables.pages[gib]) as u64 | PRESENT_WRITABLE;
        for page in 0..512 {
            tables.pages[gib][page] = ((gib * 512 + page) as u64) << 21 | LARGE_PAGE | PRESENT_WRITABLE;
        }
    }
    let (top, gdt) = ((&raw const tables.top) as u64, gdtr());
    // SAFETY: the new tables map what the old ones did, and more; the segments are the same.
    unsafe {
        asm!("mov cr3, {}", in(reg) top);
        asm!("lgdt [{}]", in(reg) &gdt);
    }
}

#[repr(C, packed)]
struct Gdtr {
    limit: u16,
    base: u64,
}

fn gdtr() -> Gdtr {
    Gdtr { limit: 31, base: (&raw const TABLES) as u64 + core::mem::offset_of!(Tables, segments) as u64 }
}

/// Wakes the second processor (Intel's manual, volume 3, section 8.4.4): INIT, then a startup interrupt.
pub fn start_second() {
    unsafe extern "C" {
        static trampoline: u8;
        static trampoline_end: u8;
    }
    const ICR_LOW: u64 = 0xfee0_0300;
    const ICR_HIGH: u64 = 0xfee0_0310;
    let (from, end) = ((&raw const trampoline) as u64, (&raw const trampoline_end) as u64);
    for at in 0..end - from {
        cpu::write8(TRAMPOLINE + at, cpu::read8(from + at));
    }
    cpu::write32(TRAMPOLINE_CR3, (&raw const TABLES) as u32);
    let Gdtr { limit, base } = gdtr();
    cpu::write16(TRAMPOLINE_GDTR, limit);
    cpu::write32(TRAMPOLINE_GDTR + 2, base as u32);
    for command in [0x4500, 0x4600 | (TRAMPOLINE >> 12) as u32] {
        cpu::write32(ICR_HIGH, 1 << 24);
        cpu::write32(ICR_LOW, command);
        cpu::rest(100_000);
    }
}
