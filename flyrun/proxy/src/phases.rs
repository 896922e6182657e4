//! The parts of an exchange: until a machine answers, the answer, and bytes both ways.

use std::future::poll_fn;
use std::task::{Context, Poll};
use std::time::Duration;

use http::StatusCode;

use crate::backend::{Answer, Exchange};
use crate::kept::Kept;
use crate::watch::{Deadlines, Watch};
use crate::wire::{Broken, Copy, Incoming, Outgoing as _, Respond, Side};

/// A machine that says more before its answer is out of its mind.
const MAX_EARLY: usize = 32;

/// Why an exchange ended early.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The client is gone, or broke off.
    Gone,
    /// The client sends what is no body.
    Malformed(&'static str),
    /// The client neither sends nor reads.
    Slow,
    /// The machine broke off.
    Machine(Broken),
    /// The machine neither answers nor reads.
    Late,
    /// The request as a whole has had its time.
    Overdue,
}

/// What is under way between a client and a machine.
pub(crate) struct Phases<'p, 'k, I, R> {
    pub exchange: &'p mut Exchange,
    pub body: &'p mut Kept<'k, I>,
    pub respond: &'p mut R,
    pub watch: &'p mut Watch,
    pub limit: Duration,
    pub deadlines: Deadlines,
    pub up: Copy,
    pub down: Copy,
    /// The machine takes no more of the request, which it may have answered all the same.
    is_deaf: bool,
}

impl<'p, 'k, I: Incoming, R: Respond> Phases<'p, 'k, I, R> {
    pub fn new(
        exchange: &'p mut Exchange,
        body: &'p mut Kept<'k, I>,
        respond: &'p mut R,
        watch: &'p mut Watch,
        (limit, deadlines): (Duration, Deadlines),
    ) -> Self {
        let (up, down) = (Copy::default(), Copy::default());
        Phases { exchange, body, respond, watch, limit, deadlines, up, down, is_deaf: false }
    }

    /// Goes on with what [`Phases::leave`] left.
    pub fn resume(
        exchange: &'p mut Exchange,
        body: &'p mut Kept<'k, I>,
        respond: &'p mut R,
        watch: &'p mut Watch,
        limits: (Duration, Deadlines),
    ) -> Self {
        let (up, is_deaf) = std::mem::take(&mut exchange.upload);
        Phases { up, is_deaf, ..Phases::new(exchange, body, respond, watch, limits) }
    }

    /// How far the request's body has come is kept with the exchange.
    pub fn leave(self) {
        self.exchange.upload = (self.up, self.is_deaf);
    }

    /// Sends the request, and waits for the answer's head. Heads before it are passed on.
    pub async fn answer(&mut self, may_inform: bool) -> Result<Answer, Stop> {
        self.begin_anew();
        let mut early = 0;
        poll_fn(|cx| {
            self.poll_up(cx)?;
            loop {
                // A client that does not read is told no more.
                if early > 0 && self.respond.poll_ready(cx).map_err(|_| Stop::Gone)?.is_pending() {
                    break;
                }
                let Poll::Ready(answer) = self.exchange.poll_answer(cx) else { break };
                let answer = answer.map_err(Stop::Machine)?;
                let is_last =
                    !answer.status.is_informational() || answer.status == StatusCode::SWITCHING_PROTOCOLS;
                if is_last {
                    return Poll::Ready(Ok(answer));
                }
                early += 1;
                if early > MAX_EARLY {
                    let why = "There are too many answers before the answer.";
                    return Poll::Ready(Err(Stop::Machine(Broken::Malformed(why))));
                }
                self.begin_anew();
                if may_inform {
                    self.respond.inform(answer.status, answer.fields).map_err(|_| Stop::Gone)?;
                    let _ = self.respond.poll_flush(cx).map_err(|_| Stop::Gone)?;
                }
            }
            if self.is_gone(cx) {
                return Poll::Ready(Err(Stop::Gone));
            }
            self.poll_limit(cx)
        })
        .await
    }

