//! log.jsonl: what a machine's process wrote, line by line, in the format of docker's json-file driver.
//!
//! One line of JSON for each line of output: `{"log":"…\n","stream":"stdout","time":"2026-01-01T00:00:00.000000000Z"}`.
//! Text without a line feed at its end is a part of a longer line. At the size limit the file is renamed to `log.jsonl.1`,
//! the older ones move up, and the oldest goes.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::machine::LogLimits;

pub const FILE: &str = "log.jsonl";
/// A line longer than this many bytes is written in parts.
const MAX_LINE: usize = 16 * 1024;
/// No entry is longer: every byte of the longest line as an escape, and the rest of the object.
const MAX_ENTRY: u64 = 8 * MAX_LINE as u64;

/// Which stream a line was written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    Stdout,
    Stderr,
}

/// One line of output, or a part of a long one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    pub log: String,
    pub stream: Stream,
    /// RFC 3339, UTC.
    #[serde(with = "rfc3339")]
    pub time: SystemTime,
}

mod rfc3339 {
    use std::time::SystemTime;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&humantime::format_rfc3339_nanos(*time))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SystemTime, D::Error> {
        let text = String::deserialize(deserializer)?;
        humantime::parse_rfc3339(&text).map_err(D::Error::custom)
    }
}

/// Writes a machine's log.
#[derive(Debug)]
pub struct Writer {
    directory: PathBuf,
    limits: LogLimits,
    file: Option<File>,
    size: u64,
    /// What came behind the last line feed of each stream.
    partial: [Vec<u8>; 2],
    lost: u64,
}

impl Writer {
    pub fn new(directory: &Path, limits: LogLimits) -> Writer {
        Writer {
            directory: directory.to_path_buf(),
            limits,
            file: None,
            size: 0,
            partial: [Vec::new(), Vec::new()],
            lost: 0,
        }
    }

    /// Takes output as it comes. A log that cannot be written holds nobody up: what is lost is counted, and the count is
    /// written when there is room again.
    pub fn write(&mut self, stream: Stream, mut bytes: &[u8], time: SystemTime) {
        let mut batch = Vec::new();
        while !bytes.is_empty() {
            let partial = &mut self.partial[stream as usize];
            let room = MAX_LINE - partial.len();
            let line = bytes.iter().position(|&byte| byte == b'\n').map_or(bytes.len(), |at| at + 1);
            let (now, rest) = bytes.split_at(line.min(room));
            partial.extend_from_slice(now);
            bytes = rest;
            if partial.len() == MAX_LINE || partial.ends_with(b"\n") {
                push_entry(&mut batch, partial, stream, time);
                partial.clear();
            }
        }
        self.append(&batch);
    }

    /// Writes what has no line feed yet, at the end of a life.
    pub fn flush(&mut self, time: SystemTime) {
        let mut batch = Vec::new();
        for stream in [Stream::Stdout, Stream::Stderr] {
            let partial = &mut self.partial[stream as usize];
            if !partial.is_empty() {
                push_entry(&mut batch, partial, stream, time);
                partial.clear();
            }
        }
        self.append(&batch);
    }

