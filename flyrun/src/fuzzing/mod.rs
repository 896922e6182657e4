//! What the fuzz targets in `fuzz/` hold true of any bytes that a guest, a client, an archive or a file can hold. Their seeds, what was
//! once found among them, are run by this module's test too.
//!
//! Each function panics where it is not so. A `directory` is the target's own, and in memory.
#![allow(clippy::expect_used, reason = "only tests and fuzzers run this")]

mod archive;
mod files;
mod guest;
mod text;

pub use archive::snapshot_archive;
pub use files::{log, records, secrets};
pub use guest::{control_stream, copy_out, dns, http, vmm_answers};
pub use text::{control, env_file, fly_toml, words};

/// The parts of an input: each begins with its length, in two bytes.
fn parts(mut bytes: &[u8]) -> Vec<&[u8]> {
    let mut parts = Vec::new();
    while let Some(([low, high], rest)) = bytes.split_first_chunk::<2>() {
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (part, after) = rest.split_at(length);
        parts.push(part);
        bytes = after;
    }
    parts
}

/// Nothing in it is obeyed by a terminal.
#[track_caller]
fn assert_harmless(text: &str) {
    assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "{text:?}");
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    type Target<'a> = &'a dyn Fn(&[u8]);

    #[test]
    fn what_the_fuzz_targets_begin_with_holds() {
        let directories: Vec<_> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
        let [first, second, third] = &directories[..] else { unreachable!() };
        let targets: &[(&str, Target)] = &[
            ("control", &control),
            ("control_stream", &control_stream),
            ("copy_out", &|bytes| copy_out(first.path(), bytes)),
            ("dns", &dns),
            ("env_file", &env_file),
            ("fly_toml", &fly_toml),
            ("http", &http),
            ("log", &|bytes| log(second.path(), bytes)),
            ("records", &records),
            ("secrets", &secrets),
            ("snapshot_archive", &|bytes| snapshot_archive(third.path(), bytes)),
            ("vmm_answers", &vmm_answers),
            ("words", &words),
        ];
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
        for (name, target) in targets {
            let seeds = fs::read_dir(corpus.join(name)).unwrap().map(|seed| seed.unwrap().path());
            let count = seeds.map(|seed| target(&fs::read(seed).unwrap())).count();
            assert!(count > 0, "{name} has no seeds");
        }
    }
}
