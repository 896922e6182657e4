//! Messages out of a connection.

use std::io;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};

use super::chunk::{Chunks, Step};
use super::head::{self, Refused, Scan};
use crate::socket::{Read, Whole, Write};
use crate::wire::{Broken, Frame, Incoming};

/// A head fits in most cases.
const HEAD_BYTES: usize = 4 << 10;
/// What is read at once of a body that comes fast.
const BODY_BYTES: usize = 64 << 10;
/// What is kept of a client's next requests while one is answered.
const AHEAD_BYTES: usize = 16 << 10;

/// The half of a connection that messages come from.
#[derive(Debug)]
pub(crate) struct Reader {
    read: Read,
    buffer: BytesMut,
    scan: Scan,
    body: Body,
    /// How much is read at once.
    stride: usize,
    is_at_end: bool,
}

/// What is left of a body.
#[derive(Debug)]
pub(crate) enum Body {
    None,
    Length(u64),
    Chunked(Chunks),
    /// All bytes until the other side ends.
    Raw,
}

impl Body {
    pub fn chunked() -> Body {
        Body::Chunked(Chunks::new())
    }
}

/// Why there is no head.
#[derive(Debug)]
pub(crate) enum NoHead {
    /// The connection ended between messages.
    End,
    /// It ended, or failed, within one.
    Broken(Broken),
    Refused(Refused),
}

impl Reader {
    pub fn new(read: Read, buffer: BytesMut) -> Reader {
        Reader { read, buffer, scan: Scan::default(), body: Body::None, stride: HEAD_BYTES, is_at_end: false }
    }

    /// What was read and not taken.
    pub fn buffer(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// The connection in one piece.
    pub fn into_whole(self, write: Write) -> Whole {
        Whole::new(self.buffer, self.read, write)
    }

    /// What follows the head.
    pub fn expect(&mut self, body: Body) {
        self.body = body;
    }

    /// What follows is bytes until the other side ends.
    pub fn expect_raw(&mut self) {
        self.body = Body::Raw;
    }

    /// Whether the body ends with the connection.
    pub fn is_raw(&self) -> bool {
        matches!(self.body, Body::Raw)
    }

    /// Whether the body was read to its end.
    pub fn is_between_messages(&self) -> bool {
        matches!(self.body, Body::None | Body::Length(0) | Body::Chunked(Chunks::End))
    }

    /// Reads more; false at the end.
    pub fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        if self.is_at_end {
            return Poll::Ready(Ok(false));
        }
        if self.buffer.capacity() - self.buffer.len() < self.stride / 2 {
            // Whoever waits has no memory for what may not come.
            ready!(self.read.poll_ready(cx))?;
            self.buffer.reserve(self.stride);
        }
        let count = ready!(self.read.poll_read(cx, &mut self.buffer))?;
        self.is_at_end = count == 0;
        if self.buffer.len() == self.buffer.capacity() && !matches!(self.body, Body::None) {
            self.stride = (self.stride * 2).min(BODY_BYTES);
        }
        Poll::Ready(Ok(count > 0))
    }

    /// The next head, with its empty line. `client`: empty lines before it are passed over.
    pub fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        max_bytes: usize,
        is_client: bool,
    ) -> Poll<Result<Bytes, NoHead>> {
        self.stride = HEAD_BYTES;
        loop {
            if is_client {
                head::skip_empty_lines(&mut self.buffer).map_err(NoHead::Refused)?;
            }
            if let Some(end) = self.scan.end(&self.buffer, max_bytes).map_err(NoHead::Refused)? {
                self.scan = Scan::default();
                return Poll::Ready(Ok(self.buffer.split_to(end).freeze()));
            }
            let is_more = ready!(self.poll_more(cx)).map_err(|error| NoHead::Broken(error.into()))?;
            if !is_more {
                let is_clean = self.buffer.is_empty();
                return Poll::Ready(Err(if is_clean { NoHead::End } else { NoHead::Broken(Broken::Closed) }));
            }
        }
    }

    /// A large buffer is given back while nothing is under way. A small one costs less to keep than to make again.
    pub fn shrink(&mut self) {
        if self.buffer.is_empty() && self.buffer.capacity() > 2 * HEAD_BYTES {
            self.buffer = BytesMut::new();
        }
    }

    fn take_data(&mut self, most: u64) -> Frame {
        let count = usize::try_from(most).unwrap_or(usize::MAX).min(self.buffer.len());
        Frame::Data(self.buffer.split_to(count).freeze())
    }
}

impl Incoming for Reader {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, Broken>>> {
        loop {
            match &mut self.body {
                Body::None | Body::Length(0) => return Poll::Ready(None),
                Body::Length(left) => {
                    let most = *left;
                    if !self.buffer.is_empty() {
                        *left -= most.min(self.buffer.len() as u64);
                        return Poll::Ready(Some(Ok(self.take_data(most))));
                    }
                }
                Body::Chunked(chunks) => match chunks.next(&mut self.buffer)? {
                    Step::Frame(frame) => return Poll::Ready(Some(Ok(frame))),
                    Step::End => return Poll::Ready(None),
                    Step::More => {}
                },
                Body::Raw if !self.buffer.is_empty() => {
                    return Poll::Ready(Some(Ok(self.take_data(u64::MAX))));
                }
                Body::Raw => {}
            }
            if !ready!(self.poll_more(cx))? {
                let is_end = matches!(self.body, Body::Raw);
                return Poll::Ready(if is_end { None } else { Some(Err(Broken::Closed)) });
            }
        }
    }

    fn raw(&mut self) {
        self.expect_raw();
    }

    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.buffer.len() < AHEAD_BYTES {
            match ready!(self.poll_more(cx)) {
                Ok(true) => {}
                Ok(false) | Err(_) => return Poll::Ready(()),
            }
        }
        Poll::Pending
    }
}
