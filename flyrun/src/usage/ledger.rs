//! The files of the ledger.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use super::{Interval, now_ms};
use crate::files::{self, Lasting};
use crate::machine::Record;
use crate::paths::make_private_dir;

/// An open interval is a file of this size, a sector: written again in place it is never half there.
const OPEN_BYTES: usize = 512;
const OPEN: &str = "open";
const LOCK: &str = ".lock";
/// How often an open interval is read again that was being written.
const READ_ATTEMPTS: usize = 4;

/// All that machines of one store have used.
#[derive(Clone, Debug)]
pub struct Ledger {
    directory: PathBuf,
}

/// An interval that is not over.
#[derive(Debug)]
pub struct Open {
    file: File,
    path: PathBuf,
}

impl Ledger {
    pub fn new(directory: PathBuf) -> Ledger {
        Ledger { directory }
    }

    /// Opens an interval of a machine that this process owns; what an earlier owner left open is closed.
    ///
    /// # Errors
    /// The system's.
    pub fn open(&self, interval: &Interval) -> io::Result<Open> {
        let directory = self.directory.join(OPEN);
        make_private_dir(&directory).map_err(io::Error::other)?;
        let path = directory.join(&interval.machine);
        if path.exists() {
            let _lock = self.lock()?;
            self.settle_one(&path)?;
        }
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path)?;
        let open = Open { file, path };
        open.write(interval)?;
        Ok(open)
    }

    /// Writes down how long a machine has been suspended, if it has. Before its record forgets that.
    pub fn end_suspension(&self, record: &Record) {
        let Some(interval) = Interval::suspended(record, now_ms()) else { return };
        let written = make_private_dir(&self.directory)
            .map_err(io::Error::other)
            .and_then(|()| self.lock())
            .and_then(|_lock| self.append(&interval, Lasting::PowerCut));
        if let Err(error) = written {
            eprintln!("flyrun: cannot write down how long the machine was suspended: {error}");
        }
    }

    /// Closes an interval. It stays open if it cannot be written among the others, for somebody else to close.
    ///
    /// # Errors
    /// The system's.
    pub fn close(&self, open: &Open, interval: &Interval, lasting: Lasting) -> io::Result<()> {
        let _lock = self.lock()?;
        self.append(interval, lasting)?;
        fs::remove_file(&open.path)
    }

    /// Closes what machines left open that nobody owns any more.
    ///
    /// # Errors
    /// The system's.
    pub fn settle(&self, is_owned: &dyn Fn(&str) -> bool) -> io::Result<()> {
        for path in self.open_ones() {
            let owned = || path.file_name().and_then(|id| id.to_str()).is_some_and(is_owned);
            if owned() {
                continue;
            }
            let _lock = self.lock()?;
            // Its next owner may have come just before the lock.
            if !owned() {
                self.settle_one(&path)?;
            }
        }
        Ok(())
    }

    fn settle_one(&self, path: &Path) -> io::Result<()> {
        if let Some(interval) = read_open(path) {
            self.append(&interval, Lasting::PowerCut)?;
        }
        fs::remove_file(path)
    }

    /// Every interval that reaches into this time, open ones too, in no order. Damaged lines are passed over and counted.
    ///
    /// # Errors
    /// The system's.
    pub fn read(&self, since_ms: u64, until_ms: u64) -> io::Result<(Vec<Interval>, usize)> {
        let mut damaged = 0;
        // One may have been closed twice, by an owner that died before it had taken the open one away.
        let mut found: BTreeMap<(String, u64), Interval> = BTreeMap::new();
        let mut add = |interval: Interval| {
            if interval.from_ms < until_ms && interval.to_ms >= since_ms {
                let key = (interval.machine.clone(), interval.from_ms);
                let known = found.entry(key).or_insert_with(|| interval.clone());
                if known.to_ms < interval.to_ms {
                    *known = interval;
                }
            }
        };
        // Open ones first: one that is closed meanwhile is found closed.
        for path in self.open_ones() {
            read_open(&path).into_iter().for_each(&mut add);
        }
        // An interval is in the file of the month of its end.
        for path in
            self.months()?.into_iter().filter(|path| path.file_stem() >= Some(month(since_ms).as_ref()))
        {
            for line in fs::read(&path)?.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
                match serde_json::from_slice(line) {
                    Ok(interval) => add(interval),
                    Err(_) => damaged += 1,
                }
            }
        }
        Ok((found.into_values().collect(), damaged))
    }

    fn append(&self, interval: &Interval, lasting: Lasting) -> io::Result<()> {
        let path = self.directory.join(format!("{}.jsonl", month(interval.to_ms)));
        let mut file = File::options().read(true).append(true).create(true).open(path)?;
        let size = file.metadata()?.len();
        let mut line = serde_json::to_vec(interval)?;
        line.push(b'\n');
        if size > 0 {
            // Half a line, left by a power cut, must not damage this one too.
            let mut last = [0];
            file.seek(SeekFrom::Start(size - 1))?;
            file.read_exact(&mut last)?;
            if last != *b"\n" {
                line.insert(0, b'\n');
            }
        }
        let written = file.write_all(&line);
        if written.is_err() {
            let _ = file.set_len(size);
        }
        if lasting == Lasting::PowerCut {
            file.sync_data()?;
        }
        written
    }

    fn lock(&self) -> io::Result<File> {
        let lock = files::open_lock(&self.directory.join(LOCK))?;
        lock.lock()?;
        Ok(lock)
    }

    fn open_ones(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.directory.join(OPEN)).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    }

    fn months(&self) -> io::Result<Vec<PathBuf>> {
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
            entries => entries?,
        };
        let paths = entries.flatten().map(|entry| entry.path());
        Ok(paths.filter(|path| path.extension().is_some_and(|kind| kind == "jsonl")).collect())
    }
}

