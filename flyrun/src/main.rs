//! `flyrun`: boots any OCI image as a KVM microVM. What it does is in `lib.rs`.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    flyrun::command()
}
