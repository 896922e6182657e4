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
        self.until = after(limit);
        if self.until < self.sleep.deadline() {
            self.sleep.as_mut().reset(self.until);
        }
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

fn after(limit: Duration) -> Instant {
    let now = Instant::now();
    // A limit beyond reckoning is none: thirty years will do.
    now.checked_add(limit).unwrap_or_else(|| now + Duration::from_secs(30 * 365 * 24 * 3600))
}
