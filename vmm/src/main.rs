//! `flyrun-vmm`: the process that is one machine.
fn main() {}
