//! How much may pass in how much time: token buckets. Pure; the time is the caller's, in nanoseconds of any clock.
//!
//! A request passes while nothing is owed, and is then charged in full. So no request is too large to pass, whatever the
//! rate; the next one waits for what this one owes. When a request begins, no more than rate × time + burst has passed.

use std::num::NonZeroU64;

/// What may pass in a second; what is `None` is not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rate {
    /// Bytes per second.
    pub bytes: Option<NonZeroU64>,
    /// Requests, or packets, per second.
    pub operations: Option<NonZeroU64>,
}

/// A bucket holds a tenth of a second's tokens: what an idle guest may have at once, and how late a timer may be without
/// a loss.
const BURSTS_PER_SECOND: u64 = 10;
/// Levels are counted in billionths of a token, so that a nanosecond at any rate is a whole number of them.
const TOKEN: i128 = 1_000_000_000;

/// Tokens that come at a steady rate and are kept up to a burst.
#[derive(Clone, Debug)]
struct Bucket {
    /// Tokens per second, which are billionths of one per nanosecond.
    rate: u64,
    /// In billionths of a token; below zero it is what is owed.
    level: i128,
    full: i128,
    seen_ns: u64,
}

impl Bucket {
    fn new(rate: NonZeroU64) -> Self {
        let full = i128::from(burst(rate)) * TOKEN;
        Bucket { rate: rate.get(), level: full, full, seen_ns: 0 }
    }

    /// Nanoseconds until there is a token; 0 when there is one.
    fn wait_ns(&mut self, now_ns: u64) -> u64 {
        let come = i128::from(now_ns.saturating_sub(self.seen_ns)).saturating_mul(self.rate.into());
        self.level = self.level.saturating_add(come).min(self.full);
        self.seen_ns = self.seen_ns.max(now_ns);
        let missing = u128::try_from(TOKEN - self.level).unwrap_or(0);
        u64::try_from(missing.div_ceil(self.rate.into())).unwrap_or(u64::MAX)
    }

    fn charge(&mut self, tokens: u64) {
        self.level = self.level.saturating_sub(i128::from(tokens) * TOKEN);
    }
}

/// The most tokens that a bucket of this rate holds, at least one.
pub fn burst(rate: NonZeroU64) -> u64 {
    (rate.get() / BURSTS_PER_SECOND).max(1)
}

/// Holds requests to a [`Rate`].
#[derive(Clone, Debug)]
pub struct Limiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
}

impl Limiter {
    /// One with full buckets.
    pub fn new(rate: Rate) -> Self {
        Limiter { bytes: rate.bytes.map(Bucket::new), operations: rate.operations.map(Bucket::new) }
    }

    /// Nanoseconds from `now_ns` until the next request may pass; 0 when it may now.
    pub fn wait_ns(&mut self, now_ns: u64) -> u64 {
        let buckets = self.bytes.iter_mut().chain(&mut self.operations);
        buckets.map(|bucket| bucket.wait_ns(now_ns)).max().unwrap_or(0)
    }

    /// Counts a request of so many bytes, which has passed.
    pub fn charge(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.charge(bytes);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.charge(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND_NS: u64 = 1_000_000_000;

    fn rate(bytes: u64, operations: u64) -> Rate {
        Rate { bytes: NonZeroU64::new(bytes), operations: NonZeroU64::new(operations) }
    }

    /// rate × time + burst, in billionths.
    fn allowance(per_second: u64, time_ns: u64) -> u128 {
        let burst = burst(NonZeroU64::new(per_second).unwrap());
        u128::from(per_second) * u128::from(time_ns) + u128::from(burst) * TOKEN as u128
    }

    #[test]
    fn a_request_larger_than_the_bucket_passes_and_the_next_waits_for_its_debt() {
        let mut limiter = Limiter::new(rate(1000, 0));
        assert_eq!(limiter.wait_ns(5), 0);
        limiter.charge(10_000);
        // 9900 are owed, and one more must be there.
        assert_eq!(limiter.wait_ns(5), 9_901 * SECOND_NS / 1000);
        assert_eq!(limiter.wait_ns(5 + 9_901 * SECOND_NS / 1000), 0);
    }

    #[test]
    fn the_scarcer_of_the_two_decides_and_flushes_cost_no_bytes() {
        let mut limiter = Limiter::new(rate(1_000_000, 10));
        limiter.charge(0);
        assert_eq!(limiter.wait_ns(0), SECOND_NS / 10);
        let mut limiter = Limiter::new(rate(1000, 0));
        for _ in 0..1000 {
            assert_eq!(limiter.wait_ns(0), 0);
            limiter.charge(0);
        }
    }

    #[test]
    fn what_is_not_limited_never_waits() {
        let mut limiter = Limiter::new(Rate::default());
        limiter.charge(u64::MAX);
        assert_eq!(limiter.wait_ns(0), 0);
    }

    proptest! {
        /// At any moment, what passed before the request that begins is within rate × time + burst.
        #[test]
        fn no_more_than_rate_times_time_and_a_burst_passes(
            bytes in 1u64..1 << 40,
            operations in 1u64..1 << 20,
            requests in prop::collection::vec((0u64..SECOND_NS, 0u64..1 << 24), 1..200),
        ) {
            let mut limiter = Limiter::new(rate(bytes, operations));
            let (mut now, mut passed_bytes, mut passed) = (0, 0u128, 0u128);
            for (gap, size) in requests {
                now += gap;
                if limiter.wait_ns(now) > 0 {
                    continue;
                }
                prop_assert!(passed_bytes * TOKEN as u128 <= allowance(bytes, now));
                limiter.charge(size);
                passed_bytes += u128::from(size);
                passed += 1;
                prop_assert!(passed * TOKEN as u128 <= allowance(operations, now));
            }
        }

        /// Who comes back when told passes then, and not a nanosecond before; nothing of the rate is lost by waiting.
        #[test]
        fn waiting_as_long_as_told_is_enough_and_not_too_much(
            bytes in 1u64..1 << 40,
            sizes in prop::collection::vec(1u64..1 << 24, 1..50),
        ) {
            let mut limiter = Limiter::new(rate(bytes, 0));
            let (mut now, mut passed) = (0u64, 0u128);
            for size in sizes {
                let wait = limiter.wait_ns(now);
                if wait > 0 {
                    prop_assert!(limiter.clone().wait_ns(now + wait - 1) > 0);
                    now += wait;
                    prop_assert_eq!(limiter.wait_ns(now), 0);
                    prop_assert!((passed + 2) * TOKEN as u128 + u128::from(bytes) >= allowance(bytes, now));
                }
                limiter.charge(size);
                passed += u128::from(size);
            }
        }

        #[test]
        fn no_number_is_too_large_and_a_clock_may_stand_or_go_back(
            bytes in prop::sample::select(vec![1, u64::MAX]),
            steps in prop::collection::vec((any::<u64>(), prop::sample::select(vec![0, 1, u64::MAX])), 1..50),
        ) {
            let mut limiter = Limiter::new(rate(bytes, bytes));
            for (now, size) in steps {
                limiter.wait_ns(now);
                limiter.charge(size);
            }
        }
    }
}
