//! `flyrun-monitor`: the process behind a machine in the background. A program of its own since a small one starts sooner than
//! `flyrun` with all its commands.
#![deny(unsafe_code)]
#![no_main]

vmm::main!(flyrun::background);
