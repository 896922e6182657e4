//! Joins the user's streams, terminal and signals with a session's frames, until either ends.
//!
//! A thread for each direction, because the user's end may be anything (a terminal, a pipe, a file) and must block
//! nobody else. Input keeps to the session's window, so that signals never wait behind it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use protocol::frame::FrameError;
use protocol::session::{FromSession, MAX_CHUNK, ToSession};
use signal_hook::iterator::{Handle, Signals};

use super::detach_keys::DetachKeys;
use super::returning::{Return, Returning};
use super::window::Window;
use super::{End, Link, unasked};
use crate::error::{Context, Error, Result};
use crate::interrupt::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
use crate::terminal::{self, RawMode};

/// After so many interrupts flyrun itself ends.
const INSISTENCE: u32 = 3;

/// How the user takes part.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wishes {
    /// Standard input is passed on.
    pub stdin: bool,
    /// The other side has a terminal. With `stdin` the user's becomes raw, and the detach keys work.
    pub tty: bool,
}

/// What the threads share.
#[derive(Clone, Debug)]
struct Shared {
    link: Link,
    window: Arc<Window>,
    /// Why a thread of this side has closed the connection.
    closed: Arc<Mutex<Option<End>>>,
}

/// Talks until the end, over one connection or several. The request has been sent.
///
/// # Errors
/// The terminal cannot be used, or the other side does not keep to the protocol.
pub fn drive(link: &Link, wishes: Wishes, returning: &mut dyn Returning) -> Result<End> {
    let shared = Shared { link: link.clone(), window: Arc::default(), closed: Arc::default() };
    let signals = watch_signals(shared.clone(), wishes.tty).context("cannot watch for signals")?;
    let raw = wishes.tty && wishes.stdin;
    let raw_mode = if raw { RawMode::enter().context("cannot use the terminal")? } else { None };
    if wishes.stdin {
        let keys = raw_mode.is_some().then(DetachKeys::default);
        let stdin = io::stdin().as_fd().try_clone_to_owned().context("cannot use standard input")?;
        let feeder = shared.clone();
        spawn("stdin", move || feed(File::from(stdin), keys, &feeder)).context("cannot start a thread")?;
    }
    let end = listen(&shared, returning);
    drop(raw_mode);
    signals.close();
    end
}

/// Takes what the other side says. Blocks when the user does not read, and so in the end the process too.
fn listen(shared: &Shared, returning: &mut dyn Returning) -> Result<End> {
    let mut frames = shared.link.frames();
    let mut ears = Ears::open()?;
    let mut is_suspended = false;
    loop {
        match frames.next() {
            Ok(Some(frame)) => match ears.hear(frame, shared)? {
                Heard::Frame => returning.received(frames.last_bytes()),
                Heard::Count => {}
                Heard::Suspended => is_suspended = true,
                Heard::Last(end) => return Ok(end),
            },
            Ok(None) | Err(FrameError::Io(_)) => {
                if let Some(end) = shared.closed() {
                    return Ok(end);
                }
                match returning.come_back(std::mem::take(&mut is_suspended), &|| shared.closed().is_some())? {
                    Return::Back(next) => frames = next,
                    Return::Over(end) => return Ok(shared.closed().unwrap_or(end)),
                }
            }
            Err(error) => return Err(Error::caused("lost the machine", &error)),
        }
    }
}

/// What the other side has said.
enum Heard {
    /// A frame like others.
    Frame,
    /// How much it has received, which is no frame of the session's.
    Count,
    /// That the machine is suspended.
    Suspended,
    /// The last frame.
    Last(End),
}

/// Where what the other side says goes.
struct Ears {
    stdout: Sink,
    stderr: Sink,
}

impl Ears {
    fn open() -> Result<Ears> {
        let stdout = Sink::new(io::stdout().as_fd(), ToSession::CloseStdout)?;
        Ok(Ears { stdout, stderr: Sink::new(io::stderr().as_fd(), ToSession::CloseStderr)? })
    }

    fn hear(&mut self, frame: FromSession, shared: &Shared) -> Result<Heard> {
        match frame {
            FromSession::Started { .. } => {}
            FromSession::StdinTaken { bytes } => shared.window.widen(bytes as usize),
            FromSession::Stdout(bytes) => self.stdout.write(&bytes, &shared.link),
            FromSession::Stderr(bytes) => self.stderr.write(&bytes, &shared.link),
            FromSession::Received { frames } if shared.link.counted(frames) => return Ok(Heard::Count),
            FromSession::Suspended => return Ok(Heard::Suspended),
            FromSession::Exited(status) => return Ok(Heard::Last(End::Exited(status))),
            FromSession::Failed { kind, message } => return Ok(Heard::Last(End::Failed { kind, message })),
            _ => return Err(unasked()),
        }
        Ok(Heard::Frame)
    }
}

/// One of the user's outputs, until nobody reads it any more.
struct Sink {
    file: Option<File>,
    told_when_closed: ToSession,
}

impl Sink {
    fn new(fd: impl AsFd, told_when_closed: ToSession) -> Result<Sink> {
        let fd = fd.as_fd().try_clone_to_owned().context("cannot use the standard streams")?;
        Ok(Sink { file: Some(File::from(fd)), told_when_closed })
    }

    fn write(&mut self, bytes: &[u8], link: &Link) {
        if let Some(file) = &mut self.file
            && file.write_all(bytes).is_err()
        {
            self.file = None;
            // If the other side is gone too, that is seen when the next frame is waited for.
            let _ = link.send(&self.told_when_closed);
        }
    }
}

/// Passes input on as far as the window goes; its end is the end of the other side's.
fn feed(mut source: File, mut keys: Option<DetachKeys>, shared: &Shared) {
    let mut buffer = vec![0; MAX_CHUNK];
    loop {
        let room = shared.window.wait().min(buffer.len());
        let count = match source.read(buffer.get_mut(..room).unwrap_or_default()) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        let bytes = buffer.get(..count).unwrap_or_default();
        let (bytes, detach) = match &mut keys {
            Some(keys) => {
                let typed = keys.typed(bytes);
                (typed.bytes, typed.detach)
            }
            None => (bytes.to_vec(), false),
        };
        shared.window.narrow(bytes.len());
        if !bytes.is_empty() && shared.link.send(&ToSession::Stdin(bytes)).is_err() {
            return;
        }
        if detach {
            return shared.close(End::Detached);
        }
    }
    let _ = shared.link.send(&ToSession::StdinEnd);
}

fn watch_signals(shared: Shared, tty: bool) -> io::Result<Handle> {
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH])?;
    let handle = signals.handle();
    spawn("signals", move || {
        let mut interrupts = 0;
        for signal in signals.forever() {
            let frame = match signal {
                SIGWINCH if tty => ToSession::Resize(terminal::size()),
                SIGWINCH => continue,
                signal => ToSession::Signal { signal },
            };
            interrupts += u32::from(signal == SIGINT);
            if interrupts == INSISTENCE {
                return shared.close(End::Interrupted);
            }
            if shared.link.send(&frame).is_err() {
                return;
            }
        }
    })?;
    Ok(handle)
}

impl Shared {
    fn close(&self, end: End) {
        self.closed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(end);
        self.link.close();
    }

    fn closed(&self) -> Option<End> {
        self.closed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.into()).stack_size(128 * 1024).spawn(body).map(drop)
}