    /// Passes the answer's body on, and what is left of the request's.
    pub async fn body(&mut self) -> Result<(), Stop> {
        self.begin_anew();
        poll_fn(|cx| {
            self.poll_up(cx)?;
            if self.poll_down(cx)?.is_ready() {
                return Poll::Ready(Ok(()));
            }
            if self.is_gone(cx) {
                return Poll::Ready(Err(Stop::Gone));
            }
            self.poll_limit(cx)
        })
        .await
    }

    /// Passes bytes on both ways until both sides have ended.
    pub async fn tunnel(&mut self) -> Result<(), Stop> {
        self.exchange.raw();
        self.body.forget();
        self.body.raw();
        self.begin_anew();
        // Whatever came of the request's body is over; the other direction may begin.
        self.up = Copy::default();
        poll_fn(|cx| {
            self.poll_up(cx)?;
            let is_down = self.poll_down(cx)?.is_ready();
            if is_down && (self.up.is_done() || self.is_deaf) {
                return Poll::Ready(Ok(()));
            }
            self.poll_limit(cx)
        })
        .await
    }

    fn poll_up(&mut self, cx: &mut Context<'_>) -> Result<(), Stop> {
        if self.up.is_done() || self.is_deaf {
            return Ok(());
        }
        match self.up.poll(cx, self.body, &mut self.exchange.output) {
            Poll::Ready(Err(Side::From(Broken::Malformed(why)))) => Err(Stop::Malformed(why)),
            Poll::Ready(Err(Side::From(_))) => Err(Stop::Gone),
            Poll::Ready(Err(Side::To(_))) => {
                self.is_deaf = true;
                Ok(())
            }
            Poll::Ready(Ok(())) | Poll::Pending => Ok(()),
        }
    }

    fn poll_down(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, Stop> {
        if self.down.is_done() {
            return Ok(Poll::Ready(()));
        }
        match self.down.poll(cx, &mut self.exchange.answer_body(), self.respond) {
            Poll::Ready(Ok(())) => Ok(Poll::Ready(())),
            Poll::Ready(Err(Side::From(broken))) => Err(Stop::Machine(broken)),
            Poll::Ready(Err(Side::To(Broken::Malformed(why)))) => Err(Stop::Machine(Broken::Malformed(why))),
            Poll::Ready(Err(Side::To(_))) => Err(Stop::Gone),
            Poll::Pending => Ok(Poll::Pending),
        }
    }

    fn is_gone(&mut self, cx: &mut Context<'_>) -> bool {
        self.respond.poll_gone(cx).is_ready() || self.up.has_read_all() && self.body.poll_gone(cx).is_ready()
    }

    /// What stands still has the whole limit again, as far as the request has.
    fn begin_anew(&mut self) {
        self.watch.set(self.limit);
        let body = self.deadlines.body.filter(|_| !self.up.has_read_all());
        for end in [body, self.deadlines.total].into_iter().flatten() {
            self.watch.no_later_than(end);
        }
    }

    /// Whoever holds things up when the limit is reached.
    fn poll_limit<T>(&mut self, cx: &mut Context<'_>) -> Poll<Result<T, Stop>> {
        if std::mem::take(&mut self.up.moved) | std::mem::take(&mut self.down.moved) {
            self.begin_anew();
        }
        if self.watch.poll(cx).is_pending() {
            return Poll::Pending;
        }
        if self.deadlines.is_over() {
            return Poll::Ready(Err(Stop::Overdue));
        }
        let client_reads = matches!(self.respond.poll_ready(cx), Poll::Ready(Ok(())));
        let machine_reads = matches!(self.exchange.output.poll_ready(cx), Poll::Ready(Ok(())));
        let client_owes = !self.up.has_read_all() && !self.is_deaf && machine_reads;
        Poll::Ready(Err(if !client_reads || client_owes { Stop::Slow } else { Stop::Late }))
    }
}
