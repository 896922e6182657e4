//! The client's end of a session: frames in both directions, usable from several threads. With frames kept until the other
//! side has counted them, the connection below it can be replaced.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use protocol::frame::{self, FrameError};
use protocol::replay::Sent;
use protocol::session::{FromSession, Request, ToSession};

use crate::error::{Context, Result};

/// More than any machine leaves uncounted that keeps to the protocol.
const MAX_KEPT_BYTES: usize = 2 << 20;

/// One session. Clones share it, and a whole frame at a time is written.
#[derive(Clone, Debug)]
pub struct Link {
    stream: Arc<Mutex<Arc<UnixStream>>>,
    sending: Arc<Mutex<Sending>>,
}

/// What whoever writes must have to himself.
#[derive(Debug, Default)]
struct Sending {
    /// What the other side has not counted, where it counts.
    kept: Option<Sent>,
    /// What the other side had counted when this connection began, where each side of it counts from nothing.
    base: u64,
    counted: u64,
    /// What is said once and holds for every connection, where the other side does not remember it.
    standing: Option<Vec<ToSession>>,
    /// The connection takes nothing any more, and will be replaced.
    is_broken: bool,
}

/// What the other side says, in order.
#[derive(Debug)]
pub struct Frames {
    stream: Arc<UnixStream>,
    decoder: frame::Decoder,
    chunk: Vec<u8>,
    last_bytes: usize,
}

impl Link {
    /// A link over a connection that is ready for the first frame.
    pub fn new(stream: UnixStream) -> Link {
        Link { stream: Arc::new(Mutex::new(Arc::new(stream))), sending: Arc::default() }
    }

    /// From now on what is sent is kept until it is counted, and sending never fails for want of a connection.
    pub fn outlast(&self) {
        lock(&self.sending).kept.get_or_insert_default();
    }

    /// As [`Self::outlast`], where the other side of each connection knows nothing of the one before.
    pub fn outlast_others(&self) {
        self.outlast();
        lock(&self.sending).standing.get_or_insert_default();
    }

    /// Says what the session is for.
    ///
    /// # Errors
    /// The request is longer than a frame may be, as of a command with very many arguments.
    pub fn request(&self, request: &Request) -> Result<()> {
        let _sending = lock(&self.sending);
        match frame::write(&mut &*self.stream(), request) {
            // A machine that refuses the session has said why before it closed, and that is still to be read.
            Err(FrameError::Io(_)) => Ok(()),
            other => other.context("cannot ask the machine"),
        }
    }

    /// Sends a frame.
    ///
    /// # Errors
    /// The connection is broken, or the other side counts nothing although it should.
    pub fn send(&self, message: &ToSession) -> std::result::Result<(), FrameError> {
        let frame = frame::encode(message)?;
        let mut sending = lock(&self.sending);
        let Sending { kept, is_broken, standing, .. } = &mut *sending;
        let Some(kept) = kept else { return Ok((&*self.stream()).write_all(&frame)?) };
        if let Some(standing) = standing
            && matters_always(message)
        {
            standing.retain(|other| std::mem::discriminant(other) != std::mem::discriminant(message));
            standing.push(message.clone());
        }
        if kept.bytes() > MAX_KEPT_BYTES {
            return Err(io::Error::other("the machine does not say what it has received").into());
        }
        *is_broken = *is_broken || (&*self.stream()).write_all(&frame).is_err();
        kept.keep(frame);
        Ok(())
    }

    /// Tells how many frames were received in all.
    pub fn tell_received(&self, frames: u64) {
        let mut sending = lock(&self.sending);
        if let Ok(frame) = frame::encode(&ToSession::Received { frames })
            && !sending.is_broken
        {
            sending.is_broken = (&*self.stream()).write_all(&frame).is_err();
        }
    }

    /// The other side has received so many frames in all. False if that cannot be.
    pub fn counted(&self, frames: u64) -> bool {
        let mut sending = lock(&self.sending);
        let Sending { kept, base, counted, .. } = &mut *sending;
        *counted = base.saturating_add(frames);
        kept.as_mut().is_some_and(|kept| kept.counted(*counted))
    }

    /// Goes on over another connection, whose other end has received so many frames in all. False if that cannot be.
    pub fn go_on(&self, stream: Arc<UnixStream>, received: u64) -> bool {
        self.replace(stream, |sending| sending.kept.as_mut().is_some_and(|kept| kept.counted(received)))
    }

    /// Goes on over another connection, whose other end knows nothing of the one before.
    pub fn begin_again(&self, stream: Arc<UnixStream>) -> bool {
        self.replace(stream, |sending| {
            let Sending { kept: Some(kept), base, counted, standing, .. } = sending else { return false };
            *base = *counted;
            for message in standing.iter().flatten() {
                // None that is made here is too long.
                frame::encode(message).into_iter().for_each(|frame| kept.keep(frame));
            }
            true
        })
    }

