//! Messages into a connection. A head, and a small body with it, is one system call.

use std::io::IoSlice;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, StatusCode};

use crate::socket::Write;
use crate::wire::{Broken, Frame, Outgoing};

/// Less is copied behind what is already there; more is written from where it is.
const SMALL_BYTES: usize = 4 << 10;
/// From so much on, it is written before more is taken.
const ENOUGH_BYTES: usize = 16 << 10;

const CHUNK_END: &[u8] = b"\r\n";
const LAST_CHUNK: &[u8] = b"0\r\n\r\n";
const CHUNK_END_AND_LAST: &[u8] = b"\r\n0\r\n\r\n";

/// How a body shows its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    /// There is none.
    None,
    /// So many bytes are left of it.
    Length(u64),
    Chunked,
    /// The last chunk is written.
    Complete,
    /// By the connection's end.
    Raw,
}

/// The half of a connection that messages go to.
#[derive(Debug)]
pub(crate) struct Writer {
    write: Write,
    /// Written first, then `body`, then `post`.
    pre: BytesMut,
    body: Bytes,
    post: &'static [u8],
    framing: Framing,
    /// What TLS may hold back.
    is_flushed: bool,
    is_shutting: bool,
}

impl Writer {
    pub fn new(write: Write) -> Writer {
        Writer {
            write,
            pre: BytesMut::new(),
            body: Bytes::new(),
            post: &[],
            framing: Framing::None,
            is_flushed: true,
            is_shutting: false,
        }
    }

    pub fn into_write(self) -> Write {
        self.write
    }

    /// Where a head is written to, before its body is pushed.
    pub fn head(&mut self, framing: Framing) -> &mut BytesMut {
        self.framing = framing;
        self.pre.reserve(1024);
        &mut self.pre
    }

    /// Whether the message is whole, as far as it was pushed.
    pub fn is_between_messages(&self) -> bool {
        matches!(self.framing, Framing::None | Framing::Length(0) | Framing::Complete)
    }

    /// Whether the message ends with the connection.
    pub fn is_raw(&self) -> bool {
        self.framing == Framing::Raw
    }

    /// The other side sees the end once all is flushed.
    pub fn shut(&mut self) {
        self.framing = Framing::Raw;
        self.is_shutting = true;
    }

    fn poll_write_out(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        while !(self.pre.is_empty() && self.body.is_empty() && self.post.is_empty()) {
            let slices = [IoSlice::new(&self.pre), IoSlice::new(&self.body), IoSlice::new(self.post)];
            let used = match (self.pre.is_empty(), self.body.is_empty() && self.post.is_empty()) {
                (true, _) => slices.get(1..),
                (false, true) => slices.get(..1),
                (false, false) => slices.get(..),
            };
            let count = ready!(self.write.poll_write(cx, used.unwrap_or_default()))?;
            if count == 0 {
                return Poll::Ready(Err(Broken::Closed));
            }
            self.is_flushed = false;
            self.advance(count);
        }
        Poll::Ready(Ok(()))
    }

    fn advance(&mut self, mut count: usize) {
        let of_pre = count.min(self.pre.len());
        if of_pre == self.pre.len() {
            // Keeps its memory, other than `advance`.
            self.pre.clear();
        } else {
            self.pre.advance(of_pre);
        }
        count -= of_pre;
        let of_body = count.min(self.body.len());
        self.body.advance(of_body);
        if self.body.is_empty() {
            self.body = Bytes::new();
        }
        count -= of_body;
        self.post = self.post.get(count..).unwrap_or_default();
    }

    fn push_data(&mut self, data: Bytes) -> Result<(), Broken> {
        match &mut self.framing {
            Framing::None | Framing::Complete => {
                return Err(Broken::Malformed("There is more than a whole body."));
            }
            Framing::Length(left) => {
                *left = left
                    .checked_sub(data.len() as u64)
                    .ok_or(Broken::Malformed("The body is longer than its head says."))?;
            }
            Framing::Chunked => {
                put_hex(&mut self.pre, data.len());
                self.pre.extend_from_slice(b"\r\n");
                self.post = CHUNK_END;
            }
            Framing::Raw => {}
        }
        if data.len() <= SMALL_BYTES {
            self.pre.extend_from_slice(&data);
            self.pre.extend_from_slice(std::mem::take(&mut self.post));
        } else {
            self.body = data;
        }
        Ok(())
    }
}

