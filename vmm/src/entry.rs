//! How the programs begin that start with every machine: by the C library's `main`, without what the standard library does before its
//! own. That reads /proc/self/maps, to tell the overflow of a stack from other faults, and gives each thread a stack for the signal:
//! 0.15 ms of virtual time a process, and 0.01 a thread. Without it such an overflow is a plain SIGSEGV at the stack's guard.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::{AsRawFd, BorrowedFd, IntoRawFd},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Prepares what a Rust program may expect of its process, runs it, and writes out what it has printed. Returns its exit code.
pub fn enter(program: impl FnOnce() -> u8) -> libc::c_int {
    open_standard_streams();
    // SAFETY: nothing else runs yet, and no handler is set. A write to a closed pipe is an error then, and no end.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    let code = program();
    // Nobody is left to tell.
    let _ = io::stdout().flush();
    code.into()
}

/// The `main` of a program that is `#![no_main]`: that of a function without arguments, which gives the exit code.
#[macro_export]
macro_rules! main {
    ($program:path) => {
        /// The C library's ([`vmm::entry`]).
        #[allow(
            unsafe_code,
            reason = "no other function has that name, and the C library calls it once, as it is declared"
        )]
        #[unsafe(no_mangle)]
        pub extern "C" fn main() -> std::ffi::c_int {
            $crate::entry::enter($program)
        }
    };
}

/// What is opened next must not become a standard stream that somebody has closed.
fn open_standard_streams() {
    // SAFETY: they are only asked about, and the kernel says of each whether it is one.
    let streams = [0, 1, 2].map(|fd| unsafe { BorrowedFd::borrow_raw(fd) });
    let mut asked = streams.each_ref().map(|stream| PollFd::new(stream, PollFlags::empty()));
    if poll(&mut asked, Some(&Timespec::default())).is_err() {
        return;
    }
    let closed = asked.iter().filter(|stream| stream.revents().contains(PollFlags::NVAL)).count();
    for _ in 0..closed {
        // The lowest that is free, so in the place of one of them.
        match File::options().read(true).write(true).open("/dev/null") {
            Ok(null) if null.as_raw_fd() <= 2 => _ = null.into_raw_fd(),
            _ => return,
        }
    }
}
