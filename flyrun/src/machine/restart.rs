//! Whether and when a machine that has ended starts again: docker's policies. Pure.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The first pause before a restart; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// After a life of this length the pauses begin anew.
const STABLE: Duration = Duration::from_secs(10);

/// `--restart`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    #[default]
    No,
    /// When its exit code is not 0 or it failed; at most so often, however long it ran each time.
    OnFailure(Option<u32>),
    Always,
    UnlessStopped,
}

/// What is not a restart policy.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("'{0}' is not a restart policy: write no, on-failure, on-failure:N, always or unless-stopped")]
pub struct NotAPolicy(String);

impl FromStr for RestartPolicy {
    type Err = NotAPolicy;

    fn from_str(text: &str) -> Result<Self, NotAPolicy> {
        match text {
            "no" => Ok(RestartPolicy::No),
            "on-failure" => Ok(RestartPolicy::OnFailure(None)),
            "always" => Ok(RestartPolicy::Always),
            "unless-stopped" => Ok(RestartPolicy::UnlessStopped),
            _ => match text.strip_prefix("on-failure:").map(str::parse) {
                Some(Ok(0)) => Ok(RestartPolicy::OnFailure(None)),
                Some(Ok(most)) => Ok(RestartPolicy::OnFailure(Some(most))),
                _ => Err(NotAPolicy(text.to_string())),
            },
        }
    }
}

impl fmt::Display for RestartPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RestartPolicy::No => f.write_str("no"),
            RestartPolicy::OnFailure(None) => f.write_str("on-failure"),
            RestartPolicy::OnFailure(Some(most)) => write!(f, "on-failure:{most}"),
            RestartPolicy::Always => f.write_str("always"),
            RestartPolicy::UnlessStopped => f.write_str("unless-stopped"),
        }
    }
}

/// One life of a machine, as its policy sees it.
#[derive(Clone, Copy, Debug)]
pub struct Life {
    pub succeeded: bool,
    /// The user stopped it.
    pub stopped: bool,
    pub lasted: Duration,
}

/// Remembers the lives of one machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Restarts {
    /// Restarts since the user's start.
    all: u32,
    /// Restarts in a row since the last stable life.
    in_a_row: u32,
}

impl Restarts {
    /// How long to pause before the next life; `None` if there is none.
    pub fn after(&mut self, policy: RestartPolicy, life: Life) -> Option<Duration> {
        if life.lasted >= STABLE {
            self.in_a_row = 0;
        }
        let wanted = match policy {
            _ if life.stopped => false,
            RestartPolicy::No => false,
            RestartPolicy::OnFailure(most) => !life.succeeded && most.is_none_or(|most| self.all < most),
            RestartPolicy::Always | RestartPolicy::UnlessStopped => true,
        };
        if !wanted {
            return None;
        }
        let pause = FIRST_PAUSE.saturating_mul(1 << self.in_a_row.min(20)).min(LONGEST_PAUSE);
        self.in_a_row += 1;
        self.all += 1;
        Some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn life(succeeded: bool) -> Life {
        Life { succeeded, stopped: false, lasted: Duration::from_secs(1) }
    }

    #[test]
    fn policies_are_written_as_docker_does() {
        for text in ["no", "on-failure", "on-failure:3", "always", "unless-stopped"] {
            assert_eq!(text.parse::<RestartPolicy>().unwrap().to_string(), text);
        }
        for text in ["", "yes", "on-failure:", "on-failure:x", "always:2", "on-failure:-1"] {
            assert!(text.parse::<RestartPolicy>().is_err(), "{text}");
        }
    }

    #[test]
    fn pauses_grow_to_a_minute_and_begin_anew_after_a_stable_life() {
        let mut restarts = Restarts::default();
        let pauses: Vec<_> =
            (0..12).map(|_| restarts.after(RestartPolicy::Always, life(true)).unwrap().as_millis()).collect();
        assert_eq!(pauses[..4], [100, 200, 400, 800]);
        assert_eq!(pauses[11], 60_000);
        let stable = Life { lasted: STABLE, ..life(true) };
        assert_eq!(restarts.after(RestartPolicy::Always, stable), Some(FIRST_PAUSE));
    }

    #[test]
    fn on_failure_counts_and_leaves_success_alone() {
        let mut restarts = Restarts::default();
        let policy = RestartPolicy::OnFailure(Some(2));
        assert!(restarts.after(policy, life(true)).is_none());
        assert!(restarts.after(policy, life(false)).is_some());
        let stable = Life { lasted: STABLE, ..life(false) };
        assert_eq!(restarts.after(policy, stable), Some(FIRST_PAUSE));
        assert!(restarts.after(policy, life(false)).is_none());
    }

    #[test]
    fn whoever_stops_a_machine_means_it() {
        let stopped = Life { stopped: true, ..life(false) };
        for policy in [RestartPolicy::Always, RestartPolicy::UnlessStopped, RestartPolicy::OnFailure(None)] {
            assert!(Restarts::default().after(policy, stopped).is_none());
        }
    }
}
