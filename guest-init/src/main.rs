//! PID 1 of a machine that runs an image's process.
#![forbid(unsafe_code)]

fn main() {
    guest_init::pid1::run(guest_init::run::run)
}
