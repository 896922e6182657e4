//! PID 1 of the bare boot benchmark: writes one line to the console and resets the machine. No std, no libc, 1 KB,
//! so that the figure is the VMM's and the kernel's. `benches/run` compiles it with rustc; it is no cargo target,
//! because a cargo test or clippy run of a program without std and unwinding does not link.
#![no_std]
#![no_main]

use core::arch::{asm, global_asm};

const WRITE: usize = 1;
const BRK: usize = 12;
const PAUSE: usize = 34;
const REBOOT: usize = 169;
const REBOOT_MAGIC: usize = 0xfee1_dead;
const REBOOT_MAGIC2: usize = 0x2812_1969;
const RB_AUTOBOOT: usize = 0x0123_4567;

/// The line that the benchmark waits for.
static LINE: &[u8] = b"FIRST-LINE\n";

/// Linux's system call with up to three arguments.
///
/// # Safety
/// As the call with these arguments.
unsafe fn system_call(number: usize, first: usize, second: usize, third: usize) -> usize {
    let result;
    // SAFETY: the caller answers for the call; rcx and r11 are what the instruction itself destroys.
    unsafe {
        asm!("syscall", inlateout("rax") number => result, in("rdi") first, in("rsi") second, in("rdx") third,
             lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

// The kernel enters with the number of arguments at the top of the stack and pointers to them above it.
global_asm!(".globl _start", "_start:", "mov rdi, [rsp]", "mov rsi, [rsp + 8*rdi]", "and rsp, -16", "call start");

/// The line that comes again and again.
static TICK: &[u8] = b".\n";
/// Rounds of a loop between two of them: some 0.1 ms.
const ROUNDS: usize = 50_000;

/// With these the kernel and this program use some 30 MiB of the machine's memory.
const USED: usize = 18 << 20;
/// What a ticking machine writes to in each round, if it is told to.
const WRITTEN: usize = 8 << 20;
const PAGE: usize = 4096;

/// Writes to each of the pages there.
///
/// # Safety
/// They are the process's, and nobody else's.
unsafe fn write_pages(first: *mut u8, bytes: usize) {
    for offset in (0..bytes).step_by(PAGE) {
        // SAFETY: the caller answers for the memory.
        unsafe {
            let byte = first.add(offset);
            byte.write_volatile(byte.read_volatile().wrapping_add(1) | 1);
        }
    }
}

/// Writes the line, then resets the machine. If the last of several arguments begins with an h, it sleeps for ever instead,
/// with a t it takes memory and ticks for ever, and with tw it writes to 8 MiB of that in each round.
///
/// # Safety
/// `last` is the last argument's address, if there is any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn start(count: usize, last: *const u8) -> ! {
    // SAFETY: the buffer is static and its length its own; reboot and pause take no memory; there is a last argument, which
    // a zero ends; what the kernel has given by brk is the process's.
    unsafe {
        system_call(WRITE, 1, LINE.as_ptr() as usize, LINE.len());
        let mut used = core::ptr::null_mut();
        let ticks = count > 1 && *last == b't';
        if ticks {
            used = system_call(BRK, 0, 0, 0) as *mut u8;
            system_call(BRK, used as usize + USED, 0, 0);
            write_pages(used, USED);
        }
        while ticks {
            system_call(WRITE, 1, TICK.as_ptr() as usize, TICK.len());
            if *last.add(1) == b'w' {
                write_pages(used, WRITTEN);
            }
            for round in 0..ROUNDS {
                core::hint::black_box(round);
            }
        }
        if count < 2 || *last != b'h' {
            system_call(REBOOT, REBOOT_MAGIC, REBOOT_MAGIC2, RB_AUTOBOOT);
        }
        loop {
            system_call(PAUSE, 0, 0, 0);
        }
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {
        core::hint::spin_loop();
    }
}
