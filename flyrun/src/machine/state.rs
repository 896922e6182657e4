//! The states of a machine, and what may be asked of it in each: pure, so that every refusal is tested.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where in its life a machine is. The words are Fly's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It has a configuration and a disk, and has never run.
    Created,
    /// Its virtual machine boots, or waits for its next attempt.
    Starting,
    /// Its process runs.
    Started,
    /// Its virtual machine stands still, with all it has in memory.
    Paused,
    /// It is being brought to disk.
    Suspending,
    /// All it has in memory is on disk, and nothing of it runs.
    Suspended,
    /// Its process was asked to end.
    Stopping,
    /// Its process has ended.
    Stopped,
    /// It could not be started, or its virtual machine or its monitor failed.
    Failed,
    /// It is being removed; whoever finds it so finishes that.
    Destroying,
}

/// What a user may ask of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Start,
    Stop,
    /// Send a signal to its process.
    Signal,
    Remove,
    /// Remove it even if it runs.
    RemoveByForce,
    /// Follow its streams.
    Attach,
    /// Run a command beside its process.
    Exec,
    /// Let its virtual machine stand still.
    Pause,
    /// Let it run on.
    Unpause,
    /// Bring all it has in memory to disk, and end its virtual machine.
    Suspend,
    /// Undo either.
    Resume,
}

/// What is to be done about a request that is not refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Do it.
    Go,
    /// It is already so.
    Already,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    state: State,
    action: Action,
}

impl State {
    pub const ALL: [State; 10] = [
        State::Created,
        State::Starting,
        State::Started,
        State::Paused,
        State::Suspending,
        State::Suspended,
        State::Stopping,
        State::Stopped,
        State::Failed,
        State::Destroying,
    ];

    /// Whether a monitor must be alive for this to be true.
    pub fn needs_monitor(self) -> bool {
        use State as S;
        matches!(self, S::Starting | S::Started | S::Paused | S::Suspending | S::Stopping)
    }

    /// What a request means in this state.
    ///
    /// # Errors
    /// The request makes no sense in it.
    pub fn decide(self, action: Action) -> Result<Verdict, Refusal> {
        use Action as A;
        use State as S;
        match (action, self) {
            (A::RemoveByForce, _) => Ok(Verdict::Go),
            (_, S::Destroying) => Err(Refusal { state: self, action }),
            (A::Start, S::Created | S::Suspended | S::Stopped | S::Failed) => Ok(Verdict::Go),
            (A::Start | A::Resume, S::Starting | S::Started) => Ok(Verdict::Already),
            (A::Pause, S::Paused) | (A::Unpause, S::Started) => Ok(Verdict::Already),
            (A::Pause, S::Started) | (A::Unpause | A::Resume, S::Paused) => Ok(Verdict::Go),
            (A::Suspend, S::Started | S::Suspending) => Ok(Verdict::Go),
            (A::Suspend, S::Suspended) => Ok(Verdict::Already),
            (A::Start | A::Resume, S::Suspending) | (A::Resume, S::Suspended) => Ok(Verdict::Go),
            (A::Stop, S::Starting | S::Started | S::Paused | S::Stopping) => Ok(Verdict::Go),
            (A::Stop, S::Suspending | S::Suspended) => Ok(Verdict::Go),
            (A::Stop, S::Created | S::Stopped | S::Failed) => Ok(Verdict::Already),
            (A::Remove, S::Created | S::Stopped | S::Failed) => Ok(Verdict::Go),
            (A::Signal | A::Exec | A::Attach, S::Started | S::Stopping) => Ok(Verdict::Go),
            (A::Attach, S::Starting | S::Paused) => Ok(Verdict::Go),
            _ => Err(Refusal { state: self, action }),
        }
    }

