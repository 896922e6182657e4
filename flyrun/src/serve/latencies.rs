//! How long the requests of each app took lately. Told of each request: memory is taken with an app's first one alone.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The most requests that are known of an app, and for how long they are.
const MAX_REQUESTS: usize = 1000;
const WINDOW: Duration = Duration::from_secs(5 * 60);

/// The last requests of each app.
#[derive(Debug, Default)]
pub struct Latencies(Mutex<HashMap<Box<str>, VecDeque<Taken>>>);

/// When a request was over, and how long it took.
#[derive(Clone, Copy, Debug)]
struct Taken {
    at: Instant,
    took: Duration,
}

impl Latencies {
    /// A request is over.
    pub fn add(&self, app: &str, took: Duration, now: Instant) {
        let mut apps = self.lock();
        let taken = Taken { at: now, took };
        match apps.get_mut(app) {
            Some(last) => {
                if last.len() >= MAX_REQUESTS {
                    last.pop_front();
                }
                last.push_back(taken);
            }
            None => {
                let mut last = VecDeque::with_capacity(MAX_REQUESTS);
                last.push_back(taken);
                apps.insert(app.into(), last);
            }
        }
    }

    /// Forgets apps that are not served.
    pub fn keep(&self, is_served: impl Fn(&str) -> bool) {
        self.lock().retain(|app, _| is_served(app));
    }

    /// What the page shows of an app.
    pub fn of(&self, app: &str, now: Instant) -> page::Latencies {
        let mut times: Vec<Duration> = match self.lock().get_mut(app) {
            Some(last) => {
                last.retain(|taken| now.saturating_duration_since(taken.at) < WINDOW);
                last.iter().map(|taken| taken.took).collect()
            }
            None => Vec::new(),
        };
        times.sort_unstable();
        // The least time within which so many of a thousand were answered.
        let within = |per_mille: usize| {
            let index = (times.len() * per_mille).div_ceil(1000).checked_sub(1)?;
            Some((times.get(index)?.as_secs_f64() * 1_000_000.0).round() / 1000.0)
        };
        page::Latencies { p50: within(500), p99: within(990), p99_9: within(999), count: times.len() as u64 }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Box<str>, VecDeque<Taken>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn so_many_of_a_thousand_took_no_longer() {
        let (latencies, now) = (Latencies::default(), Instant::now());
        assert_eq!(latencies.of("web", now), page::Latencies::default());
        latencies.add("web", 7 * MS, now);
        let one = latencies.of("web", now);
        assert_eq!((one.p50, one.p99, one.p99_9, one.count), (Some(7.0), Some(7.0), Some(7.0), 1));
        for ms in (1..=1000).rev() {
            latencies.add("web", ms * MS, now);
        }
        let all = latencies.of("web", now);
        assert_eq!((all.p50, all.p99, all.p99_9, all.count), (Some(500.0), Some(990.0), Some(999.0), 1000));
    }

    #[test]
    fn what_is_old_and_what_is_not_served_is_forgotten() {
        let (latencies, start) = (Latencies::default(), Instant::now());
        latencies.add("web", MS, start);
        latencies.add("web", 2 * MS, start + WINDOW / 2);
        latencies.add("old", MS, start);
        assert_eq!(latencies.of("web", start + WINDOW).p50, Some(2.0));
        assert_eq!(latencies.of("web", start + 2 * WINDOW).count, 0);
        latencies.keep(|app| app == "web");
        assert_eq!(latencies.of("old", start).count, 0);
    }
}
