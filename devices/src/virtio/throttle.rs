//! A device's rate limit in the event loop: a limiter, and the alarm that goes on with a queue when it may.
//!
//! A device asks before each request. When the answer is no it leaves its queue alone, with notifications off, and the
//! alarm's event brings it back. The buckets outlive the driver, which could fill them by a reset otherwise.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Instant,
};

use event_manager::{EventOps, EventSet, Events};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use super::rate::{Limiter, Rate};

/// What is due within this time, in nanoseconds, goes together: far less than a bucket holds, and one wake-up for it.
const SHORTEST_WAIT_NS: u64 = 1_000_000;
const SECOND_NS: u64 = 1_000_000_000;

/// A clock that can be told to call.
pub trait Alarm: Send {
    /// The time in nanoseconds.
    fn now_ns(&self) -> u64;

    /// Calls after so many nanoseconds, and not at the time that was wanted before.
    fn set(&mut self, after_ns: u64);

    /// The file that is readable from then on, until [`Alarm::acknowledge`].
    fn file(&self) -> BorrowedFd<'_>;

    /// Takes note of the call.
    fn acknowledge(&mut self);
}

/// Nothing, or a rate and what it takes to keep to it.
#[derive(Default)]
pub struct Throttle(Option<(Limiter, Box<dyn Alarm>)>);

impl Throttle {
    /// Keeps to `rate` by the host's clock.
    ///
    /// # Errors
    /// When the host grants no more timers.
    pub fn new(rate: Rate) -> io::Result<Self> {
        Ok(Self::with_alarm(rate, Box::new(Timer::new()?)))
    }

    /// Keeps to `rate` by another clock.
    pub fn with_alarm(rate: Rate, alarm: Box<dyn Alarm>) -> Self {
        Throttle(Some((Limiter::new(rate), alarm)))
    }

    /// Whether the next request may pass. If not, the alarm is set for when it may.
    pub fn admits(&mut self) -> bool {
        let Some((limiter, alarm)) = &mut self.0 else { return true };
        let wait_ns = limiter.wait_ns(alarm.now_ns());
        if wait_ns > 0 {
            alarm.set(wait_ns.max(SHORTEST_WAIT_NS));
        }
        wait_ns == 0
    }

    /// Counts a request that has passed.
    pub fn charge(&mut self, bytes: u64) {
        if let Some((limiter, _)) = &mut self.0 {
            limiter.charge(bytes);
        }
    }

    /// To be called from the device's `init`: its events come with `data`.
    pub fn init(&self, data: u32, ops: &mut EventOps) {
        if let Some((_, alarm)) = &self.0
            && let Err(error) = ops.add(Events::with_data(&alarm.file(), data, EventSet::IN))
        {
            log::error!("cannot watch a rate limit's timer: {error}");
        }
    }

    /// To be called for each of these events.
    pub fn acknowledge(&mut self) {
        if let Some((_, alarm)) = &mut self.0 {
            alarm.acknowledge();
        }
    }
}

/// A clock that begins at zero, and a timerfd beside it.
struct Timer {
    file: OwnedFd,
    began: Instant,
}

impl Timer {
    fn new() -> io::Result<Self> {
        // Not blocking: a timer that was set anew has nothing to read, though its event is on the way.
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Timer { file: timerfd_create(TimerfdClockId::Monotonic, flags)?, began: Instant::now() })
    }
}

impl Alarm for Timer {
    fn now_ns(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn set(&mut self, after_ns: u64) {
        let it_value = Timespec {
            tv_sec: (after_ns / SECOND_NS).cast_signed(),
            tv_nsec: (after_ns % SECOND_NS).cast_signed(),
        };
        let once = Itimerspec { it_interval: Timespec::default(), it_value };
        if let Err(error) = timerfd_settime(&self.file, TimerfdTimerFlags::empty(), &once) {
            log::error!("cannot set a rate limit's timer: {error}");
        }
    }

    fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn acknowledge(&mut self) {
        let _ = rustix::io::read(&self.file, &mut [0; 8]);
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    #[test]
    fn the_hosts_timer_calls_once_after_the_time_and_can_be_set_again() {
        let mut timer = Timer::new().unwrap();
        for wait_ns in [1, 2_000_000] {
            let before = timer.now_ns();
            timer.set(wait_ns);
            poll(&mut [PollFd::new(&timer.file, PollFlags::IN)], None).unwrap();
            assert!(timer.now_ns() >= before + wait_ns);
            timer.acknowledge();
            timer.acknowledge();
        }
    }

    #[test]
    fn the_alarm_is_set_only_when_a_request_must_wait() {
        let rate = Rate { bytes: None, operations: NonZeroU64::new(1) };
        let mut throttle = Throttle::new(rate).unwrap();
        let is_set = |throttle: &Throttle| {
            let (_, alarm) = throttle.0.as_ref().unwrap();
            rustix::time::timerfd_gettime(alarm.file()).unwrap().it_value != Timespec::default()
        };
        assert!(throttle.admits() && !is_set(&throttle));
        (0..10_000).for_each(|_| throttle.charge(0));
        assert!(!throttle.admits() && is_set(&throttle));
    }
}
