//! How often a guest may have a thread of the host do something for it. Such threads are in no cgroup of a machine without limits, and
//! of others not before they run for a while: what they spend is nobody's share then, and a guest that owns its kernel can ask without a
//! pause.

use std::time::{Duration, Instant};

/// So many at once, and then one in each span of time; whoever asks for more waits.
#[derive(Clone, Debug)]
pub struct Pace {
    each: Duration,
    burst: Duration,
    /// When all that was done would be paid for.
    paid_at: Instant,
}

impl Pace {
    /// `per_second` things in the long run, which is at least one, and `burst` of them at once.
    pub fn new(per_second: u32, burst: u32, now: Instant) -> Pace {
        let each = Duration::from_secs(1) / per_second.max(1);
        Pace { each, burst: each.saturating_mul(burst), paid_at: now }
    }

    /// Counts one more, and says how long to wait before it is done.
    pub fn delay(&mut self, now: Instant) -> Duration {
        self.paid_at = self.paid_at.max(now) + self.each;
        self.paid_at.saturating_duration_since(now).saturating_sub(self.burst)
    }

    /// The same, and waits.
    pub fn wait(&mut self) {
        let delay = self.delay(Instant::now());
        if !delay.is_zero() {
            std::thread::sleep(delay);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_waits_for_nothing_and_what_comes_behind_it_for_its_turn() {
        let start = Instant::now();
        let mut pace = Pace::new(100, 3, start);
        let delays: Vec<_> = (0..5).map(|_| pace.delay(start).as_millis()).collect();
        assert_eq!(delays, [0, 0, 0, 10, 20]);
        // After a pause it may have a burst again, and no more than that.
        let later = start + Duration::from_secs(60);
        let delays: Vec<_> = (0..4).map(|_| pace.delay(later).as_millis()).collect();
        assert_eq!(delays, [0, 0, 0, 10]);
    }

    #[test]
    fn whoever_keeps_the_pace_never_waits() {
        let start = Instant::now();
        let mut pace = Pace::new(100, 1, start);
        let waits = |pace: &mut Pace, n: u64| pace.delay(start + Duration::from_millis(10 * n));
        assert!((0..1000).all(|n| waits(&mut pace, n).is_zero()));
    }
}
