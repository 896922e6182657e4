//! `flyrun`: boots any OCI image as a KVM microVM. What it does is in `lib.rs`.
#![deny(unsafe_code)]
#![no_main]

vmm::main!(flyrun::command);
