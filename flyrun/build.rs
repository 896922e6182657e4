//! Has the linker put together what a start runs.

#[path = "../vmm/build/order.rs"]
mod order;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    order::tell();
}
