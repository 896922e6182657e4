//! What intervals add up to.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Interval, Phase};

/// What one machine has used. The fields of `flyrun usage --json`; their names are stable.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Total {
    pub id: String,
    /// The last that it had in this time.
    pub name: String,
    /// Seconds that it ran.
    pub started_s: f64,
    /// Seconds that it was suspended.
    pub suspended_s: f64,
    /// The same, times the CPUs it might use.
    pub vcpu_s: f64,
    /// The same, times its MiB of memory.
    pub memory_mib_s: f64,
    /// Seconds of the host's CPU that it used.
    pub cpu_s: f64,
    /// Bytes received and sent.
    pub net_in: u64,
    pub net_out: u64,
}

/// Adds up what each machine used in this time, in the order of their first intervals. Of an interval that is only in part
/// within it, everything counts by its share.
pub fn totals(mut intervals: Vec<Interval>, since_ms: u64, until_ms: u64) -> Vec<Total> {
    intervals.sort_by_key(|interval| interval.from_ms);
    let mut order = Vec::new();
    let mut totals: BTreeMap<String, Total> = BTreeMap::new();
    for interval in intervals {
        let total = totals.entry(interval.machine.clone()).or_insert_with(|| {
            order.push(interval.machine.clone());
            Total { id: interval.machine.clone(), ..Total::default() }
        });
        total.add(&interval, since_ms, until_ms);
    }
    order.into_iter().filter_map(|id| totals.remove(&id)).collect()
}

impl Total {
    fn add(&mut self, interval: &Interval, since_ms: u64, until_ms: u64) {
        let whole = interval.to_ms.saturating_sub(interval.from_ms);
        let within = interval.to_ms.min(until_ms).saturating_sub(interval.from_ms.max(since_ms));
        let share = if whole == 0 { 1.0 } else { within as f64 / whole as f64 };
        let seconds = within.min(whole) as f64 / 1000.0;
        let part = |count: u64| (count as f64 * share).round() as u64;
        self.name.clone_from(&interval.name);
        if interval.phase == Phase::Suspended {
            self.suspended_s += seconds;
            return;
        }
        self.started_s += seconds;
        self.vcpu_s += seconds * f64::from(interval.cpu_milli) / 1000.0;
        self.memory_mib_s += seconds * interval.memory.to_mib() as f64;
        self.cpu_s += interval.taken.cpu_usec as f64 * share / 1e6;
        self.net_in += part(interval.taken.net_in);
        self.net_out += part(interval.taken.net_out);
    }

    /// The sum of all.
    pub fn sum(totals: &[Total]) -> Total {
        totals.iter().fold(Total { name: "total".into(), ..Total::default() }, |sum, one| Total {
            started_s: sum.started_s + one.started_s,
            suspended_s: sum.suspended_s + one.suspended_s,
            vcpu_s: sum.vcpu_s + one.vcpu_s,
            memory_mib_s: sum.memory_mib_s + one.memory_mib_s,
            cpu_s: sum.cpu_s + one.cpu_s,
            net_in: sum.net_in + one.net_in,
            net_out: sum.net_out + one.net_out,
            ..sum
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_count_with_what_the_machine_had() {
        let intervals = vec![
            Interval::example("b2", 5_000, 6_000),
            Interval::example("a1", 1_000, 3_000),
            Interval::example("a1", 3_000, 4_000),
        ];
        let totals = totals(intervals, 0, u64::MAX);
        assert_eq!(totals.iter().map(|total| total.id.as_str()).collect::<Vec<_>>(), ["a1", "b2"]);
        assert_eq!((totals[0].started_s, totals[0].vcpu_s, totals[0].memory_mib_s), (3.0, 4.5, 768.0));
        assert_eq!((totals[0].net_in, totals[1].net_out), (2000, 1000));
        assert_eq!(Total::sum(&totals).started_s, 4.0);
    }

    #[test]
    fn of_a_part_its_share_counts() {
        let one = |since, until| totals(vec![Interval::example("a1", 1_000, 5_000)], since, until).remove(0);
        assert_eq!((one(2_000, 3_000).started_s, one(2_000, 3_000).net_in), (1.0, 250));
        assert_eq!((one(4_000, u64::MAX).started_s, one(0, 2_000).net_in), (1.0, 250));
        assert_eq!(one(5_000, u64::MAX).started_s, 0.0);
    }

    #[test]
    fn an_interval_without_length_has_still_taken_something() {
        let total = totals(vec![Interval::example("a1", 7, 7)], 0, u64::MAX).remove(0);
        assert_eq!((total.started_s, total.net_in), (0.0, 1000));
    }
}
