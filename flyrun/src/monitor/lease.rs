//! The lease of a workload that works though nobody asks it anything: what guest-init says of it is kept, shown and handed on.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::{Monitor, Reply, Request};

/// Words that come faster than this are one.
const TELL_PAUSE: Duration = Duration::from_millis(200);
/// In a machine's directory of sockets: the second since the epoch at which its lease runs out.
const FILE: &str = "busy";

/// Until when the workload is busy, as it says.
#[derive(Debug, Default)]
pub struct Lease {
    until: Option<Instant>,
    told_at: Option<Instant>,
    /// There is something to tell.
    is_news: bool,
}

impl Lease {
    fn hold(&mut self, seconds: u32, now: Instant) {
        self.until = (seconds > 0).then(|| now + Duration::from_secs(seconds.into()));
        self.is_news = true;
    }

    /// When those who follow it are to be told.
    pub fn due(&self, now: Instant) -> Option<Instant> {
        self.is_news.then(|| self.told_at.map_or(now, |at| at + TELL_PAUSE))
    }

    /// How many seconds it still lasts, begun ones included.
    fn left(&self, now: Instant) -> u32 {
        let left = self.until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now));
        u32::try_from(left.as_millis().div_ceil(1000)).unwrap_or(u32::MAX)
    }
}

impl Monitor<'_> {
    /// The workload says that it is busy for so long, or not any more.
    pub(super) fn is_busy(&mut self, seconds: u32) {
        self.lease.hold(seconds, Instant::now());
    }

    /// Tells what is due to be told.
    pub(super) fn tell_lease(&mut self) {
        let now = Instant::now();
        if self.lease.due(now).is_none_or(|due| due > now) {
            return;
        }
        (self.lease.told_at, self.lease.is_news) = (Some(now), false);
        let reply = Reply::Busy { seconds: self.lease.left(now) };
        write(self.run_dir.path(), self.lease.left(now));
        for conversation in self.waiting.iter_mut().filter(|one| one.request == Request::Follow) {
            conversation.reply(&reply);
        }
    }

    /// What whoever begins to follow is told.
    pub(super) fn lease_now(&self) -> Reply {
        Reply::Busy { seconds: self.lease.left(Instant::now()) }
    }

    /// A life is over, and so is its lease.
    pub(super) fn end_lease(&mut self) {
        self.lease = Lease::default();
        write(self.run_dir.path(), 0);
    }
}

/// For whoever looks at the machine. One that cannot be written is not missed by those who follow.
fn write(run_dir: &Path, seconds: u32) {
    let path = run_dir.join(FILE);
    let _ = match seconds {
        0 => std::fs::remove_file(path),
        seconds => std::fs::write(path, (epoch_seconds() + u64::from(seconds)).to_string()),
    };
}

/// How many seconds the workload of a machine that runs is still busy, as it says.
pub fn busy_seconds(run_dir: &Path) -> Option<u64> {
    let until: u64 = std::fs::read_to_string(run_dir.join(FILE)).ok()?.parse().ok()?;
    until.checked_sub(epoch_seconds()).filter(|left| *left > 0)
}

fn epoch_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_come_at_once_are_told_as_one() {
        let (mut lease, now) = (Lease::default(), Instant::now());
        assert_eq!(lease.due(now), None);
        lease.hold(10, now);
        assert_eq!((lease.due(now), lease.left(now)), (Some(now), 10));
        (lease.told_at, lease.is_news) = (Some(now), false);
        lease.hold(0, now);
        assert_eq!((lease.due(now), lease.left(now)), (Some(now + TELL_PAUSE), 0));
    }

    #[test]
    fn who_looks_sees_it_until_it_runs_out() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(busy_seconds(directory.path()), None);
        write(directory.path(), 100);
        assert!(busy_seconds(directory.path()).is_some_and(|left| (98..=100).contains(&left)));
        write(directory.path(), 0);
        assert_eq!(busy_seconds(directory.path()), None);
        std::fs::write(directory.path().join(FILE), "12").unwrap();
        assert_eq!(busy_seconds(directory.path()), None);
    }
}