impl Outgoing for Writer {
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        if self.pre.len() < ENOUGH_BYTES && self.body.is_empty() && self.post.is_empty() {
            return Poll::Ready(Ok(()));
        }
        self.poll_write_out(cx)
    }

    fn push(&mut self, frame: Frame) -> Result<(), Broken> {
        match frame {
            Frame::Data(data) => self.push_data(data),
            Frame::Trailers(fields) if self.framing == Framing::Chunked => {
                self.pre.extend_from_slice(b"0\r\n");
                put_fields(&mut self.pre, &fields);
                self.pre.extend_from_slice(b"\r\n");
                self.framing = Framing::Complete;
                Ok(())
            }
            // Fields after a body of known length have no place (RFC 9110, section 6.5.1, lets them be discarded).
            Frame::Trailers(_) => Ok(()),
        }
    }

    fn end(&mut self) -> Result<(), Broken> {
        match self.framing {
            Framing::Length(1..) => return Err(Broken::Malformed("The body is shorter than its head says.")),
            Framing::None | Framing::Length(0) | Framing::Complete => {}
            Framing::Chunked => {
                if self.body.is_empty() {
                    self.pre.extend_from_slice(LAST_CHUNK);
                } else {
                    self.post = CHUNK_END_AND_LAST;
                }
                self.framing = Framing::Complete;
            }
            Framing::Raw => self.is_shutting = true,
        }
        Ok(())
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        ready!(self.poll_write_out(cx))?;
        if !self.is_flushed {
            ready!(self.write.poll_flush(cx))?;
            self.is_flushed = true;
        }
        if self.is_shutting {
            // Whoever is gone already has seen the end.
            let _ = ready!(self.write.poll_shutdown(cx));
            self.is_shutting = false;
        }
        Poll::Ready(Ok(()))
    }
}

/// The first line of an answer.
pub(crate) fn put_status(buffer: &mut BytesMut, status: StatusCode) {
    buffer.extend_from_slice(b"HTTP/1.1 ");
    buffer.extend_from_slice(status.as_str().as_bytes());
    buffer.extend_from_slice(b" ");
    buffer.extend_from_slice(status.canonical_reason().unwrap_or_default().as_bytes());
    buffer.extend_from_slice(b"\r\n");
}

/// Fields, without the empty line.
pub(crate) fn put_fields(buffer: &mut BytesMut, fields: &HeaderMap) {
    for (name, value) in fields {
        put_field(buffer, name.as_str(), value.as_bytes());
    }
}

/// One field.
pub(crate) fn put_field(buffer: &mut BytesMut, name: &str, value: &[u8]) {
    buffer.reserve(name.len() + value.len() + 4);
    buffer.extend_from_slice(name.as_bytes());
    buffer.extend_from_slice(b": ");
    buffer.extend_from_slice(value);
    buffer.extend_from_slice(b"\r\n");
}

/// What tells the body's end.
pub(crate) fn put_framing(buffer: &mut BytesMut, framing: Framing) {
    match framing {
        Framing::Length(length) => {
            let mut digits = [0; 20];
            put_field(buffer, "content-length", decimal(length, &mut digits));
        }
        Framing::Chunked => buffer.extend_from_slice(b"transfer-encoding: chunked\r\n"),
        Framing::None | Framing::Complete | Framing::Raw => {}
    }
}

/// A number's digits.
pub(crate) fn decimal(mut number: u64, digits: &mut [u8; 20]) -> &[u8] {
    let mut start = digits.len();
    for place in digits.iter_mut().rev() {
        *place = b'0' + (number % 10) as u8;
        number /= 10;
        start -= 1;
        if number == 0 {
            break;
        }
    }
    digits.get(start..).unwrap_or_default()
}

fn put_hex(buffer: &mut BytesMut, number: usize) {
    let digits = (usize::BITS - number.leading_zeros()).div_ceil(4).max(1);
    for place in (0..digits).rev() {
        let digit = (number >> (4 * place)) & 0xf;
        buffer.extend_from_slice(&[b"0123456789abcdef".get(digit).copied().unwrap_or(b'0')]);
    }
}
