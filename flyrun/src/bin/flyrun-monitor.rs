//! `flyrun-monitor`: the process behind a machine in the background. A program of its own since a small one starts sooner than
//! `flyrun` with all its commands.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    flyrun::background()
}
