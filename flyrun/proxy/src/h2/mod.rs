//! HTTP/2 (RFC 9113): bodies as streams, and the side of clients.

mod server;

pub(crate) use server::serve;

use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};

use crate::fields;
use crate::wire::{Broken, Frame, Incoming, Outgoing};

/// Gives the body of a stream.
#[derive(Default)]
pub(crate) struct Receive {
    stream: Option<RecvStream>,
    is_raw: bool,
}

impl Receive {
    pub fn new(stream: RecvStream) -> Receive {
        Receive { stream: Some(stream), is_raw: false }
    }
}

impl Incoming for Receive {
    fn raw(&mut self) {
        self.is_raw = true;
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, Broken>>> {
        let Some(stream) = &mut self.stream else { return Poll::Ready(None) };
        loop {
            match ready!(stream.poll_data(cx)) {
                Some(Ok(data)) => {
                    // Whoever asks takes it on at once: the other side may send as much again.
                    let _ = stream.flow_control().release_capacity(data.len());
                    if !data.is_empty() {
                        return Poll::Ready(Some(Ok(Frame::Data(data))));
                    }
                }
                // Whoever has the whole answer may ask for no more of the request (RFC 9113, section 8.1).
                Some(Err(error)) if error.reason() == Some(Reason::NO_ERROR) => break,
                Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                None => break,
            }
        }
        let trailers = ready!(stream.poll_trailers(cx));
        self.stream = None;
        match trailers {
            Ok(Some(mut fields)) if !self.is_raw => {
                fields::strip_from_trailers(&mut fields);
                Poll::Ready(Some(Ok(Frame::Trailers(fields))))
            }
            Ok(_) => Poll::Ready(None),
            Err(error) => Poll::Ready(Some(Err(error.into()))),
        }
    }
}

/// Takes the body of a stream.
pub(crate) struct Send {
    stream: SendStream<Bytes>,
    pending: Bytes,
    step: Step,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// ## Open => (Ending | Ended)
    Open,
    /// The end goes with the last of what is pending. ## Ending => (Ended)
    Ending,
    Ended,
}

impl Send {
    /// `has_ended`: the head was the last.
    pub fn new(stream: SendStream<Bytes>, has_ended: bool) -> Send {
        Send { stream, pending: Bytes::new(), step: if has_ended { Step::Ended } else { Step::Open } }
    }

    /// The other side sees an error.
    pub fn reset(&mut self, reason: Reason) {
        self.stream.send_reset(reason);
    }

    /// Ready when the other side wants no more of it.
    pub fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.stream.poll_reset(cx).map(|_| ())
    }

    fn poll_pending(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        while !self.pending.is_empty() {
            self.stream.reserve_capacity(self.pending.len());
            let mut capacity = self.stream.capacity();
            if capacity == 0 {
                capacity = match ready!(self.stream.poll_capacity(cx)) {
                    Some(capacity) => capacity?,
                    None => return Poll::Ready(Err(Broken::Closed)),
                };
            }
            let part = self.pending.split_to(capacity.min(self.pending.len()));
            let is_last = self.pending.is_empty() && self.step == Step::Ending;
            self.stream.send_data(part, is_last)?;
            if is_last {
                self.step = Step::Ended;
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl Outgoing for Send {
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        self.poll_pending(cx)
    }

    fn push(&mut self, frame: Frame) -> Result<(), Broken> {
        if self.step != Step::Open {
            return Err(Broken::Malformed("There is more than a whole body."));
        }
        match frame {
            Frame::Data(data) => self.pending = data,
            Frame::Trailers(fields) => {
                self.stream.send_trailers(fields)?;
                self.step = Step::Ended;
            }
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), Broken> {
        if self.step == Step::Open && self.pending.is_empty() {
            self.stream.send_data(Bytes::new(), true)?;
            self.step = Step::Ended;
        } else if self.step == Step::Open {
            self.step = Step::Ending;
        }
        Ok(())
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        self.poll_pending(cx)
    }
}
