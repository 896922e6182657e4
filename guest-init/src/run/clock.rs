//! The time of day after a resume, from a host that may take long to say it.
//!
//! The host tells its time at some moment between the guest's question and the arrival of the answer. In the middle between
//! both it is wrong by half of that at most; an answer that took too long is asked for again.

use protocol::{FromGuest, ToGuest};
use rustix::{
    event::{PollFd, poll},
    time::{ClockId, Timespec, clock_gettime, clock_settime},
};

use crate::{
    control::{Control, timeout},
    failure::{Failure, OrSetup},
};

/// An answer that is wrong by no more than this is good enough.
const TOLERANCE_NS: i64 = 2_000_000;
/// How often the host is asked, and how long it may take each time.
const QUESTIONS: u32 = 20;
const ANSWER_LIMIT_MS: i64 = 1000;
/// How often the clock is set, if the machine stands still between looking at one clock and setting the other.
const ATTEMPTS: u32 = 10;

/// What the host has said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told {
    realtime_ns: u64,
    /// The guest's monotonic time that it is taken for.
    at_ns: i64,
    /// By how much it may be wrong.
    error_ns: i64,
}

impl Told {
    /// The host's time, told just now, after this moment of the guest's monotonic time.
    pub fn since(asked_ns: i64, realtime_ns: u64) -> Self {
        Self::new(realtime_ns, asked_ns, monotonic_ns())
    }

    /// The host's time, told between two moments of the guest's monotonic time.
    pub fn new(realtime_ns: u64, asked_ns: i64, answered_ns: i64) -> Self {
        let error_ns = answered_ns.saturating_sub(asked_ns).max(0) / 2;
        Self { realtime_ns, at_ns: asked_ns.saturating_add(error_ns), error_ns }
    }

    /// The time of day at another moment.
    fn at(&self, monotonic_ns: i64) -> Timespec {
        let passed = monotonic_ns.saturating_sub(self.at_ns).max(0).unsigned_abs();
        let now = self.realtime_ns.saturating_add(passed);
        let (seconds, nanoseconds) = (now / 1_000_000_000, now % 1_000_000_000);
        Timespec { tv_sec: seconds.cast_signed(), tv_nsec: nanoseconds.cast_signed() }
    }
}

/// Sets the clock. Nothing is told by 0, and leaves it as it is.
///
/// # Errors
/// The kernel's.
pub fn set(told: Told, control: &mut Control) -> Result<(), Failure> {
    if told.realtime_ns == 0 {
        return Ok(());
    }
    let told = ask_again(told, control);
    for _ in 0..ATTEMPTS {
        let now = monotonic_ns();
        clock_settime(ClockId::Realtime, told.at(now)).or_setup(|| "set the clock".into())?;
        if monotonic_ns() - now <= TOLERANCE_NS / 2 {
            break;
        }
    }
    Ok(())
}

/// The best of several answers, unless the first is good enough.
fn ask_again(mut best: Told, control: &mut Control) -> Told {
    for _ in 0..QUESTIONS {
        if best.error_ns <= TOLERANCE_NS {
            break;
        }
        let asked_ns = monotonic_ns();
        control.send(&FromGuest::AskTime);
        let Some(realtime_ns) = answer(control) else { break };
        let told = Told::new(realtime_ns, asked_ns, monotonic_ns());
        if told.error_ns < best.error_ns {
            best = told;
        }
    }
    best
}

/// What else comes now is for a workload that stands still.
fn answer(control: &mut Control) -> Option<u64> {
    loop {
        while let Some(frame) = control.next_frame() {
            if let ToGuest::Time { realtime_ns } = frame {
                return Some(realtime_ns);
            }
        }
        if control.is_closed() {
            return None;
        }
        let mut fds = [PollFd::new(control, control.interest())];
        if poll(&mut fds, Some(&timeout(ANSWER_LIMIT_MS))) == Ok(0) {
            return None;
        }
        control.flush();
        control.receive();
    }
}

/// CLOCK_MONOTONIC in nanoseconds.
pub fn monotonic_ns() -> i64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.saturating_mul(1_000_000_000).saturating_add(now.tv_nsec)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use protocol::frame;

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn an_answer_is_right_to_half_the_time_it_took() {
        let told = Told::new(1000 * SECOND, 50, 250);
        assert_eq!(told.error_ns, 100);
        assert_eq!(told.at(150), Timespec { tv_sec: 1000, tv_nsec: 0 });
        assert_eq!(told.at(150 + 2_000_000_000), Timespec { tv_sec: 1002, tv_nsec: 0 });
        assert_eq!(told.at(0), told.at(150));
        assert_eq!(Told::new(7, 9, 3).error_ns, 0);
    }

    #[test]
    fn a_slow_answer_is_asked_for_again_and_a_quick_one_is_not() {
        let (guest, host) = UnixStream::pair().unwrap();
        let mut control = Control::over(guest.into());
        let quick = Told::new(SECOND, 0, 2 * TOLERANCE_NS);
        assert_eq!(ask_again(quick, &mut control), quick);

        let slow = Told::new(SECOND, 0, 1_000_000_000);
        let answers: Vec<u8> = (0..QUESTIONS)
            .flat_map(|_| frame::encode(&ToGuest::Time { realtime_ns: 5 * SECOND }).unwrap())
            .collect();
        std::io::Write::write_all(&mut &host, &answers).unwrap();
        let told = ask_again(slow, &mut control);
        assert_eq!(told.realtime_ns, 5 * SECOND);
        assert!(told.error_ns < slow.error_ns);
    }

    #[test]
    fn a_host_that_is_gone_leaves_what_was_told_first() {
        let (guest, host) = UnixStream::pair().unwrap();
        drop(host);
        let slow = Told::new(SECOND, 0, 1_000_000_000);
        assert_eq!(ask_again(slow, &mut Control::over(guest.into())), slow);
    }
}
