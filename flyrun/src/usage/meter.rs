//! Counting while a machine runs.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::ledger::Open;
use super::{Counters, Interval, Ledger, Phase};
use crate::files::Lasting;
use crate::machine::Record;
use crate::vm_usage;

/// How often it is written down what was used, and how often so that a power cut leaves it.
const TICK: Duration = Duration::from_secs(1);
const SYNC: Duration = Duration::from_secs(10);
/// More than /proc/PID/stat ever is: 52 numbers and a name.
const LONGEST_LINE: usize = 2048;
/// The longest interval in milliseconds: a question about a part of it is answered by its share.
const LONGEST_MS: u64 = 3_600_000;

/// Where the figures come from: files of /proc and /sys that stay open, as they are read each second of a machine's life.
#[derive(Debug)]
pub struct Sources {
    cpu: Option<File>,
    net_in: Option<File>,
    net_out: Option<File>,
}

/// One life of a machine, being measured.
#[derive(Debug)]
pub struct Meter {
    ledger: Ledger,
    sources: Sources,
    lasting: Lasting,
    /// The vCPUs of this life, whatever is wanted for the next.
    cpus: u8,
    interval: Interval,
    open: Option<Open>,
    began: Instant,
    /// What the sources told when the interval began, and what last.
    base: Counters,
    last: Counters,
    due: Instant,
    synced: Instant,
}

impl Meter {
    /// Begins with the machine's process.
    pub fn begin(ledger: Ledger, record: &Record, sources: Sources) -> Meter {
        let config = &record.config;
        let from = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let from_ms = from.as_millis() as u64;
        let interval = Interval {
            machine: record.id.clone(),
            name: record.name.clone(),
            phase: Phase::Started,
            from_ms,
            to_ms: from_ms,
            cpu_milli: cpu_milli(record, config.cpus),
            memory: config.memory,
            taken: Counters::default(),
        };
        // As with the record: a machine that goes with its process has nothing to say after a power cut.
        let lasting = if config.auto_remove { Lasting::Process } else { Lasting::PowerCut };
        let now = Instant::now();
        let open = told(ledger.open(&interval));
        // The boot is the machine's too: its CPU counts from the beginning of the process.
        let base = Counters::default();
        let (due, synced) = (now + TICK, now);
        let cpus = config.cpus;
        Meter { ledger, sources, lasting, cpus, interval, open, began: now, base, last: base, due, synced }
    }

    /// When [`Self::tick`] is to be called.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Writes down what was used so far, if it is time.
    pub fn tick(&mut self) {
        let now = Instant::now();
        if now < self.due {
            return;
        }
        self.due = now + TICK;
        self.look();
        if self.interval.to_ms - self.interval.from_ms >= LONGEST_MS {
            self.close();
            self.begin_next();
        }
        let Some(open) = &self.open else { return };
        told(open.write(&self.interval));
        if self.lasting == Lasting::PowerCut && now.duration_since(self.synced) >= SYNC {
            self.synced = now;
            told(open.sync());
        }
    }

    /// Takes the sources' figures. To be called while they can still be had.
    pub fn look(&mut self) {
        self.last = self.last.max(self.sources.counters());
        self.interval.taken = self.last.since(self.base);
        self.interval.to_ms = self.interval.from_ms + self.began.elapsed().as_millis() as u64;
    }

    /// The machine has another name, or other limits, from now on.
    pub fn change(&mut self, record: &Record) {
        let cpu_milli = cpu_milli(record, self.cpus);
        if (&record.name, cpu_milli) == (&self.interval.name, self.interval.cpu_milli) {
            return;
        }
        self.look();
        self.close();
        self.interval.name.clone_from(&record.name);
        self.interval.cpu_milli = cpu_milli;
        self.begin_next();
    }

    /// The life is over; that of a machine on disk was at this time, in milliseconds since the epoch, from which on it counts as that.
    pub fn end(mut self, suspended_at_ms: Option<u64>) {
        self.look();
        let until_ms = suspended_at_ms.map(|at_ms| at_ms.max(self.interval.from_ms));
        self.interval.to_ms = self.interval.to_ms.min(until_ms.unwrap_or(u64::MAX));
        self.close();
    }

    fn begin_next(&mut self) {
        self.began = Instant::now();
        self.base = self.last;
        self.interval.from_ms = self.interval.to_ms;
        self.interval.taken = Counters::default();
        self.open = told(self.ledger.open(&self.interval));
    }

    fn close(&mut self) {
        if let Some(open) = self.open.take() {
            told(self.ledger.close(&open, &self.interval, self.lasting));
        }
    }
}

impl Sources {
    /// Those of a flyrun-vmm, by its process id, and of a machine's TAP interface.
    pub fn of(process: u32, interface: Option<&str>) -> Sources {
        let statistics = |name: &str| {
            let interface = interface?;
            File::open(format!("/sys/class/net/{interface}/statistics/{name}")).ok()
        };
        Sources {
            cpu: File::open(format!("/proc/{process}/stat")).ok(),
            // What the host sends the machine receives.
            net_in: statistics("tx_bytes"),
            net_out: statistics("rx_bytes"),
        }
    }

