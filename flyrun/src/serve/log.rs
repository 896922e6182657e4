//! What `flyrun serve` tells on standard error: a line for each thing that happens, for people or as JSON.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, SystemTime};

use serde_json::Value;

use crate::machine::new_id;

/// Lines that may wait for whoever reads standard error. What comes beyond that is lost: requests do not wait for it.
const WAITING: usize = 16 << 10;
/// How long the last lines may take.
const FLUSH_PATIENCE: Duration = Duration::from_secs(1);

/// Where lines go, and how they are written.
#[derive(Clone, Debug)]
pub struct Log {
    json: bool,
    lines: SyncSender<Word>,
}

/// What the thread that writes is told.
#[derive(Debug)]
enum Word {
    Line(String),
    /// All before it are to be written.
    Flush(SyncSender<()>),
}

/// A line that is being put together.
#[derive(Debug)]
#[must_use = "a line is written by its end"]
pub struct Line {
    log: Log,
    time: SystemTime,
    event: &'static str,
    /// In the order in which they were added.
    fields: Vec<(&'static str, Value)>,
}

impl Log {
    /// Lines on standard error, written by a thread of their own.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn on_stderr(json: bool) -> io::Result<Log> {
        let (lines, receiver) = sync_channel(WAITING);
        crate::vm::spawn("log", move || write(&receiver))?;
        Ok(Log { json, lines })
    }

    /// A line about this.
    pub fn line(&self, event: &'static str) -> Line {
        Line { log: self.clone(), time: SystemTime::now(), event, fields: Vec::new() }
    }

    /// Waits until all is written, within reason.
    pub fn flush(&self) {
        let (done, written) = sync_channel(1);
        if self.lines.try_send(Word::Flush(done)).is_ok() {
            let _ = written.recv_timeout(FLUSH_PATIENCE);
        }
    }
}

/// Nobody who reads is no failure.
fn write(words: &Receiver<Word>) {
    for word in words {
        match word {
            Word::Line(line) => _ = io::stderr().lock().write_all(line.as_bytes()),
            Word::Flush(done) => _ = done.try_send(()),
        }
    }
}

impl Line {
    /// Adds a fact.
    pub fn with(mut self, key: &'static str, value: impl Into<Value>) -> Line {
        self.fields.push((key, value.into()));
        self
    }

    /// Adds a fact if there is one.
    pub fn with_some(self, key: &'static str, value: Option<impl Into<Value>>) -> Line {
        match value {
            Some(value) => self.with(key, value),
            None => self,
        }
    }

    /// Adds an id that finds this line, and gives it.
    pub fn end_with_id(self) -> String {
        // Without random numbers a line is found by its time.
        let id = new_id().unwrap_or_else(|_| "0".repeat(14));
        self.with("id", id.as_str()).end();
        id
    }

    /// Hands it to the thread that writes.
    pub fn end(self) {
        let mut text = self.text();
        text.push('\n');
        match self.log.lines.try_send(Word::Line(text)) {
            Ok(()) | Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {}
        }
    }

    fn text(&self) -> String {
        let time = humantime::format_rfc3339_millis(self.time).to_string();
        if self.log.json {
            let mut text = format!("{{\"time\":\"{time}\",\"event\":\"{}\"", self.event);
            for (key, value) in &self.fields {
                let _ = write!(text, ",\"{key}\":{value}");
            }
            text.push('}');
            return text;
        }
        let mut text = format!("{time} {}", self.event);
        for (key, value) in &self.fields {
            let _ = match value {
                Value::String(word) if is_word(word) => write!(text, " {key}={word}"),
                // Quoted as JSON has it: in one line, and without control characters.
                value => write!(text, " {key}={value}"),
            };
        }
        text
    }
}

fn is_word(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_graphic() && !matches!(c, '"' | '='))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(json: bool) -> Line {
        let (lines, _) = sync_channel(1);
        let line = Log { json, lines }.line("started").with("app", "web").with("ms", 12);
        Line { time: SystemTime::UNIX_EPOCH, ..line }.with("why", "two words\n\x1b[31m")
    }

    #[test]
    fn a_line_is_one_line_for_people_and_for_programs() {
        assert_eq!(
            line(false).text(),
            r#"1970-01-01T00:00:00.000Z started app=web ms=12 why="two words\n\u001b[31m""#
        );
        let json: Value = serde_json::from_str(&line(true).text()).unwrap();
        assert_eq!((json["event"].as_str(), json["ms"].as_u64()), (Some("started"), Some(12)));
        assert_eq!(json["why"].as_str(), Some("two words\n\x1b[31m"));
    }
}
