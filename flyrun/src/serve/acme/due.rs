//! When a certificate is ordered. Pure.

use std::time::{Duration, SystemTime};

use proxy::Facts;

/// Between orders that fail.
#[derive(Clone, Copy, Debug)]
pub struct Pauses {
    pub first: Duration,
    pub longest: Duration,
}

impl Default for Pauses {
    /// Let's Encrypt looks at a host name that cannot be proved five times an hour.
    fn default() -> Pauses {
        Pauses { first: Duration::from_secs(60), longest: Duration::from_secs(6 * 3600) }
    }
}

impl Pauses {
    /// After so many failures in a row: each three times the one before.
    pub fn after(&self, failures: u32) -> Duration {
        let times = 3_u32.saturating_pow(failures.saturating_sub(1));
        self.first.saturating_mul(times).min(self.longest)
    }
}

/// Orders that have failed in a row.
#[derive(Clone, Copy, Debug, Default)]
pub struct Failed {
    pub count: u32,
    /// The last one.
    at: Option<SystemTime>,
}

impl Failed {
    pub fn again(self, now: SystemTime) -> Failed {
        Failed { count: self.count.saturating_add(1), at: Some(now) }
    }
}

/// Whether a certificate has all these names, which are in lower case.
pub fn fits(facts: &Facts, names: &[String]) -> bool {
    names.iter().all(|name| facts.names.contains(name))
}

/// When one is to be ordered: at once where none fits, else when two thirds of its time are over; and not too soon after a failure.
pub fn due(there: Option<&Facts>, names: &[String], failed: Failed, pauses: &Pauses) -> SystemTime {
    let wanted = match there {
        Some(facts) if fits(facts, names) => {
            let lifetime = facts.not_after.duration_since(facts.not_before).unwrap_or_default();
            facts.not_before.checked_add(lifetime / 3 * 2).unwrap_or(facts.not_before)
        }
        _ => SystemTime::UNIX_EPOCH,
    };
    let may = failed.at.and_then(|at| at.checked_add(pauses.after(failed.count)));
    may.map_or(wanted, |may| may.max(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: u64 = 86_400;

    fn at(days: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(days * DAY)
    }

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|name| name.to_string()).collect()
    }

    fn facts(list: &[&str]) -> Facts {
        Facts { names: names(list), not_before: at(1000), not_after: at(1090) }
    }

    #[test]
    fn one_that_fits_is_renewed_when_two_thirds_of_its_time_are_over() {
        let due = |there: Option<&Facts>, list: &[&str]| {
            due(there, &names(list), Failed::default(), &Pauses::default())
        };
        let both = facts(&["a.test", "b.test"]);
        assert_eq!(due(Some(&both), &["b.test", "a.test"]), at(1060));
        assert_eq!(due(Some(&both), &["a.test"]), at(1060), "a name too many does no harm");
        assert_eq!(due(Some(&both), &["a.test", "c.test"]), at(0));
        assert_eq!(due(None, &["a.test"]), at(0));
        let backwards = Facts { not_after: at(900), ..both };
        assert_eq!(due(Some(&backwards), &["a.test"]), at(1000));
    }

    #[test]
    fn what_fails_is_tried_again_after_longer_and_longer_pauses() {
        let pauses = Pauses::default();
        let minutes: Vec<_> = (1..8).map(|count| pauses.after(count).as_secs() / 60).collect();
        assert_eq!(minutes, [1, 3, 9, 27, 81, 243, 360]);
        assert_eq!(pauses.after(u32::MAX), pauses.longest);
        let failed = Failed::default().again(at(1)).again(at(2000));
        let next = due(None, &names(&["a.test"]), failed, &pauses);
        assert_eq!(next.duration_since(at(2000)).unwrap(), Duration::from_secs(180));
        // A renewal that failed early is not tried before the time.
        assert_eq!(
            due(Some(&facts(&["a.test"])), &names(&["a.test"]), Failed::default().again(at(1)), &pauses),
            at(1060)
        );
    }
}
