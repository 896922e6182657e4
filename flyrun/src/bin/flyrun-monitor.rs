//! `flyrun-monitor`: the process behind a machine in the background. A program of its own since a small one starts sooner than
//! `flyrun` with all its commands.
#![deny(unsafe_code)]
#![no_main]

/// The C library's ([`vmm::entry`]).
#[allow(
    unsafe_code,
    reason = "no other function of the program has that name, and the C library calls it once"
)]
#[unsafe(no_mangle)]
pub extern "C" fn main() -> std::ffi::c_int {
    vmm::entry::enter(flyrun::background)
}
