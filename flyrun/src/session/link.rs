//! The client's end of a session: frames in both directions, usable from several threads.

use std::io::Read;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use protocol::frame::{self, FrameError};
use protocol::session::{FromSession, Request, ToSession};
use serde::Serialize;

use crate::error::{Context, Result};

/// One connection. Clones share it, and a whole frame at a time is written.
#[derive(Clone, Debug)]
pub struct Link {
    stream: Arc<UnixStream>,
    writing: Arc<Mutex<()>>,
}

/// What the other side says, in order.
#[derive(Debug)]
pub struct Frames {
    stream: Arc<UnixStream>,
    decoder: frame::Decoder,
    chunk: Vec<u8>,
}

impl Link {
    /// A link over a connection that is ready for the first frame.
    pub fn new(stream: UnixStream) -> Link {
        Link { stream: Arc::new(stream), writing: Arc::default() }
    }

    /// Says what the session is for.
    ///
    /// # Errors
    /// The request is longer than a frame may be, as of a command with very many arguments.
    pub fn request(&self, request: &Request) -> Result<()> {
        match self.write(request) {
            // A machine that refuses the session has said why before it closed, and that is still to be read.
            Err(FrameError::Io(_)) => Ok(()),
            other => other.context("cannot ask the machine"),
        }
    }

    /// Sends a frame.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn send(&self, message: &ToSession) -> std::result::Result<(), FrameError> {
        self.write(message)
    }

    fn write(&self, message: &impl Serialize) -> std::result::Result<(), FrameError> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        frame::write(&mut &*self.stream, message)
    }

    /// The frames that come. To be called once.
    pub fn frames(&self) -> Frames {
        Frames {
            stream: Arc::clone(&self.stream),
            decoder: frame::Decoder::default(),
            chunk: vec![0; frame::MAX_FRAME_BYTES],
        }
    }

    /// Ends the conversation: whoever waits for a frame sees its end.
    pub fn close(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

impl Frames {
    /// As [`Self::next`], for one who does not wait for ever.
    ///
    /// # Errors
    /// Also when nothing has come by then.
    pub fn next_before(&mut self, deadline: Instant) -> std::result::Result<Option<FromSession>, FrameError> {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        self.stream.set_read_timeout(Some(left))?;
        self.next()
    }

    /// Waits for the next frame; `None` when the other side has ended the conversation.
    ///
    /// # Errors
    /// What came is no frame.
    pub fn next(&mut self) -> std::result::Result<Option<FromSession>, FrameError> {
        loop {
            if let Some(message) = self.decoder.decode()? {
                return Ok(Some(message));
            }
            match (&*self.stream).read(&mut self.chunk) {
                Ok(0) => return Ok(None),
                Ok(count) => self.decoder.push(self.chunk.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }
}
