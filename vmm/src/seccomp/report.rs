//! The end of a process one of whose threads has made a call that its list has not: by name, on standard error, with
//! [`VmExit::Forbidden`].
//!
//! The kernel has not made the call, and does not make it whatever becomes of this handler. A thread that blocks SIGSYS is
//! killed by it without a word (force_sig in Linux), and none can install another handler.

use std::{cell::Cell, io, mem, ptr};

use super::names;
use crate::exit::VmExit;

/// `SYS_SECCOMP` (asm-generic/siginfo.h): the signal is a filter's.
const SYS_SECCOMP: libc::c_int = 1;
/// As the kernel has it, without the zero.
const NAME_BYTES: usize = 15;

thread_local! {
    static NAME: Cell<[u8; NAME_BYTES]> = const { Cell::new([0; NAME_BYTES]) };
}

/// siginfo_t of SIGSYS.
#[repr(C)]
struct Info {
    signal: libc::c_int,
    error: libc::c_int,
    code: libc::c_int,
    address: *const libc::c_void,
    call: libc::c_int,
    architecture: libc::c_uint,
}

/// What the calling thread is called in a report.
pub(super) fn name(name: &str) {
    let mut bytes = [0; NAME_BYTES];
    bytes.iter_mut().zip(name.bytes()).for_each(|(place, byte)| *place = byte);
    NAME.set(bytes);
}

/// Installs the handler, and no others: a crash ends the process at once.
///
/// # Errors
/// The host refuses it.
pub(super) fn install() -> io::Result<()> {
    // SAFETY: all zeros is a valid sigaction: the default.
    let default: libc::sigaction = unsafe { mem::zeroed() };
    // SAFETY: as above.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = on_violation as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the set is a field of our own.
    unsafe { libc::sigfillset(&mut action.sa_mask) };
    // The standard library's would go on with a call that no list has.
    for (signal, action) in [(libc::SIGSEGV, &default), (libc::SIGBUS, &default), (libc::SIGSYS, &action)] {
        // SAFETY: the default needs nothing; the handler makes only system calls, reads a thread local without destructor and
        // writes to its own stack, all of which is safe in a signal handler.
        if unsafe { libc::sigaction(signal, action, ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

extern "C" fn on_violation(_: libc::c_int, info: *const Info, context: *const libc::ucontext_t) {
    let mut line = Line::default();
    // SAFETY: the kernel passes a siginfo_t that lives as long as the handler runs; the fields read here are those of SIGSYS.
    let (code, call) = unsafe { ((*info).code, (*info).call) };
    if code != SYS_SECCOMP {
        line.add(b"flyrun-vmm: ended by SIGSYS\n");
        return line.end(VmExit::Terminated);
    }
    // SAFETY: the kernel passes the registers of the thread, for as long.
    let registers = unsafe { &(*context).uc_mcontext.gregs };
    line.add(b"flyrun-vmm: thread ");
    for byte in NAME.get().into_iter().take_while(|byte| *byte != 0) {
        line.add(&[byte]);
    }
    line.add(b" made the system call ");
    match names::name(call.cast_unsigned()) {
        Some(name) => line.add(name.as_bytes()),
        None => line.hex(call.cast_unsigned().into()),
    }
    for (place, before) in [(libc::REG_RDI, b"(" as &[u8]), (libc::REG_RSI, b", "), (libc::REG_RDX, b", ")] {
        line.add(before);
        line.hex(registers.get(place as usize).copied().unwrap_or_default().cast_unsigned());
    }
    line.add(b", ...), which its seccomp filter does not allow\n");
    line.end(VmExit::Forbidden);
}

/// A line that is made without an allocation.
struct Line {
    bytes: [u8; 256],
    length: usize,
}

impl Default for Line {
    fn default() -> Self {
        Line { bytes: [0; 256], length: 0 }
    }
}

impl Line {
    /// As far as there is room.
    fn add(&mut self, text: &[u8]) {
        let room = self.bytes.get_mut(self.length..).unwrap_or_default();
        let added = room.iter_mut().zip(text).map(|(place, byte)| *place = *byte).count();
        self.length += added;
    }

    fn hex(&mut self, number: u64) {
        self.add(b"0x");
        let digits = (64 - number.leading_zeros()).div_ceil(4).max(1);
        for digit in (0..digits).rev() {
            let digit = (number >> (4 * digit) & 0xf) as u8;
            self.add(&[if digit < 10 { b'0' + digit } else { b'a' + digit - 10 }]);
        }
    }

    fn end(&self, exit: VmExit) {
        // SAFETY: the pointer and the length are those of initialized bytes; _exit may be called in a signal handler. Nobody
        // is left to tell if standard error is closed.
        unsafe {
            libc::write(libc::STDERR_FILENO, self.bytes.as_ptr().cast(), self.length);
            libc::_exit(exit.code().into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_words_and_numbers_and_an_end() {
        let mut line = Line::default();
        line.add(b"ioctl(");
        for number in [0, 9, 0xae80, u64::MAX] {
            line.hex(number);
            line.add(b" ");
        }
        assert_eq!(&line.bytes[..line.length], b"ioctl(0x0 0x9 0xae80 0xffffffffffffffff ");
        line.add(&[b'x'; 300]);
        assert_eq!(line.length, 256);
    }

    #[test]
    fn the_signals_information_lies_where_the_kernel_puts_it() {
        assert_eq!(mem::offset_of!(Info, address), 16);
        assert_eq!((mem::offset_of!(Info, call), mem::offset_of!(Info, architecture)), (24, 28));
    }
}
