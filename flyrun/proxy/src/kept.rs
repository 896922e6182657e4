//! A request's body that may have to be sent again, because the answer is fly-replay.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use bytes::Bytes;

use crate::wire::{Broken, Frame, Incoming};

/// More of one body is not kept, as at Fly.
pub(crate) const MAX_BYTES: usize = 1 << 20;
/// Nor of all bodies together.
const MAX_TOTAL_BYTES: usize = 64 << 20;

/// Passes a body on, and keeps its beginning as long as that is all there was.
pub(crate) struct Kept<'k, I> {
    pub inner: &'k mut I,
    total: &'k AtomicUsize,
    pieces: Vec<Bytes>,
    bytes: usize,
    /// The next piece to give again.
    position: usize,
    is_whole: bool,
    /// The client has sent something that no longer exists.
    is_lost: bool,
    /// There is no body, and what follows is for later.
    is_withheld: bool,
}

impl<'k, I: Incoming> Kept<'k, I> {
    pub fn new(inner: &'k mut I, total: &'k AtomicUsize) -> Self {
        Kept {
            inner,
            total,
            pieces: Vec::new(),
            bytes: 0,
            position: 0,
            is_whole: true,
            is_lost: false,
            is_withheld: false,
        }
    }

    /// Nothing of it has been taken from the client.
    pub fn is_untouched(&self) -> bool {
        self.bytes == 0 && !self.is_lost
    }

    /// From the beginning again; false if that is gone.
    pub fn rewind(&mut self) -> bool {
        self.position = 0;
        !self.is_lost
    }

    /// There is no body, and bytes may follow if the machine agrees.
    pub fn withhold(&mut self) {
        self.is_withheld = true;
    }

    /// It will not be sent again.
    pub fn forget(&mut self) {
        self.is_whole = false;
        // What was given again already is not needed; the rest still is.
        self.pieces.drain(..self.position.min(self.pieces.len()));
        self.position = 0;
        self.is_lost |= self.bytes > 0;
        self.total.fetch_sub(self.bytes, Ordering::Relaxed);
        self.bytes = 0;
    }

    fn keep(&mut self, data: &Bytes) {
        let total = self.total.fetch_add(data.len(), Ordering::Relaxed) + data.len();
        self.bytes += data.len();
        self.pieces.push(data.clone());
        self.position = self.pieces.len();
        if self.bytes > MAX_BYTES || total > MAX_TOTAL_BYTES {
            self.forget();
        }
    }
}

impl<I: Incoming> Incoming for Kept<'_, I> {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, Broken>>> {
        if self.is_withheld {
            return Poll::Ready(None);
        }
        if let Some(piece) = self.pieces.get(self.position) {
            let data = piece.clone();
            self.position += 1;
            return Poll::Ready(Some(Ok(Frame::Data(data))));
        }
        let frame = ready!(self.inner.poll_frame(cx));
        match &frame {
            Some(Ok(Frame::Data(data))) if self.is_whole => self.keep(data),
            Some(Ok(Frame::Data(_))) => self.is_lost = true,
            // Seldom, and gone with the first sending.
            Some(Ok(Frame::Trailers(_))) => {
                self.forget();
                self.is_lost = true;
            }
            Some(Err(_)) | None => {}
        }
        Poll::Ready(frame)
    }

    fn raw(&mut self) {
        self.is_withheld = false;
        self.inner.raw();
    }

    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.inner.poll_gone(cx)
    }
}

impl<I> Drop for Kept<'_, I> {
    fn drop(&mut self) {
        self.total.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
