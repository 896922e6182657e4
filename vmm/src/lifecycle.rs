//! What a machine may do, and when.
//!
//! ```text
//!            start            pause
//! Configured ─────▶ Running ─────────▶ Paused
//!      │               │ ▲               │ │
//!      │               │ └───────────────┘ │
//!      │               │      resume       │
//!      └───────────────┴──────▶ Ended ◀────┘
//!                        end
//! ```
//!
//! A paused machine may be saved, which leaves it paused. One that is made from a snapshot is configured like any other.
//!
//! This is policy only: no thread, no KVM. [`crate::vm::Vm`] asks here first and then does what was allowed.

use std::fmt;

/// Where a machine is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmState {
    /// Memory, devices and vCPUs exist; no guest instruction has run.
    Configured,
    /// vCPUs run.
    Running,
    /// vCPUs are stopped between two instructions and memory does not change.
    Paused,
    /// Over. Nothing leads out.
    Ended,
}

/// What somebody asks of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmRequest {
    /// Run the first instruction. Once, by the thread that configured the machine.
    Start,
    /// Stop the vCPUs and keep everything. By the event loop's thread.
    Pause,
    /// Go on where a pause stopped. By the event loop's thread.
    Resume,
    /// Be written to a snapshot, and stay as it is. By the event loop's thread.
    Save,
    /// Be over: by any thread, also when the guest itself is the reason.
    End,
}

/// Why a request was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What was asked.
    pub request: VmRequest,
    /// The state that does not allow it.
    pub state: VmState,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wanted = match self.request {
            VmRequest::Start => "configured",
            VmRequest::Pause => "running",
            VmRequest::Resume | VmRequest::Save => "paused",
            VmRequest::End => "not yet over",
        };
        write!(f, "{:?} needs a machine that is {wanted}, this one is {:?}", self.request, self.state)
    }
}

impl std::error::Error for Refusal {}

impl VmState {
    /// The state after the request.
    ///
    /// # Errors
    /// The state does not allow it.
    pub fn after(self, request: VmRequest) -> Result<VmState, Refusal> {
        match (self, request) {
            // ## Configured => (Running | Ended)
            (VmState::Configured, VmRequest::Start) => Ok(VmState::Running),
            // ## Running => (Paused | Ended)
            (VmState::Running, VmRequest::Pause) => Ok(VmState::Paused),
            // ## Paused => (Paused | Running | Ended)
            (VmState::Paused, VmRequest::Save) => Ok(VmState::Paused),
            (VmState::Paused, VmRequest::Resume) => Ok(VmState::Running),
            (VmState::Configured | VmState::Running | VmState::Paused, VmRequest::End) => Ok(VmState::Ended),
            // ## Ended => ()
            (state, request) => Err(Refusal { request, state }),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request() -> impl Strategy<Value = VmRequest> {
        prop_oneof![
            Just(VmRequest::Start),
            Just(VmRequest::Pause),
            Just(VmRequest::Resume),
            Just(VmRequest::Save),
            Just(VmRequest::End)
        ]
    }

    proptest! {
        #[test]
        fn a_machine_starts_once_ends_once_and_alternates_pause_and_resume(
            requests in proptest::collection::vec(request(), 0..40),
        ) {
            let mut state = VmState::Configured;
            let mut done = Vec::new();
            for request in requests {
                match state.after(request) {
                    Ok(next) => {
                        prop_assert!(state != VmState::Ended);
                        prop_assert_eq!(next == state, request == VmRequest::Save);
                        state = next;
                        done.push(request);
                    }
                    Err(refusal) => prop_assert_eq!(refusal, Refusal { request, state }),
                }
            }
            prop_assert!(done.iter().filter(|r| **r == VmRequest::Start).count() <= 1);
            prop_assert!(done.iter().filter(|r| **r == VmRequest::End).count() <= 1);
            let moves: Vec<_> =
                done.iter().filter(|r| matches!(r, VmRequest::Pause | VmRequest::Resume)).collect();
            prop_assert!(moves.windows(2).all(|pair| pair[0] != pair[1]));
        }
    }

    #[test]
    fn a_refusal_names_what_was_wanted() {
        let refusal = VmState::Ended.after(VmRequest::Resume).unwrap_err();
        assert_eq!(refusal.to_string(), "Resume needs a machine that is paused, this one is Ended");
    }
}