    fn append(&mut self, batch: &[u8]) {
        if batch.is_empty() {
            return;
        }
        if self.lost > 0 {
            let told = format!("flyrun: {} bytes of the log were lost: it could not be written\n", self.lost);
            let mut note = Vec::new();
            push_entry(&mut note, told.as_bytes(), Stream::Stderr, SystemTime::now());
            if self.try_append(&note).is_ok() {
                self.lost = 0;
            }
        }
        let mut rest = batch;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(self.fitting(rest));
            if self.try_append(now).is_err() {
                self.lost += now.len() as u64;
            }
            rest = later;
        }
    }

    /// How many bytes of whole entries the file has room for; where there is none, the length of the first entry, which
    /// begins the next file.
    fn fitting(&self, batch: &[u8]) -> usize {
        let room = self.limits.max_size.0.saturating_sub(self.size);
        let mut fitting = 0;
        for entry in batch.split_inclusive(|&byte| byte == b'\n') {
            if fitting > 0 && (fitting + entry.len()) as u64 > room {
                break;
            }
            fitting += entry.len();
        }
        fitting
    }

    /// All of it or nothing: half a line would damage the next.
    fn try_append(&mut self, batch: &[u8]) -> io::Result<()> {
        self.opened()?;
        if self.size > 0 && self.size + batch.len() as u64 > self.limits.max_size.0 {
            self.rotate()?;
        }
        let file = self.opened()?;
        let whole = file.metadata()?.len();
        let written = file.write_all(batch);
        match written {
            Ok(()) => self.size += batch.len() as u64,
            Err(_) => _ = file.set_len(whole),
        }
        written
    }

    fn opened(&mut self) -> io::Result<&mut File> {
        match &mut self.file {
            Some(file) => Ok(file),
            none => {
                let file = open(&self.directory.join(FILE))?;
                self.size = mend(&file)?;
                Ok(none.insert(file))
            }
        }
    }

    fn rotate(&mut self) -> io::Result<()> {
        self.file = None;
        self.size = 0;
        let name = |number: u32| rotated(&self.directory, number);
        for number in (1..self.limits.max_files.max(1)).rev() {
            match fs::rename(name(number - 1), name(number)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        if self.limits.max_files <= 1 {
            fs::remove_file(name(0))?;
        }
        Ok(())
    }
}

fn push_entry(batch: &mut Vec<u8>, line: &[u8], stream: Stream, time: SystemTime) {
    let entry = Entry { log: String::from_utf8_lossy(line).into_owned(), stream, time };
    // Writing to memory does not fail, and the type has nothing that JSON lacks.
    if serde_json::to_writer(&mut *batch, &entry).is_ok() {
        batch.push(b'\n');
    }
}

fn open(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    File::options().read(true).append(true).create(true).mode(0o600).open(path)
}

/// Cuts off what a power cut or a full disk left of a line, and returns the size.
fn mend(file: &File) -> io::Result<u64> {
    use std::os::unix::fs::FileExt;
    let size = file.metadata()?.len();
    let start = size.saturating_sub(MAX_ENTRY);
    let mut tail = vec![0; (size - start) as usize];
    file.read_exact_at(&mut tail, start)?;
    let whole = start + tail.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at as u64 + 1);
    if whole < size {
        file.set_len(whole)?;
    }
    Ok(whole)
}

fn rotated(directory: &Path, number: u32) -> PathBuf {
    match number {
        0 => directory.join(FILE),
        _ => directory.join(format!("{FILE}.{number}")),
    }
}

/// Reads a machine's log, the oldest file first, and then what is added.
#[derive(Debug)]
pub struct Reader {
    directory: PathBuf,
    older: Vec<BufReader<File>>,
    current: Option<BufReader<File>>,
    line: Vec<u8>,
}

impl Reader {
    /// # Errors
    /// A file of the log cannot be opened. A machine that has written nothing has an empty log.
    pub fn open(directory: &Path) -> io::Result<Reader> {
        let mut older = Vec::new();
        // A rotation between two of these opens shows a file twice or not at all, so the current one is opened first.
        let current = open_if_there(&rotated(directory, 0))?;
        for number in 1.. {
            match open_if_there(&rotated(directory, number))? {
                Some(file) => older.push(file),
                None => break,
            }
        }
        Ok(Reader { directory: directory.to_path_buf(), older, current, line: Vec::new() })
    }

    /// The next entry; `None` when all that is there so far has been read.
    ///
    /// # Errors
    /// The log cannot be read. Lines that are no entries are passed over.
    pub fn next(&mut self) -> io::Result<Option<Entry>> {
        loop {
            if let Some(oldest) = self.older.last_mut() {
                match read_entry(oldest, &mut self.line)? {
                    Some(entry) => return Ok(Some(entry)),
                    None => {
                        self.line.clear();
                        self.older.pop();
                    }
                }
                continue;
            }
            if self.current.is_none() {
                self.current = open_if_there(&rotated(&self.directory, 0))?;
            }
            let Some(current) = &mut self.current else { return Ok(None) };
            if let Some(entry) = read_entry(current, &mut self.line)? {
                return Ok(Some(entry));
            }
            if !self.was_rotated() {
                return Ok(None);
            }
            // What was added before the rotation is still to be read, and so are files that were begun and rotated since.
            if let Some(old) = self.current.take() {
                self.older = self.newer_than(old.get_ref())?;
                self.older.push(old);
            }
        }
    }

