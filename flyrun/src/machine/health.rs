//! Health checks: what is asked of a machine and how often, and what follows from the answers. docker's rules. Pure.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How many of the last checks are kept, and how much each said, in bytes. docker's numbers.
const KEPT_CHECKS: usize = 5;
pub const KEPT_OUTPUT: usize = 4096;

/// What tells whether a machine does its work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Healthcheck {
    pub test: Test,
    /// The first check comes so long after the start, each further one so long after the one before.
    pub interval_ms: u64,
    /// A check that takes longer has failed.
    pub timeout_ms: u64,
    /// After the start failures do not count for so long, until the first success.
    pub start_period_ms: u64,
    /// Takes the interval's place during that time.
    pub start_interval_ms: u64,
    /// So many failures in a row make the machine unhealthy.
    pub retries: u32,
}

/// What is done to find out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Test {
    /// A command in the machine, which is to end with 0.
    Command(Vec<String>),
    /// A GET from the host, which is to be answered with 2xx.
    Http(HttpTest),
}

/// `--health-http`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpTest {
    pub port: u16,
    /// Begins with a slash.
    pub path: String,
}

impl std::str::FromStr for HttpTest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (port, path) = match text.find('/') {
            Some(at) => text.split_at(at),
            None => (text, "/"),
        };
        let port = if port.is_empty() { Some(80) } else { port.parse().ok().filter(|port| *port > 0) };
        // What follows is a request line, so nothing may end it.
        match port.filter(|_| path.chars().all(|c| c.is_ascii_graphic())) {
            Some(port) => Ok(HttpTest { port, path: path.to_string() }),
            None => Err("write [PORT][/PATH], such as 8080/healthz".to_string()),
        }
    }
}

impl Healthcheck {
    /// docker's defaults.
    pub fn new(test: Test) -> Healthcheck {
        Healthcheck {
            test,
            interval_ms: 30_000,
            timeout_ms: 30_000,
            start_period_ms: 0,
            start_interval_ms: 5_000,
            retries: 3,
        }
    }

    pub fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }

    /// How long to wait for the next check.
    pub fn pause(&self, status: Status, since_start: Duration) -> Duration {
        let starting = status == Status::Starting && self.is_start_period(since_start);
        let interval = if starting { self.start_interval_ms } else { self.interval_ms };
        Duration::from_millis(interval)
    }

    fn is_start_period(&self, since_start: Duration) -> bool {
        since_start < Duration::from_millis(self.start_period_ms)
    }
}

/// What is known of a machine's health since its start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    pub status: Status,
    /// Failures since the last success.
    pub failing_streak: u32,
    /// The last checks, the newest last.
    pub checks: Vec<Check>,
}

/// What the checks say as a whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    #[default]
    Starting,
    Healthy,
    Unhealthy,
}

impl Status {
    pub const ALL: [Status; 3] = [Status::Starting, Status::Healthy, Status::Unhealthy];
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Status::Starting => "starting",
            Status::Healthy => "healthy",
            Status::Unhealthy => "unhealthy",
        })
    }
}

/// One check that was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// Milliseconds since the epoch.
    pub started_at_ms: u64,
    pub took_ms: u64,
    pub passed: bool,
    /// What the command ended with, or the HTTP status; none if there was no answer.
    pub code: Option<u16>,
    /// The beginning of what was said.
    pub output: String,
}

impl Health {
    /// Takes a check into account that was made so long after the start.
    pub fn learn(&mut self, check: Check, config: &Healthcheck, since_start: Duration) {
        if check.passed {
            self.failing_streak = 0;
            self.status = Status::Healthy;
        } else if self.status != Status::Starting || !config.is_start_period(since_start) {
            self.failing_streak = self.failing_streak.saturating_add(1);
            if self.failing_streak >= config.retries {
                self.status = Status::Unhealthy;
            }
        }
        self.checks.push(check);
        let surplus = self.checks.len().saturating_sub(KEPT_CHECKS);
        self.checks.drain(..surplus);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Healthcheck {
        Healthcheck { start_period_ms: 60_000, ..Healthcheck::new(Test::Command(vec!["true".into()])) }
    }

    fn check(passed: bool) -> Check {
        Check { started_at_ms: 1, took_ms: 2, passed, code: Some(0), output: String::new() }
    }

    /// What a series of checks, one a minute from `first` seconds on, makes of a machine.
    fn after(first: u64, passed: &[bool]) -> Health {
        let mut health = Health::default();
        for (&passed, at) in passed.iter().zip((first..).step_by(60)) {
            health.learn(check(passed), &config(), Duration::from_secs(at));
        }
        health
    }

    #[test]
    fn failures_in_a_row_make_unhealthy_and_one_success_heals() {
        assert_eq!(after(100, &[]).status, Status::Starting);
        assert_eq!(after(100, &[false, false]).status, Status::Starting);
        assert_eq!(after(100, &[false, false, false]).status, Status::Unhealthy);
        assert_eq!(after(100, &[true, false, false]).status, Status::Healthy);
        assert_eq!(after(100, &[true, false, false, false]).status, Status::Unhealthy);
        assert_eq!(after(100, &[false, false, false, true]).status, Status::Healthy);
        assert_eq!(after(100, &[false, true, false]).failing_streak, 1);
    }

    #[test]
    fn failures_of_the_start_do_not_count_until_the_first_success() {
        let mut health = Health::default();
        for at in 0..59 {
            health.learn(check(false), &config(), Duration::from_secs(at));
        }
        assert_eq!((health.status, health.failing_streak), (Status::Starting, 0));
        health.learn(check(true), &config(), Duration::from_secs(59));
        for _ in 0..3 {
            health.learn(check(false), &config(), Duration::from_secs(59));
        }
        assert_eq!(health.status, Status::Unhealthy);
    }

    #[test]
    fn the_start_has_an_interval_of_its_own() {
        let second = Duration::from_secs;
        assert_eq!(config().pause(Status::Starting, second(59)), second(5));
        assert_eq!(config().pause(Status::Starting, second(60)), second(30));
        assert_eq!(config().pause(Status::Healthy, second(1)), second(30));
    }

    #[test]
    fn the_last_five_are_kept() {
        assert_eq!(after(0, &[true; 9]).checks.len(), KEPT_CHECKS);
    }

    #[test]
    fn an_http_test_is_a_port_and_a_path() {
        let test = |text: &str| text.parse::<HttpTest>().map(|test| (test.port, test.path));
        assert_eq!(test("8080/healthz?full=1"), Ok((8080, "/healthz?full=1".into())));
        assert_eq!(test("/up"), Ok((80, "/up".into())));
        assert_eq!(test("8080"), Ok((8080, "/".into())));
        for bad in ["0/", "x", "70000/", "80/a b", "80/a\r\nHost: b", "http://web/"] {
            assert!(test(bad).is_err(), "{bad}");
        }
    }
}
