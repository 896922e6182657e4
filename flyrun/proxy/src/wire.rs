//! Bodies on their way, in whatever protocol: what gives them, what takes them, and the copying between.

use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode};

/// A piece of a body.
#[derive(Debug)]
pub(crate) enum Frame {
    /// Bytes, at least one.
    Data(Bytes),
    /// Fields after the last byte. Nothing follows but the end.
    Trailers(HeaderMap),
}

/// How long a body is, as far as its head tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Size {
    /// There is none, and the head says nothing of a length.
    None,
    /// So many bytes.
    Known(u64),
    /// Its end will show.
    Unknown,
}

/// Why a message did not come to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Broken {
    /// The other side closed or reset too early.
    #[error("closed too early")]
    Closed,
    /// It is not a message of the protocol.
    #[error("{0}")]
    Malformed(&'static str),
    /// The socket failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// The stream or connection of HTTP/2 failed.
    #[error(transparent)]
    H2(#[from] h2::Error),
}

/// Gives a body.
pub(crate) trait Incoming: Send {
    /// The next piece; `None` once at the end, and again whenever asked afterwards.
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, Broken>>>;

    /// What follows is bytes without framing.
    fn raw(&mut self);

    /// Ready when whoever sends it is known to be gone.
    fn poll_gone(&mut self, _cx: &mut Context<'_>) -> Poll<()> {
        Poll::Pending
    }
}

/// Takes an answer.
pub(crate) trait Respond: Outgoing {
    /// A head that goes before the answer (1xx). Only after [`Outgoing::poll_ready`] was ready.
    fn inform(&mut self, status: StatusCode, fields: HeaderMap) -> Result<(), Broken>;

    /// The head. A body follows as `size` says.
    fn head(&mut self, status: StatusCode, fields: HeaderMap, size: Size) -> Result<(), Broken>;

    /// The head of an answer after which there are bytes both ways; `protocol` is what HTTP/1.1 calls them.
    fn switch(
        &mut self,
        status: StatusCode,
        fields: HeaderMap,
        protocol: Option<HeaderValue>,
    ) -> Result<(), Broken>;

    /// The client is to see that the answer is not whole.
    fn abort(&mut self);

    /// No request is to follow on this connection.
    fn close(&mut self);

    /// Ready when the client wants no answer any more.
    fn poll_gone(&mut self, _cx: &mut Context<'_>) -> Poll<()> {
        Poll::Pending
    }
}

/// Takes a body.
pub(crate) trait Outgoing: Send {
    /// Ready when one more piece can be taken.
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>>;
    /// Takes a piece. Only after [`Outgoing::poll_ready`] was ready.
    fn push(&mut self, frame: Frame) -> Result<(), Broken>;
    /// Takes the end; afterwards there is only flushing.
    fn end(&mut self) -> Result<(), Broken>;
    /// Ready when all that was taken is on its way.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>>;
}

/// Which end of a copy broke.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Side {
    /// The giving one.
    #[error(transparent)]
    From(Broken),
    /// The taking one.
    #[error(transparent)]
    To(Broken),
}

/// So many pieces are copied before other connections have their turn.
const MAX_PIECES: u32 = 32;

/// A body that is being copied: never more than a piece of it is in memory.
#[derive(Debug, Default)]
pub(crate) struct Copy {
    /// The bytes so far.
    pub bytes: u64,
    /// Whether something moved since this was last set to false.
    pub moved: bool,
    step: Step,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Step {
    /// ## Moving => (Ending)
    #[default]
    Moving,
    /// The end is given and not yet flushed. ## Ending => (Done)
    Ending,
    Done,
}

impl Copy {
    /// Whether the end has arrived and is flushed.
    pub fn is_done(&self) -> bool {
        self.step == Step::Done
    }

    /// Whether the giving side has come to its end.
    pub fn has_read_all(&self) -> bool {
        self.step != Step::Moving
    }

    /// Copies what can be copied now; ready once all is.
    pub fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut impl Incoming,
        to: &mut impl Outgoing,
    ) -> Poll<Result<(), Side>> {
        let mut pieces = 0;
        while self.step == Step::Moving {
            if pieces == MAX_PIECES {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            pieces += 1;
            if to.poll_ready(cx).map_err(Side::To)?.is_pending() {
                return Poll::Pending;
            }
            match from.poll_frame(cx) {
                Poll::Ready(Some(frame)) => {
                    let frame = frame.map_err(Side::From)?;
                    if let Frame::Data(data) = &frame {
                        self.bytes += data.len() as u64;
                    }
                    self.moved = true;
                    to.push(frame).map_err(Side::To)?;
                }
                Poll::Ready(None) => {
                    self.moved = true;
                    self.step = Step::Ending;
                    to.end().map_err(Side::To)?;
                }
                // Whatever waits for more is seen meanwhile: server-sent events depend on it.
                Poll::Pending => {
                    let _ = to.poll_flush(cx).map_err(Side::To)?;
                    return Poll::Pending;
                }
            }
        }
        if self.step == Step::Ending {
            ready!(to.poll_flush(cx)).map_err(Side::To)?;
            self.step = Step::Done;
        }
        Poll::Ready(Ok(()))
    }
}
