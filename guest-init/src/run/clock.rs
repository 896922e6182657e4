//! The time of day after a resume, from a host that may take long to say it.
//!
//! The host tells its time at some moment between the guest's question and the arrival of the answer: how far that is ahead of the
//! guest's monotonic time lies between two bounds then. An answer that took too long is followed by other questions, each of which
//! narrows the bounds down: where a busy host is slow, it is so now on the way there and now on the way back.

use protocol::{FromGuest, ToGuest};
use rustix::{
    event::{PollFd, poll},
    time::{ClockId, Timespec, clock_gettime, clock_settime},
};

use crate::{
    control::{Control, timeout},
    failure::{Failure, OrSetup},
};

/// A time that is wrong by no more than this is good enough.
const TOLERANCE_NS: i64 = 2_000_000;
/// How often the host is asked at most: beside two other busy hosts 20 answers were not enough.
const QUESTIONS: u32 = 60;
/// How long one answer may take, and after how long no other question is asked: the host gives a guest 30 s to go on.
const ANSWER_LIMIT_MS: i64 = 1000;
const ASKING_LIMIT_NS: i64 = 15 * SECOND_NS;
/// How often the clock is set, if the machine stands still between looking at one clock and setting the other.
const ATTEMPTS: u32 = 10;
const SECOND_NS: i64 = 1_000_000_000;

/// What the host has said: by how much its time of day is ahead of the guest's monotonic time, at least and at most, in nanoseconds.
/// Nothing was said by 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told {
    least_ns: i64,
    most_ns: i64,
}

impl Told {
    /// The host's time, told just now, after this moment of the guest's monotonic time.
    pub fn since(asked_ns: i64, realtime_ns: u64) -> Self {
        Self::new(realtime_ns, asked_ns, monotonic_ns())
    }

    /// The host's time, told between two moments of the guest's monotonic time.
    pub fn new(realtime_ns: u64, asked_ns: i64, answered_ns: i64) -> Self {
        if realtime_ns == 0 {
            return Self::default();
        }
        let realtime_ns = i64::try_from(realtime_ns).unwrap_or(i64::MAX);
        let ahead_of = |monotonic_ns: i64| realtime_ns.saturating_sub(monotonic_ns);
        Self { least_ns: ahead_of(answered_ns.max(asked_ns)), most_ns: ahead_of(asked_ns) }
    }

    /// What both say. If they contradict each other, the host's clock was set between them, and the later one is right.
    fn and(self, later: Self) -> Self {
        let both =
            Self { least_ns: self.least_ns.max(later.least_ns), most_ns: self.most_ns.min(later.most_ns) };
        if both.least_ns <= both.most_ns { both } else { later }
    }

    /// By how much the middle may be wrong.
    fn error_ns(&self) -> i64 {
        self.most_ns.saturating_sub(self.least_ns) / 2
    }

    /// The time of day at this moment.
    fn at(&self, monotonic_ns: i64) -> Timespec {
        let ahead_ns = self.least_ns.saturating_add(self.error_ns());
        let now = monotonic_ns.saturating_add(ahead_ns).max(0);
        Timespec { tv_sec: now / SECOND_NS, tv_nsec: now % SECOND_NS }
    }
}

/// Sets the clock. Nothing is told by 0, and leaves it as it is.
///
/// # Errors
/// The kernel's.
pub fn set(told: Told, control: &mut Control) -> Result<(), Failure> {
    if told == Told::default() {
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

/// What several answers say together, unless the first is good enough.
fn ask_again(mut told: Told, control: &mut Control) -> Told {
    let began_ns = monotonic_ns();
    for _ in 0..QUESTIONS {
        let asked_ns = monotonic_ns();
        if told.error_ns() <= TOLERANCE_NS || asked_ns - began_ns > ASKING_LIMIT_NS {
            break;
        }
        control.send(&FromGuest::AskTime);
        let Some(realtime_ns) = answer(control) else { break };
        told = told.and(Told::new(realtime_ns, asked_ns, monotonic_ns()));
    }
    told
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
        assert_eq!(told.error_ns(), 100);
        assert_eq!(told.at(150), Timespec { tv_sec: 1000, tv_nsec: 0 });
        assert_eq!(told.at(150 + 2_000_000_000), Timespec { tv_sec: 1002, tv_nsec: 0 });
        assert_eq!(Told::new(7, 9, 3).error_ns(), 0);
        assert_eq!(Told::new(0, 9, 30), Told::default());
        assert_eq!(Told::new(u64::MAX, i64::MIN, i64::MAX).at(i64::MAX).tv_sec, i64::MAX / SECOND_NS);
    }

    /// Two answers of 10 ms, one of which was late on its way there and the other on its way back, tell the time to 1 ms.
    #[test]
    fn slow_answers_narrow_each_other_down() {
        let ms = |count: i64| count * 1_000_000;
        let told_at = |monotonic_ns: i64| 1000 * SECOND + monotonic_ns.unsigned_abs();
        let late_there = Told::new(told_at(ms(9)), ms(0), ms(10));
        let late_back = Told::new(told_at(ms(21)), ms(20), ms(30));
        for both in [late_there.and(late_back), late_back.and(late_there)] {
            assert_eq!(both.error_ns(), ms(1));
            assert_eq!(both.at(ms(50)), Timespec { tv_sec: 1000, tv_nsec: ms(50) });
        }
        // Somebody has set the host's clock meanwhile.
        let set = Told::new(told_at(ms(21)) + SECOND, ms(20), ms(30));
        assert_eq!(late_there.and(set), set);
    }

    #[test]
    fn a_slow_answer_is_asked_for_again_and_a_quick_one_is_not() {
        let (guest, host) = UnixStream::pair().unwrap();
        let mut control = Control::over(guest.into());
        let quick = Told::new(SECOND, 0, 2 * TOLERANCE_NS);
        assert_eq!(ask_again(quick, &mut control), quick);

        let slow = Told::new(SECOND, 0, 1_000_000_000);
        let answers: Vec<u8> = (0..QUESTIONS)
            .flat_map(|_| frame::encode(&ToGuest::Time { realtime_ns: 5_000_000 * SECOND }).unwrap())
            .collect();
        std::io::Write::write_all(&mut &host, &answers).unwrap();
        let told = ask_again(slow, &mut control);
        assert!(told.least_ns > slow.most_ns && told.error_ns() < slow.error_ns(), "{told:?}");
    }

    #[test]
    fn a_host_that_is_gone_leaves_what_was_told_first() {
        let (guest, host) = UnixStream::pair().unwrap();
        drop(host);
        let slow = Told::new(SECOND, 0, 1_000_000_000);
        assert_eq!(ask_again(slow, &mut Control::over(guest.into())), slow);
    }
}
