//! How quickly bytes come. A registry that sends one now and then is never silent, and never done.

use std::time::{Duration, Instant};

/// Counts what comes in spans of time.
pub(super) struct Pace {
    span: Duration,
    /// What has to come in each.
    least: u64,
    since: Instant,
    bytes: u64,
}

impl Pace {
    /// So many bytes per second at least, on an average over each `span`.
    pub(super) fn new(span: Duration, bytes_per_second: u64, now: Instant) -> Self {
        let least = u128::from(bytes_per_second).saturating_mul(span.as_millis()) / 1000;
        Self { span, least: u64::try_from(least).unwrap_or(u64::MAX), since: now, bytes: 0 }
    }

    /// Counts what has come. Whether it comes quickly enough.
    pub(super) fn holds(&mut self, bytes: u64, now: Instant) -> bool {
        self.bytes = self.bytes.saturating_add(bytes);
        if now.saturating_duration_since(self.since) < self.span {
            return true;
        }
        let holds = self.bytes >= self.least;
        (self.since, self.bytes) = (now, 0);
        holds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drip_is_found_after_one_span_and_a_pause_within_one_is_not() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut pace = Pace::new(Duration::from_secs(30), 1000, start);
        assert!((0..30).all(|second| pace.holds(1, at(second))));
        assert!(!pace.holds(1, at(30)));
        assert!(pace.holds(30_000, at(31)));
        assert!(pace.holds(0, at(60)), "it had all of it at once");
        assert!(!pace.holds(29_999, at(90)));
        let mut any = Pace::new(Duration::from_secs(30), 0, start);
        assert!(any.holds(0, at(30)), "a rate of 0 asks for nothing");
    }
}