    /// The rotated files that were begun after this one, the oldest last.
    fn newer_than(&self, old: &File) -> io::Result<Vec<BufReader<File>>> {
        let mut newer = Vec::new();
        for number in 1.. {
            match open_if_there(&rotated(&self.directory, number))? {
                Some(file) if !is_same(file.get_ref(), old)? => newer.push(file),
                _ => break,
            }
        }
        Ok(newer)
    }

    fn was_rotated(&self) -> bool {
        let Some(open) = &self.current else { return false };
        match File::open(rotated(&self.directory, 0)) {
            Ok(named) => !is_same(open.get_ref(), &named).unwrap_or(true),
            Err(_) => true,
        }
    }
}

fn is_same(one: &File, other: &File) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let (one, other) = (one.metadata()?, other.metadata()?);
    Ok((one.dev(), one.ino()) == (other.dev(), other.ino()))
}

fn open_if_there(path: &Path) -> io::Result<Option<BufReader<File>>> {
    match File::open(path) {
        Ok(file) => Ok(Some(BufReader::new(file))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The next whole entry. The beginning of one that is still being written stays in `line`.
fn read_entry(file: &mut BufReader<File>, line: &mut Vec<u8>) -> io::Result<Option<Entry>> {
    loop {
        let room = MAX_ENTRY.saturating_sub(line.len() as u64);
        file.by_ref().take(room).read_until(b'\n', line)?;
        let whole = line.ends_with(b"\n");
        if !whole && (line.len() as u64) < MAX_ENTRY {
            return Ok(None);
        }
        let entry = serde_json::from_slice(line);
        line.clear();
        if let Ok(entry) = entry {
            return Ok(Some(entry));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use proptest::prelude::*;

    use super::*;
    use crate::size::Size;

    const NOON: SystemTime = UNIX_EPOCH;

    fn read_all(reader: &mut Reader) -> Vec<(Stream, String)> {
        std::iter::from_fn(|| reader.next().unwrap()).map(|entry| (entry.stream, entry.log)).collect()
    }

    fn unlimited() -> LogLimits {
        LogLimits { max_size: Size::gib(1), max_files: 2 }
    }

    #[test]
    fn an_entry_is_what_docker_writes() {
        let entry = Entry {
            log: "a\"b\n".into(),
            stream: Stream::Stderr,
            time: UNIX_EPOCH + Duration::from_nanos(5),
        };
        let text = serde_json::to_string(&entry).unwrap();
        assert_eq!(text, r#"{"log":"a\"b\n","stream":"stderr","time":"1970-01-01T00:00:00.000000005Z"}"#);
        assert_eq!(serde_json::from_str::<Entry>(&text).unwrap(), entry);
    }

    #[test]
    fn lines_are_kept_apart_however_they_arrive() {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = Writer::new(directory.path(), unlimited());
        let mut reader = Reader::open(directory.path()).unwrap();
        writer.write(Stream::Stdout, b"one\ntw", NOON);
        assert_eq!(read_all(&mut reader), [(Stream::Stdout, "one\n".into())]);
        writer.write(Stream::Stderr, b"err\n", NOON);
        writer.write(Stream::Stdout, b"o\nend", NOON);
        writer.flush(NOON);
        let rest = [(Stream::Stderr, "err\n"), (Stream::Stdout, "two\n"), (Stream::Stdout, "end")];
        assert_eq!(read_all(&mut reader), rest.map(|(stream, text)| (stream, text.to_string())));
    }

    #[test]
    fn a_reader_follows_through_rotations_and_loses_nothing_that_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let limits = LogLimits { max_size: Size(400), max_files: 3 };
        let mut writer = Writer::new(directory.path(), limits);
        let mut reader = Reader::open(directory.path()).unwrap();
        let mut seen = Vec::new();
        for number in 0..40 {
            writer.write(Stream::Stdout, format!("line {number}\n").as_bytes(), NOON);
            seen.extend(read_all(&mut reader));
        }
        let expected: Vec<_> = (0..40).map(|number| (Stream::Stdout, format!("line {number}\n"))).collect();
        assert_eq!(seen, expected);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 3);
        let kept = read_all(&mut Reader::open(directory.path()).unwrap());
        assert!(kept.len() > 8 && expected.ends_with(&kept), "{kept:?}");
    }

    #[test]
    fn no_file_outgrows_its_limit_however_much_comes_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let limits = LogLimits { max_size: Size(1000), max_files: 3 };
        let text: String = (0..200).map(|number| format!("{number}\n")).collect();
        Writer::new(directory.path(), limits).write(Stream::Stdout, text.as_bytes(), NOON);
        let sizes: Vec<u64> = fs::read_dir(directory.path())
            .unwrap()
            .map(|file| file.unwrap().metadata().unwrap().len())
            .collect();
        assert!(sizes.len() == 3 && sizes.iter().all(|size| (1..=1000).contains(size)), "{sizes:?}");
        let kept = read_all(&mut Reader::open(directory.path()).unwrap());
        assert!(kept.len() < 50 && kept.last().unwrap().1 == "199\n", "{kept:?}");
    }

    #[test]
    fn a_reader_that_was_away_for_several_rotations_goes_on_where_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let limits = LogLimits { max_size: Size(200), max_files: 50 };
        let mut writer = Writer::new(directory.path(), limits);
        let mut reader = Reader::open(directory.path()).unwrap();
        writer.write(Stream::Stdout, b"first\n", NOON);
        assert_eq!(read_all(&mut reader).len(), 1);
        for number in 0..20 {
            writer.write(Stream::Stdout, format!("{number}\n").as_bytes(), NOON);
        }
        let seen: Vec<_> = read_all(&mut reader).into_iter().map(|(_, text)| text).collect();
        assert_eq!(seen, (0..20).map(|number| format!("{number}\n")).collect::<Vec<_>>());
    }

    #[test]
    fn half_a_line_left_by_a_power_cut_is_cut_off() {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = Writer::new(directory.path(), unlimited());
        writer.write(Stream::Stdout, b"whole\n", NOON);
        let mut file = File::options().append(true).open(directory.path().join(FILE)).unwrap();
        file.write_all(br#"{"log":"ha"#).unwrap();
        let mut writer = Writer::new(directory.path(), unlimited());
        writer.write(Stream::Stdout, b"next\n", NOON);
        let lines = read_all(&mut Reader::open(directory.path()).unwrap());
        assert_eq!(lines, [(Stream::Stdout, "whole\n".into()), (Stream::Stdout, "next\n".into())]);
    }

    proptest! {
        #[test]
        fn any_output_comes_back_line_by_line(chunks in proptest::collection::vec("[a-c\n]{0,20}", 0..20)) {
            let directory = tempfile::tempdir().unwrap();
            let mut writer = Writer::new(directory.path(), unlimited());
            for chunk in &chunks {
                writer.write(Stream::Stdout, chunk.as_bytes(), NOON);
            }
            writer.flush(NOON);
            let read = read_all(&mut Reader::open(directory.path()).unwrap());
            let whole: String = read.iter().map(|(_, text)| text.as_str()).collect();
            prop_assert_eq!(whole, chunks.concat());
            prop_assert!(read.iter().rev().skip(1).all(|(_, text)| text.ends_with('\n')));
        }

        #[test]
        fn a_damaged_log_is_read_to_its_end(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let directory = tempfile::tempdir().unwrap();
            fs::write(directory.path().join(FILE), bytes).unwrap();
            let _ = read_all(&mut Reader::open(directory.path()).unwrap());
        }
    }
}