    fn replace(&self, stream: Arc<UnixStream>, prepare: impl FnOnce(&mut Sending) -> bool) -> bool {
        // Whoever still writes to the old one is to stop.
        self.close();
        let mut sending = lock(&self.sending);
        let can = prepare(&mut sending);
        if let Some(kept) = sending.kept.as_ref().filter(|_| can) {
            let missing = kept.missing();
            *lock(&self.stream) = Arc::clone(&stream);
            sending.is_broken = (&*stream).write_all(&missing).is_err();
        }
        can
    }

    /// The frames that come. To be called once.
    pub fn frames(&self) -> Frames {
        Frames::of(self.stream())
    }

    /// Ends the conversation: whoever waits for a frame sees its end.
    pub fn close(&self) {
        let _ = self.stream().shutdown(Shutdown::Both);
    }

    fn stream(&self) -> Arc<UnixStream> {
        Arc::clone(&lock(&self.stream))
    }
}

/// Whether something holds until it is said otherwise.
fn matters_always(message: &ToSession) -> bool {
    match message {
        ToSession::StdinEnd | ToSession::CloseStdout | ToSession::CloseStderr | ToSession::Resize(_) => true,
        ToSession::Stdin(_) | ToSession::Signal { .. } | ToSession::Received { .. } => false,
    }
}

impl Frames {
    /// What comes over this connection.
    pub fn of(stream: Arc<UnixStream>) -> Frames {
        let chunk = vec![0; frame::MAX_FRAME_BYTES];
        Frames { stream, decoder: frame::Decoder::default(), chunk, last_bytes: 0 }
    }

    /// How long the last frame was, in bytes.
    pub fn last_bytes(&self) -> usize {
        self.last_bytes
    }

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
            let before = self.decoder.len();
            if let Some(message) = self.decoder.decode()? {
                self.last_bytes = before - self.decoder.len();
                return Ok(Some(message));
            }
            match (&*self.stream).read(&mut self.chunk) {
                Ok(0) => return Ok(None),
                Ok(count) => self.decoder.push(self.chunk.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// A thread that panicked while it held one of these has left nothing half done that another could use.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stdin(bytes: &[u8]) -> ToSession {
        ToSession::Stdin(bytes.to_vec())
    }

    fn heard(stream: &mut UnixStream) -> ToSession {
        frame::read(stream).unwrap().unwrap()
    }

    #[test]
    fn what_the_other_side_has_not_counted_is_sent_again_over_the_next_connection() {
        let (ours, mut first) = UnixStream::pair().unwrap();
        let link = Link::new(ours);
        link.outlast();
        for bytes in [b"a", b"b", b"c"] {
            link.send(&stdin(bytes)).unwrap();
        }
        assert_eq!(heard(&mut first), stdin(b"a"));
        assert!(link.counted(1));
        drop(first);
        // To nobody, for the time being.
        link.send(&stdin(b"d")).unwrap();
        link.send(&stdin(b"e")).unwrap();
        let (ours, mut second) = UnixStream::pair().unwrap();
        assert!(link.go_on(Arc::new(ours), 2));
        for bytes in [b"c", b"d", b"e"] {
            assert_eq!(heard(&mut second), stdin(bytes));
        }
        link.send(&stdin(b"f")).unwrap();
        assert_eq!(heard(&mut second), stdin(b"f"));
        let (ours, _third) = UnixStream::pair().unwrap();
        assert!(!link.go_on(Arc::new(ours), 7), "frames that were never sent were counted");
    }

    #[test]
    fn one_who_knows_nothing_is_told_what_is_missing_and_what_still_holds() {
        let (ours, mut first) = UnixStream::pair().unwrap();
        let link = Link::new(ours);
        link.outlast_others();
        link.send(&stdin(b"a")).unwrap();
        link.send(&ToSession::CloseStderr).unwrap();
        link.send(&stdin(b"b")).unwrap();
        assert_eq!(heard(&mut first), stdin(b"a"));
        assert!(link.counted(2));
        for connection in [2, 3] {
            let (ours, mut next) = UnixStream::pair().unwrap();
            assert!(link.begin_again(Arc::new(ours)));
            if connection == 2 {
                assert_eq!(heard(&mut next), stdin(b"b"));
                assert!(link.counted(1));
            }
            assert_eq!(heard(&mut next), ToSession::CloseStderr);
            assert!(link.counted(if connection == 2 { 2 } else { 1 }));
        }
        assert!(!link.counted(9));
    }

    #[test]
    fn a_machine_that_counts_nothing_is_not_sent_more_and_more() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let link = Link::new(ours);
        link.outlast();
        let refused = (0..1000).find(|_| link.send(&stdin(&[0; 10_000])).is_err());
        assert!(refused.is_some_and(|count| (100..400).contains(&count)), "{refused:?}");
    }

    #[test]
    fn without_that_a_broken_connection_is_an_error() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(Link::new(ours).send(&stdin(b"a")).is_err());
    }
}
