//! PID 1 of a machine that unpacks an image's layers.
#![forbid(unsafe_code)]

fn main() {
    guest_init::pid1::run(guest_init::unpack::run)
}
