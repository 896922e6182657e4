//! What is wrong with a file: where, what, and what to do.

use std::cell::RefCell;
use std::fmt;

/// The most problems of a file that are told; who has more has one that repeats.
const MAX_TOLD: usize = 50;

/// A place in a file, both counted from 1; columns are characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub struct Position {
    pub line: usize,
    pub column: usize,
}

/// One thing that is wrong. Displayed as `FILE:LINE:COLUMN: MESSAGE`, and what to do on a line of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file's name.
    pub file: String,
    /// Where in it, if it is about one place.
    pub position: Option<Position>,
    /// The fact.
    pub message: String,
    /// What to do, unless the fact says it.
    pub advice: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.escape_debug())?;
        if let Some(Position { line, column }) = self.position {
            write!(f, ":{line}:{column}")?;
        }
        write!(f, ": {}", self.message)?;
        match &self.advice {
            Some(advice) => write!(f, "\n  {advice}"),
            None => Ok(()),
        }
    }
}

/// Why files were refused: at least one problem, in the order of the file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n"))]
pub struct Refused {
    /// What is told.
    pub problems: Vec<Problem>,
    /// How many more there are.
    pub left_out: usize,
}

impl From<Problem> for Refused {
    fn from(problem: Problem) -> Refused {
        Refused { problems: vec![problem], left_out: 0 }
    }
}

/// Collects the problems of a file while it is read. Places are offsets into its text, in bytes.
#[derive(Debug)]
pub(crate) struct Log<'t> {
    file: &'t str,
    text: &'t str,
    /// Where each line begins.
    lines: Vec<usize>,
    found: RefCell<Found>,
}

#[derive(Debug, Default)]
struct Found {
    told: Vec<(usize, Problem)>,
    left_out: usize,
}

impl<'t> Log<'t> {
    pub fn new(file: &'t str, text: &'t str) -> Self {
        let newlines = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n');
        let lines = std::iter::once(0).chain(newlines.map(|(at, _)| at + 1)).collect();
        Log { file, text, lines, found: RefCell::default() }
    }

    /// Adds a problem whose message says itself what to do.
    pub fn add(&self, at: usize, message: impl Into<String>) {
        self.push(at, message.into(), None);
    }

    pub fn advise(&self, at: usize, message: impl Into<String>, advice: impl Into<String>) {
        self.push(at, message.into(), Some(advice.into()));
    }

    fn push(&self, at: usize, message: String, advice: Option<String>) {
        let mut found = self.found.borrow_mut();
        if found.told.len() == MAX_TOLD {
            found.left_out += 1;
            return;
        }
        let position = Some(self.position(at));
        found.told.push((at, Problem { file: self.file.to_string(), position, message, advice }));
    }

    pub fn position(&self, at: usize) -> Position {
        let line = self.lines.partition_point(|start| *start <= at);
        let start = self.lines.get(line.saturating_sub(1)).copied().unwrap_or_default();
        let before = self.text.as_bytes().get(start..at).unwrap_or_default();
        // Each character has one byte that does not continue another.
        let column = before.iter().filter(|byte| **byte & 0xc0 != 0x80).count() + 1;
        Position { line, column }
    }

    /// Ends the reading if there was any problem until now.
    pub fn checkpoint(&self) -> Result<(), Refused> {
        let Found { mut told, left_out } = self.found.take();
        if told.is_empty() {
            return Ok(());
        }
        told.sort_by_key(|(at, _)| *at);
        Err(Refused { problems: told.into_iter().map(|(_, problem)| problem).collect(), left_out })
    }
}

/// Text of a file in a message: without control characters, not longer than a line.
pub(crate) fn shorten(text: &str) -> String {
    const MAX_CHARS: usize = 60;
    let mut short: String = text.chars().take(MAX_CHARS).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short.escape_debug().to_string().replace("\\'", "'")
}

/// The same in quotes.
pub(crate) fn quote(text: &str) -> String {
    format!("'{}'", shorten(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_count_lines_and_characters_from_one() {
        let log = Log::new("x", "ab\nüx\n");
        let position = |at| (log.position(at).line, log.position(at).column);
        assert_eq!([position(0), position(1), position(3), position(5)], [(1, 1), (1, 2), (2, 1), (2, 2)]);
        assert_eq!(position(4), (2, 2), "an offset inside a character is no reason to panic");
        assert_eq!(position(999), (3, 1));
    }

    #[test]
    fn problems_come_in_the_order_of_the_file_and_are_bounded() {
        let text = "x".repeat(100);
        let log = Log::new("x", &text);
        (0..60).rev().for_each(|at| log.add(at, "bad"));
        let refused = log.checkpoint().unwrap_err();
        assert_eq!((refused.problems.len(), refused.left_out), (MAX_TOLD, 10));
        let columns = refused.problems.iter().map(|problem| problem.position.unwrap().column);
        assert!(columns.is_sorted());
    }

    #[test]
    fn foreign_text_is_short_and_has_no_control_characters() {
        assert_eq!(quote("a\u{1b}[31m'b\n"), r"'a\u{1b}[31m'b\n'");
        assert!(quote(&"ü".repeat(100)).chars().count() < 70);
    }
}