impl Open {
    /// Writes the interval again.
    ///
    /// # Errors
    /// The system's.
    pub fn write(&self, interval: &Interval) -> io::Result<()> {
        let mut sector = serde_json::to_vec(interval)?;
        if sector.len() >= OPEN_BYTES {
            return Err(io::Error::other("an interval is longer than a sector"));
        }
        sector.resize(OPEN_BYTES - 1, b' ');
        sector.push(b'\n');
        self.file.write_all_at(&sector, 0)
    }

    /// Has it survive a power cut.
    ///
    /// # Errors
    /// The system's.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

fn read_open(path: &Path) -> Option<Interval> {
    (0..READ_ATTEMPTS).find_map(|_| serde_json::from_slice(&fs::read(path).ok()?).ok())
}

/// Such as 2026-01, in UTC.
fn month(at_ms: u64) -> String {
    // The last that can be written with four digits of a year.
    let at = UNIX_EPOCH + Duration::from_millis(at_ms.min(253_402_300_799_000));
    humantime::format_rfc3339_seconds(at).to_string().chars().take(7).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVER: u64 = u64::MAX;

    fn ledger() -> (tempfile::TempDir, Ledger) {
        let directory = tempfile::tempdir().unwrap();
        let ledger = Ledger::new(directory.path().join("usage"));
        (directory, ledger)
    }

    #[test]
    fn nothing_was_used_where_there_is_no_ledger() {
        let (_directory, ledger) = ledger();
        assert_eq!(ledger.read(0, EVER).unwrap(), (vec![], 0));
        ledger.settle(&|_| false).unwrap();
    }

    #[test]
    fn an_interval_is_found_open_and_closed_and_once() {
        let (_directory, ledger) = ledger();
        let mut interval = Interval::example("a1", 1000, 1000);
        let open = ledger.open(&interval).unwrap();
        interval.to_ms = 5000;
        open.write(&interval).unwrap();
        assert_eq!(ledger.read(0, EVER).unwrap().0, [interval.clone()]);
        ledger.append(&interval, Lasting::Process).unwrap();
        assert_eq!(ledger.read(0, EVER).unwrap().0, [interval.clone()], "counted twice");
        ledger.close(&open, &interval, Lasting::PowerCut).unwrap();
        assert_eq!(ledger.read(0, EVER).unwrap().0, [interval]);
        assert!(ledger.open_ones().is_empty());
    }

    #[test]
    fn what_the_dead_left_open_is_closed_and_the_living_are_left_alone() {
        let (_directory, ledger) = ledger();
        let intervals = ["dead", "living"].map(|id| Interval::example(id, 1000, 2000));
        for interval in &intervals {
            drop(ledger.open(interval).unwrap());
        }
        ledger.settle(&|id| id == "living").unwrap();
        let left: Vec<_> = ledger.open_ones();
        assert!(left.len() == 1 && left[0].ends_with("living"), "{left:?}");
        assert_eq!(ledger.read(0, EVER).unwrap().0, intervals);
        // The next life of the one that is open.
        let next = Interval::example("living", 9000, 9000);
        let _open = ledger.open(&next).unwrap();
        assert_eq!(ledger.read(0, EVER).unwrap().0.len(), 3);
    }

    #[test]
    fn half_a_line_costs_itself_alone() {
        let (_directory, ledger) = ledger();
        let (one, two) = (Interval::example("a1", 1, 2), Interval::example("b2", 3, 4));
        let open = ledger.open(&one).unwrap();
        ledger.close(&open, &one, Lasting::Process).unwrap();
        let path = ledger.months().unwrap().remove(0);
        File::options().append(true).open(path).unwrap().write_all(b"{\"machine\":").unwrap();
        let open = ledger.open(&two).unwrap();
        ledger.close(&open, &two, Lasting::Process).unwrap();
        assert_eq!(ledger.read(0, EVER).unwrap(), (vec![one, two], 1));
    }

    #[test]
    fn only_what_reaches_into_the_time_is_read() {
        let (_directory, ledger) = ledger();
        // The end of January and of February 2026.
        let (january, february) = (1_769_900_000_000, 1_772_300_000_000);
        for (id, at) in [("a1", january), ("b2", february)] {
            let interval = Interval::example(id, at, at + 1000);
            let open = ledger.open(&interval).unwrap();
            ledger.close(&open, &interval, Lasting::Process).unwrap();
        }
        let ids = |since, until| -> Vec<String> {
            ledger.read(since, until).unwrap().0.into_iter().map(|interval| interval.machine).collect()
        };
        assert_eq!(ledger.months().unwrap().len(), 2);
        assert_eq!(ids(0, EVER), ["a1", "b2"]);
        assert_eq!(ids(january + 500, february), ["a1"]);
        assert_eq!(ids(january + 2000, EVER), ["b2"]);
    }

    #[test]
    fn the_longest_interval_fits_into_a_sector() {
        let (_directory, ledger) = ledger();
        let mut longest = Interval::example(&"f".repeat(63), u64::MAX, u64::MAX);
        longest.name = "n".repeat(63);
        longest.cpu_milli = u32::MAX;
        longest.memory = crate::size::Size(u64::MAX);
        longest.taken = super::super::Counters { cpu_usec: u64::MAX, net_in: u64::MAX, net_out: u64::MAX };
        ledger.open(&longest).unwrap();
    }
}
