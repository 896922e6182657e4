//! Files that nobody wrote: whatever the bytes are, they are read or refused, and a refusal points into the file.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use app::config::{self, MAX_FILE_BYTES};
use common::{FIXTURES, read_again};
use proptest::prelude::*;
use proptest::sample::Index;

/// What makes a file go wrong in more interesting ways than noise does.
const WORDS: &[&str] = &[
    "[",
    "]",
    "[[",
    "]]",
    "{",
    "}",
    "=",
    ".",
    ",",
    "\"",
    "'''",
    "\n",
    "\r",
    "#",
    "\0",
    "\u{feff}",
    "ü",
    "-1",
    "0",
    "65536",
    "99999999999999999999",
    "1e999",
    "nan",
    "0xff",
    "true",
    "1979-05-27",
    "\"1h1h\"",
    "\"9999999999gb\"",
    "[services]",
    "[[services.ports]]",
    "[flyrun]",
    "processes = []",
    "port = 443",
    "a.b.c.d = 1",
    "\\u0000",
];

#[derive(Clone, Debug)]
enum Change {
    Set(Index, u8),
    Remove(Index, Index),
    Repeat(Index, Index),
    Insert(Index, Index),
    Splice(Index, Index),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        any::<(Index, u8)>().prop_map(|(at, byte)| Change::Set(at, byte)),
        any::<(Index, Index)>().prop_map(|(from, to)| Change::Remove(from, to)),
        any::<(Index, Index)>().prop_map(|(from, to)| Change::Repeat(from, to)),
        any::<(Index, Index)>().prop_map(|(at, word)| Change::Insert(at, word)),
        any::<(Index, Index)>().prop_map(|(at, other)| Change::Splice(at, other)),
    ]
}

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    let place = |index: &Index, bytes: &Vec<u8>| index.index(bytes.len() + 1);
    match change {
        Change::Set(at, byte) => {
            let at = place(at, bytes);
            bytes.splice(at..(at + 1).min(bytes.len()), [*byte]);
        }
        Change::Remove(from, to) | Change::Repeat(from, to) => {
            let (from, to) = (place(from, bytes), place(to, bytes));
            let range = from.min(to)..from.max(to).min(from.min(to) + 64);
            match change {
                Change::Remove(..) => drop(bytes.drain(range)),
                _ => {
                    let part = bytes[range.clone()].to_vec();
                    bytes.splice(range.end..range.end, part);
                }
            }
        }
        Change::Insert(at, word) => {
            let at = place(at, bytes);
            bytes.splice(at..at, word.get(WORDS).bytes());
        }
        Change::Splice(at, other) => {
            let at = place(at, bytes);
            let other = other.get(FIXTURES).1.as_bytes();
            bytes.splice(at.., other[at.min(other.len())..].iter().copied());
        }
    }
}

/// Reads bytes; what comes out must make sense.
fn check(bytes: &[u8]) -> Result<(), TestCaseError> {
    let lines = bytes.split(|byte| *byte == b'\n').count();
    match config::read("fly.toml", bytes) {
        Ok(file) => prop_assert_eq!(read_again(&file.app), Ok(file.app)),
        Err(refused) => {
            prop_assert!(!refused.problems.is_empty());
            for problem in &refused.problems {
                prop_assert!(problem.position.is_none_or(|position| position.line <= lines), "{}", problem);
                let told = problem.to_string();
                prop_assert!(told.len() < 1000, "a message is no book: {}", told);
                prop_assert!(!told.chars().any(|c| c.is_control() && c != '\n'), "{:?}", told);
                prop_assert!(told.lines().count() <= 2, "{}", told);
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_changed_file_is_read_or_refused(
        base in 0..FIXTURES.len(),
        changes in proptest::collection::vec(change(), 1..8),
    ) {
        let mut bytes = FIXTURES[base].1.as_bytes().to_vec();
        changes.iter().for_each(|change| apply(&mut bytes, change));
        check(&bytes)?;
    }

    #[test]
    fn so_is_any_sequence_of_words(words in proptest::collection::vec(proptest::sample::select(WORDS), 0..40)) {
        check(words.join(" ").as_bytes())?;
    }

    #[test]
    fn so_are_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        check(&bytes)?;
    }
}

#[test]
fn large_files_end_soon() {
    // A quarter of what is read: the work is to grow with the size, and not faster.
    let size = MAX_FILE_BYTES / 4;
    let fill = |unit: &str| unit.repeat(size / unit.len());
    for text in [
        fill("["),
        fill("a."),
        fill("[a]\n"),
        fill("[[services]]\n"),
        fill("x={}\n"),
        format!("{} = 1", "a".repeat(size)),
        format!("services = [{}]", fill("{},").split_off(30)),
        format!("[[services]]\ninternal_port = 1\nports = [{}]", fill("{port=1},").split_off(90)),
        format!("[flyrun]\nhostnames = [{}]", fill("'a',").split_off(60)),
    ] {
        check(text.as_bytes()).unwrap_or_else(|error| panic!("{error}"));
    }
}