    /// 0 for what is gone.
    fn counters(&self) -> Counters {
        let bytes = |file| read(file).trim().parse().unwrap_or(0);
        Counters {
            cpu_usec: vm_usage::cpu_usec(&read(&self.cpu)),
            net_in: bytes(&self.net_in),
            net_out: bytes(&self.net_out),
        }
    }
}

/// A file of one line, from its beginning; empty if it cannot be read.
fn read(file: &Option<File>) -> String {
    let mut line = [0; LONGEST_LINE];
    let count = file.as_ref().and_then(|file| file.read_at(&mut line, 0).ok()).unwrap_or(0);
    String::from_utf8_lossy(line.get(..count).unwrap_or_default()).into_owned()
}

fn cpu_milli(record: &Record, cpus: u8) -> u32 {
    record.config.limits.cpu_milli.unwrap_or(u32::from(cpus) * 1000)
}

/// A ledger that cannot be written, as on a full disk, does not end a machine that runs.
fn told<T>(result: std::io::Result<T>) -> Option<T> {
    result.map_err(|error| eprintln!("flyrun: cannot write down the machine's usage: {error}")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meter(ledger: &Ledger, record: &Record) -> Meter {
        Meter::begin(ledger.clone(), record, Sources::of(std::process::id(), Some("lo")))
    }

    #[test]
    fn sources_tell_what_grows_and_nothing_of_what_is_gone() {
        let mut child =
            std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let own = Sources::of(std::process::id(), Some("lo"));
        let gone = Sources::of(child.id(), Some("none-such"));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(gone.counters(), Counters::default());
        let before = own.counters();
        std::net::UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"bytes", "127.0.0.1:9").unwrap();
        let after =
            (0..1_000_000).map(|_| own.counters()).find(|now| now.cpu_usec > before.cpu_usec).unwrap();
        assert!(after.net_in > before.net_in && after.net_out > before.net_out, "{before:?} {after:?}");
    }

    #[test]
    fn a_life_is_written_down_while_it_lasts_and_when_it_ends() {
        let directory = tempfile::tempdir().unwrap();
        let ledger = Ledger::new(directory.path().join("usage"));
        let record = Record::example("web");
        let mut meter = meter(&ledger, &record);
        let read = || ledger.read(0, u64::MAX).unwrap().0;
        assert_eq!((read().len(), read()[0].cpu_milli), (1, 1000));
        std::thread::sleep(Duration::from_millis(20));
        meter.due = Instant::now();
        meter.tick();
        let [interval] = &read()[..] else { panic!("{:?}", read()) };
        assert!(interval.to_ms >= interval.from_ms + 20);
        meter.end(None);
        assert_eq!(read().len(), 1);
    }

    #[test]
    fn a_life_that_ends_on_disk_ends_when_it_was_there() {
        let directory = tempfile::tempdir().unwrap();
        let ledger = Ledger::new(directory.path().join("usage"));
        for (late_ms, whole_ms) in [(8, 8), (-1000, 0)] {
            let meter = meter(&ledger, &Record::example(&format!("web{whole_ms}")));
            std::thread::sleep(Duration::from_millis(20));
            let suspended_at_ms = meter.interval.from_ms.saturating_add_signed(late_ms);
            meter.end(Some(suspended_at_ms));
            let intervals = ledger.read(0, u64::MAX).unwrap().0;
            let own = intervals.iter().find(|it| it.name == format!("web{whole_ms}")).unwrap();
            assert_eq!(own.to_ms - own.from_ms, whole_ms);
        }
    }

    #[test]
    fn a_change_begins_an_interval_and_nothing_counts_twice() {
        let directory = tempfile::tempdir().unwrap();
        let ledger = Ledger::new(directory.path().join("usage"));
        let mut record = Record::example("web");
        let mut meter = meter(&ledger, &record);
        meter.last = Counters { net_in: u64::MAX / 2, ..Counters::default() };
        record.name = "shop".into();
        record.config.limits.cpu_milli = Some(500);
        std::thread::sleep(Duration::from_millis(2));
        meter.change(&record);
        meter.end(None);
        let mut intervals = ledger.read(0, u64::MAX).unwrap().0;
        intervals.sort_by_key(|interval| interval.from_ms);
        let [first, second] = &intervals[..] else { panic!("{intervals:?}") };
        assert_eq!((first.taken.net_in, second.taken.net_in), (u64::MAX / 2, 0));
        assert_eq!((first.cpu_milli, second.cpu_milli), (1000, 500));
        assert_eq!((first.name.as_str(), second.name.as_str()), ("web", "shop"));
        assert_eq!(first.to_ms, second.from_ms);
    }
}
