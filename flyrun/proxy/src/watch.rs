//! A time limit that is often moved and seldom reached.

use std::future::Future as _;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

/// One timer of a connection. To move its end costs no more than looking at the clock.
#[derive(Debug)]
pub(crate) struct Watch {
    sleep: Pin<Box<Sleep>>,
    until: Instant,
}

impl Watch {
    pub fn new(limit: Duration) -> Watch {
        let until = after(limit);
        Watch { sleep: Box::pin(tokio::time::sleep_until(until)), until }
    }

    /// The limit begins anew.
    pub fn set(&mut self, limit: Duration) {
        self.set_until(after(limit));
    }

    /// The limit ends then.
    pub fn set_until(&mut self, end: Instant) {
        self.until = end;
        if self.until < self.sleep.deadline() {
            self.sleep.as_mut().reset(self.until);
        }
    }

    /// The limit ends then if it would end later.
    pub fn no_later_than(&mut self, end: Instant) {
        self.set_until(self.until.min(end));
    }

    /// Ready when it is reached.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(self.sleep.as_mut().poll(cx));
            if Instant::now() >= self.until {
                return Poll::Ready(());
            }
            self.sleep.as_mut().reset(self.until);
        }
    }
}

/// When a request is to be over, however much moves.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Deadlines {
    /// `body_timeout`: the request's body has arrived.
    pub body: Option<Instant>,
    /// `total_timeout`: the answer is out.
    pub total: Option<Instant>,
}

impl Deadlines {
    pub fn new(start: Instant, body: Option<Duration>, total: Option<Duration>) -> Deadlines {
        let end = |limit: Option<Duration>| start.checked_add(limit?);
        Deadlines { body: end(body), total: end(total) }
    }

    /// Whether the request as a whole has had its time.
    pub fn is_over(&self) -> bool {
        self.total.is_some_and(|end| end <= Instant::now())
    }

    /// So much of a limit as is left of the whole.
    pub fn left_of(&self, limit: Duration) -> Duration {
        self.total.map_or(limit, |end| limit.min(end.saturating_duration_since(Instant::now())))
    }
}

fn after(limit: Duration) -> Instant {
    let now = Instant::now();
    // A limit beyond reckoning is none: thirty years will do.
    now.checked_add(limit).unwrap_or_else(|| now + Duration::from_secs(30 * 365 * 24 * 3600))
}
