//! Waiting for a machine that was suspended: what its state means for somebody who was talking to it. The decision is pure.

use std::time::{Duration, Instant};

use super::End;
use super::link::Frames;
use crate::error::Result;
use crate::machine::{LastStart, Machines, Record, State};

/// How long a machine that runs again, or is about to, may be out of reach. Longer than a resume or a boot may take.
const PATIENCE: Duration = Duration::from_secs(90);
/// The pauses between two looks at a machine, the first and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(250);

/// Somebody whose session outlives its connection.
pub trait Returning {
    /// A frame of so many bytes was received and dealt with.
    fn received(&mut self, bytes: usize);

    /// The connection has ended without a last frame. Waits for the machine and goes on over another, until `left` says that
    /// nobody wants that any more. `told` says whether the other side has told of a suspend, where it does.
    ///
    /// # Errors
    /// The machine does not keep to the protocol.
    fn come_back(&mut self, told: bool, left: &dyn Fn() -> bool) -> Result<Return>;
}

/// What came of waiting.
#[derive(Debug)]
pub enum Return {
    /// The session goes on with these frames.
    Back(Frames),
    /// It is over.
    Over(End),
}

/// What a machine's state means.
#[derive(Debug, PartialEq, Eq)]
pub enum Prospect {
    /// It stands still, for as long as its user wants.
    Rests,
    /// It is on its way.
    Comes,
    /// It runs: it is worth trying.
    Runs,
    /// Nobody comes back to it.
    Over(End),
}

/// What a look at the machine tells. `rested` says whether it was seen at rest since the connection ended: a start from there
/// is a resume, any other a life that knows nothing of this one.
pub fn prospect(machine: &Record, rested: bool) -> Prospect {
    match machine.state {
        State::Suspending | State::Suspended | State::Paused => Prospect::Rests,
        State::Starting if rested || machine.snapshot.is_some() => Prospect::Comes,
        State::Started | State::Stopping => match &machine.last_start {
            Some(LastStart::ColdBoot { reason: Some(_), .. }) if rested => Prospect::Over(booted_cold()),
            _ => Prospect::Runs,
        },
        State::Starting | State::Created | State::Stopped | State::Failed | State::Destroying => {
            Prospect::Over(End::Lost)
        }
    }
}

/// The machine that came back has no memory of the session.
pub fn booted_cold() -> End {
    End::Gone("the machine was booted cold; the session is gone".into())
}

/// Looks at a machine until `attempt` has come back to it, which gives `None` for not yet. It is called while the machine runs
/// or is on its way.
///
/// # Errors
/// Those of `attempt`.
pub fn wait(
    machines: &Machines,
    id: &str,
    left: &dyn Fn() -> bool,
    attempt: &mut dyn FnMut(&Record, &Prospect) -> Result<Option<Return>>,
) -> Result<Return> {
    let (mut pause, mut rested, mut give_up_at) = (FIRST_PAUSE, false, None);
    while !left() {
        // It was removed, or went by itself.
        let Ok(machine) = machines.find(id) else { break };
        match prospect(&machine, rested) {
            Prospect::Over(end) => return Ok(Return::Over(end)),
            Prospect::Rests => (rested, give_up_at) = (true, None),
            near @ (Prospect::Comes | Prospect::Runs) => {
                if let Some(back) = attempt(&machine, &near)? {
                    return Ok(back);
                }
                pause = FIRST_PAUSE;
                if Instant::now() >= *give_up_at.get_or_insert_with(|| Instant::now() + PATIENCE) {
                    let told = format!("machine '{}' does not answer any more", machine.name);
                    return Ok(Return::Over(End::Gone(told)));
                }
            }
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
    Ok(Return::Over(End::Lost))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Snapshot;

    fn machine(state: State, last_start: Option<LastStart>) -> Record {
        Record { state, last_start, ..Record::example("web") }
    }

    const BY_BOOT: Option<LastStart> = Some(LastStart::ColdBoot { reason: None, no_base: None });

    #[test]
    fn a_machine_at_rest_is_waited_for_and_one_that_has_ended_is_not() {
        for state in State::ALL {
            let told = prospect(&machine(state, BY_BOOT), false);
            let expected = match state {
                State::Suspending | State::Suspended | State::Paused => Prospect::Rests,
                State::Started | State::Stopping => Prospect::Runs,
                _ => Prospect::Over(End::Lost),
            };
            assert_eq!(told, expected, "{state}");
        }
    }

    #[test]
    fn a_start_is_a_resume_only_from_a_snapshot() {
        let mut starting = machine(State::Starting, BY_BOOT);
        assert_eq!(prospect(&starting, false), Prospect::Over(End::Lost));
        assert_eq!(prospect(&starting, true), Prospect::Comes);
        starting.snapshot = Some(Snapshot { taken_at_ms: 1, network_number: None });
        assert_eq!(prospect(&starting, false), Prospect::Comes);
    }

    #[test]
    fn a_machine_that_was_booted_in_the_place_of_a_resume_has_no_memory_of_anybody() {
        let reason = Some("another CPU".to_string());
        let booted = machine(State::Started, Some(LastStart::ColdBoot { reason, no_base: None }));
        assert_eq!(prospect(&booted, true), Prospect::Over(booted_cold()));
        // That was before the session began.
        assert_eq!(prospect(&booted, false), Prospect::Runs);
        assert_eq!(prospect(&machine(State::Started, Some(LastStart::Resumed)), true), Prospect::Runs);
    }

    #[test]
    fn waiting_ends_with_the_machine_and_with_the_user() {
        let directory = tempfile::tempdir().unwrap();
        let machines = Machines::new(directory.path().to_path_buf());
        let mut never = |_: &Record, _: &Prospect| panic!("nothing runs");
        let over = wait(&machines, "nobody", &|| false, &mut never).unwrap();
        assert!(matches!(over, Return::Over(End::Lost)));
        let mut record = Record::example("web");
        record.state = State::Suspended;
        let id = record.id.clone();
        let owned = machines.create(record).unwrap();
        let looks = std::cell::Cell::new(0);
        let left = || looks.replace(looks.get() + 1) == 2;
        assert!(matches!(wait(&machines, &id, &left, &mut never).unwrap(), Return::Over(End::Lost)));
        drop(owned);
    }

    #[test]
    fn an_attempt_that_fails_is_made_again() {
        let directory = tempfile::tempdir().unwrap();
        let machines = Machines::new(directory.path().to_path_buf());
        let mut record = Record::example("web");
        record.state = State::Started;
        let id = record.id.clone();
        let _owned = machines.create(record).unwrap();
        let mut attempts = 0;
        let mut third = |_: &Record, _: &Prospect| {
            attempts += 1;
            Ok((attempts == 3).then_some(Return::Over(End::Detached)))
        };
        let back = wait(&machines, &id, &|| false, &mut third).unwrap();
        assert!(matches!(back, Return::Over(End::Detached)));
    }
}