    /// Whether a machine may go from this state to that one.
    pub fn may_become(self, next: State) -> bool {
        use State as S;
        match self {
            S::Created => matches!(next, S::Starting | S::Destroying),
            // A resume that could not begin leaves the snapshot as it was.
            S::Starting => !matches!(next, S::Created | S::Starting | S::Paused | S::Suspending),
            // A resume that got no further than that leaves the snapshot as it was.
            S::Started => next != S::Created,
            S::Paused => !matches!(next, S::Created | S::Suspended),
            S::Suspending => !matches!(next, S::Created | S::Paused),
            S::Suspended => matches!(next, S::Starting | S::Stopped | S::Failed | S::Destroying),
            S::Stopping => !matches!(next, S::Created | S::Paused | S::Suspending | S::Suspended),
            S::Stopped | S::Failed => matches!(next, S::Starting | S::Failed | S::Destroying),
            S::Destroying => next == S::Destroying,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            State::Created => "created",
            State::Starting => "starting",
            State::Started => "started",
            State::Paused => "paused",
            State::Suspending => "suspending",
            State::Suspended => "suspended",
            State::Stopping => "stopping",
            State::Stopped => "stopped",
            State::Failed => "failed",
            State::Destroying => "destroying",
        })
    }
}

impl Refusal {
    /// What the user can do about it, where there is something.
    pub fn advice(self) -> Option<&'static str> {
        match (self.action, self.state) {
            (_, State::Destroying) => Some("`flyrun rm -f` finishes a removal that was interrupted."),
            (Action::Remove, _) => Some("Stop it first, or use `flyrun rm -f`."),
            (_, State::Suspending | State::Suspended) => Some("`flyrun resume` brings it back."),
            (_, State::Started) => Some("`flyrun suspend` brings it to disk."),
            (_, State::Created | State::Stopped | State::Failed) => Some("Start it with `flyrun start`."),
            (_, State::Starting) => Some("`flyrun ps` shows when it has started."),
            (_, State::Paused) => Some("Let it run on with `flyrun unpause`."),
            (_, State::Stopping) => Some("`flyrun wait` returns when it has ended."),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.action, self.state) {
            (_, State::Destroying) => write!(f, "it is being removed"),
            (Action::Remove, state) => write!(f, "it is {state}, and only one that has ended is removed"),
            (Action::Start | Action::Pause | Action::Suspend | Action::Resume, state) => {
                write!(f, "it is {state}")
            }
            (_, state @ (State::Paused | State::Suspending | State::Suspended)) => write!(f, "it is {state}"),
            (_, state) => write!(f, "it is not running ({state})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACTIONS: [Action; 11] = [
        Action::Start,
        Action::Stop,
        Action::Signal,
        Action::Remove,
        Action::RemoveByForce,
        Action::Attach,
        Action::Exec,
        Action::Pause,
        Action::Unpause,
        Action::Suspend,
        Action::Resume,
    ];

    #[test]
    fn whoever_is_refused_is_told_the_state_and_what_to_do() {
        for state in State::ALL {
            for action in ACTIONS {
                let Err(refusal) = state.decide(action) else { continue };
                let told = format!("{refusal} {}", refusal.advice().unwrap_or_default());
                assert!(told.contains(&state.to_string()) || state == State::Destroying, "{told}");
                assert!(refusal.advice().is_some(), "{state} {action:?}");
            }
        }
    }

    #[test]
    fn asking_twice_is_no_error() {
        assert_eq!(State::Started.decide(Action::Start), Ok(Verdict::Already));
        assert_eq!(State::Stopped.decide(Action::Stop), Ok(Verdict::Already));
        assert_eq!(State::Created.decide(Action::Stop), Ok(Verdict::Already));
    }

    #[test]
    fn a_running_machine_is_removed_by_force_only() {
        assert!(State::Started.decide(Action::Remove).is_err());
        assert_eq!(State::Started.decide(Action::RemoveByForce), Ok(Verdict::Go));
    }

    #[test]
    fn nothing_leaves_a_removal() {
        for next in State::ALL {
            assert_eq!(State::Destroying.may_become(next), next == State::Destroying);
        }
        for state in State::ALL {
            assert!(state.may_become(State::Destroying), "{state}");
        }
    }

    #[test]
    fn a_monitor_that_dies_leaves_a_failed_machine() {
        for state in State::ALL.into_iter().filter(|state| state.needs_monitor()) {
            assert!(state.may_become(State::Failed), "{state}");
        }
    }
}
