//! Pauses between starts that fail. They are a group's: what keeps one machine from starting is mostly its image.

use std::time::Duration;

use super::{Life, Moment};

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// A machine that had done its work and died starts again in no time: requests wait for a pause as short as this.
const SHORT_PAUSE: Duration = Duration::from_secs(1);

/// The failures since a machine last did its work.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Backoff {
    last: Option<Failure>,
}

#[derive(Clone, Copy, Debug)]
struct Failure {
    life: Life,
    /// How many there were in a row, this one included.
    count: u32,
    at: Moment,
    due: Moment,
    /// It never was ready.
    is_boot: bool,
}

impl Backoff {
    /// A start has failed.
    pub fn failed(&mut self, now: Moment, life: Life) {
        self.add(now, life, true);
    }

    /// A machine that was ready has ended before its time.
    pub fn died(&mut self, now: Moment, life: Life) {
        self.add(now, life, false);
    }

    fn add(&mut self, now: Moment, life: Life, is_boot: bool) {
        let forgotten = |last: &Failure| now.saturating_sub(last.at) > LONGEST_PAUSE * 2;
        let before = self.last.filter(|last| !forgotten(last)).map_or(0, |last| last.count);
        let pause = FIRST_PAUSE.saturating_mul(1 << before.min(20)).min(LONGEST_PAUSE);
        let count = before.saturating_add(1);
        self.last = Some(Failure { life, count, at: now, due: now.saturating_add(pause), is_boot });
    }

    /// A machine has started: others may too. Whether it lasts is not known yet, so that failures still count.
    pub fn lift(&mut self) {
        if let Some(last) = &mut self.last {
            last.due = Moment::ZERO;
        }
    }

    pub fn succeeded(&mut self) {
        self.last = None;
    }

    /// When the next start may be.
    pub fn due(&self) -> Moment {
        self.last.map_or(Moment::ZERO, |last| last.due)
    }

    /// Whether the pause is one to wait for.
    pub fn is_short(&self) -> bool {
        self.last.is_some_and(|last| !last.is_boot && last.due.saturating_sub(last.at) <= SHORT_PAUSE)
    }

    /// The failure that forbids a start now.
    pub fn forbids(&self, now: Moment) -> Option<Life> {
        self.last.filter(|last| now < last.due).map(|last| last.life)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_to_a_minute_and_end_with_a_success() {
        let (mut backoff, life) = (Backoff::default(), Life { slot: 0, number: 1 });
        let mut now = Duration::ZERO;
        let mut pauses = Vec::new();
        for _ in 0..12 {
            backoff.failed(now, life);
            pauses.push((backoff.due() - now).as_millis());
            now = backoff.due();
        }
        assert_eq!(pauses[..3], [100, 200, 400]);
        assert_eq!(pauses[11], 60_000);
        assert_eq!(backoff.forbids(now), None, "what is due may start");
        backoff.failed(now, life);
        assert_eq!(backoff.forbids(now), Some(life));
        backoff.succeeded();
        assert_eq!(backoff.forbids(now), None);
    }

    #[test]
    fn a_start_between_failures_counts_for_little_and_time_for_much() {
        let (mut backoff, life) = (Backoff::default(), Life { slot: 0, number: 1 });
        let pause = |backoff: &Backoff, now| (backoff.due() - now).as_millis();
        for wanted in [100, 200, 400] {
            backoff.failed(Duration::ZERO, life);
            assert_eq!(pause(&backoff, Duration::ZERO), wanted);
            backoff.lift();
            assert_eq!(backoff.forbids(Duration::ZERO), None);
        }
        let later = Duration::from_secs(1000);
        backoff.failed(later, life);
        assert_eq!(pause(&backoff, later), 100);
    }
}
