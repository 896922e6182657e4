//! Where a workload's output goes, and where its input comes from: flyrun's own streams, the log, attached clients.

use std::fs::File;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use protocol::frame;
use protocol::session::FromSession;

use super::log::{self, Stream};
use crate::error::{Context, Result};

/// How long an attached client may take to read what it was sent. A slower one is sent away, and finds the rest in the log.
const CLIENT_PATIENCE: Duration = Duration::from_secs(10);
/// More clients than this cannot attach at once.
const MAX_CLIENTS: usize = 64;

/// flyrun's own standard output and standard error.
#[derive(Debug)]
pub struct Own {
    stdout: File,
    stderr: File,
}

impl Own {
    pub fn streams() -> Result<Own> {
        let clone = |fd: &dyn AsFd| fd.as_fd().try_clone_to_owned().map(File::from);
        Ok(Own {
            stdout: clone(&io::stdout()).context("cannot use standard output")?,
            stderr: clone(&io::stderr()).context("cannot use standard error")?,
        })
    }
}

/// Where output goes.
#[derive(Debug)]
pub struct Outputs {
    own: Option<Own>,
    log: Option<Mutex<log::Writer>>,
    clients: Mutex<Clients>,
}

#[derive(Debug, Default)]
struct Clients {
    attached: Vec<Client>,
    last_id: u64,
}

/// Somebody who follows the workload's streams.
#[derive(Debug)]
struct Client {
    id: u64,
    stream: UnixStream,
    /// Whether it wants no more of standard output, and of standard error.
    closed: [bool; 2],
}

impl Client {
    /// Sends a frame; a client that does not take it in time is sent away.
    fn send(&mut self, frame: &[u8]) -> bool {
        let taken = self.stream.write_all(frame).is_ok();
        if !taken {
            let _ = self.stream.shutdown(Shutdown::Both);
        }
        taken
    }
}

impl Outputs {
    pub fn new(own: Option<Own>, log: Option<log::Writer>) -> Outputs {
        Outputs { own, log: log.map(Mutex::new), clients: Mutex::default() }
    }

    /// Passes on what the workload wrote, at most [`protocol::session::MAX_CHUNK`] bytes.
    ///
    /// # Errors
    /// flyrun's own stream takes nothing any more: the workload is told so, as by a pipe.
    pub fn deliver(&self, stream: Stream, bytes: &[u8]) -> io::Result<()> {
        let written = match (&self.own, stream) {
            (Some(own), Stream::Stdout) => (&own.stdout).write_all(bytes),
            (Some(own), Stream::Stderr) => (&own.stderr).write_all(bytes),
            (None, _) => Ok(()),
        };
        if let Some(log) = &self.log {
            lock(log).write(stream, bytes, SystemTime::now());
        }
        let clients = &mut lock(&self.clients).attached;
        if !clients.is_empty() {
            let frame = match stream {
                Stream::Stdout => FromSession::Stdout(bytes.to_vec()),
                Stream::Stderr => FromSession::Stderr(bytes.to_vec()),
            };
            if let Ok(frame) = frame::encode(&frame) {
                clients.retain_mut(|client| client.closed[stream as usize] || client.send(&frame));
            }
        }
        written
    }

    /// Adds a client, which gets all output from now on, and returns its number.
    ///
    /// # Errors
    /// Too many are attached already.
    pub fn attach(&self, stream: UnixStream) -> io::Result<u64> {
        stream.set_write_timeout(Some(CLIENT_PATIENCE))?;
        let mut clients = lock(&self.clients);
        if clients.attached.len() >= MAX_CLIENTS {
            return Err(io::Error::other(format!("{MAX_CLIENTS} clients are attached, and no more can be")));
        }
        clients.last_id += 1;
        let id = clients.last_id;
        clients.attached.push(Client { id, stream, closed: [false; 2] });
        Ok(id)
    }

    /// Tells one client something.
    pub fn tell(&self, id: u64, message: &FromSession) {
        let Ok(frame) = frame::encode(message) else { return };
        lock(&self.clients).attached.retain_mut(|client| client.id != id || client.send(&frame));
    }

    /// A client wants no more of one stream.
    pub fn close(&self, id: u64, stream: Stream) {
        for client in lock(&self.clients).attached.iter_mut().filter(|client| client.id == id) {
            client.closed[stream as usize] = true;
        }
    }

    /// A client has left.
    pub fn detach(&self, id: u64) {
        lock(&self.clients).attached.retain(|client| client.id != id);
    }

    /// Tells every client, for the last time.
    pub fn finish(&self, last: &FromSession) {
        if let Some(log) = &self.log {
            lock(log).flush(SystemTime::now());
        }
        let Ok(frame) = frame::encode(last) else { return };
        for mut client in lock(&self.clients).attached.drain(..) {
            client.send(&frame);
        }
    }
}

/// The way to the workload's standard input, from whoever has something for it.
#[derive(Debug, Default)]
pub struct Input {
    state: Mutex<InputState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct InputState {
    stream: Option<UnixStream>,
    /// This life's input has ended.
    ended: bool,
    /// Every life's: flyrun's own input was read to its end.
    exhausted: bool,
    /// Something is being written without the lock.
    writing: bool,
    /// The stream that it is written to, and that ends behind it.
    held: Option<UnixStream>,
}

impl Input {
    /// The guest has opened the stream. If the end of the input came before, it ends at once.
    pub fn connect(&self, stream: UnixStream) {
        let mut state = lock(&self.state);
        if state.ended || state.exhausted {
            let _ = stream.shutdown(Shutdown::Write);
        }
        state.stream = Some(stream);
        self.changed.notify_all();
    }

    /// The machine is between two lives; writers wait for the next.
    pub fn disconnect(&self) {
        let mut state = lock(&self.state);
        if let Some(stream) = state.stream.take() {
            let _ = stream.shutdown(Shutdown::Write);
        }
        state.ended = false;
    }

    /// Lets nobody write until the guest connects again, and tells the guest that nothing comes until then. What is being
    /// written at this moment is written whole first: the guest takes it.
    pub fn hold(&self) {
        let mut state = lock(&self.state);
        let Some(stream) = state.stream.take() else { return };
        match state.writing {
            true => state.held = Some(stream),
            false => _ = stream.shutdown(Shutdown::Write),
        }
    }

    /// Passes input on, waiting for the guest where it must, and says so by `written` before the stream may be held. `false` if
    /// nobody reads it.
    pub fn write(&self, bytes: &[u8], written: impl FnOnce()) -> bool {
        let mut state = lock(&self.state);
        while state.stream.is_none() || state.writing {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        // Without the lock: the guest may take its time, and others must be able to end the input meanwhile.
        let stream = state.stream.as_ref().and_then(|stream| stream.try_clone().ok());
        state.writing = true;
        drop(state);
        let taken = stream.is_some_and(|mut stream| stream.write_all(bytes).is_ok());
        written();
        let mut state = lock(&self.state);
        state.writing = false;
        if let Some(held) = state.held.take() {
            let _ = held.shutdown(Shutdown::Write);
        }
        drop(state);
        self.changed.notify_all();
        taken
    }

    /// There is no more.
    pub fn end(&self) {
        let mut state = lock(&self.state);
        state.ended = true;
        if let Some(stream) = &state.stream {
            let _ = stream.shutdown(Shutdown::Write);
        }
    }
}

/// Reads flyrun's own standard input into the workload's.
pub fn feed(source: OwnedFd, input: &Input) {
    use std::io::Read;
    let mut source = File::from(source);
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match source.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                if !input.write(buffer.get(..count).unwrap_or_default(), || {}) {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    lock(&input.state).exhausted = true;
    input.end();
}

/// A thread that panicked while it held one of these has left nothing half done that matters here.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn clients_hear_what_is_written_from_their_arrival_to_the_end() {
        let outputs = Outputs::new(None, None);
        outputs.deliver(Stream::Stdout, b"before").unwrap();
        let (mut client, ours) = UnixStream::pair().unwrap();
        outputs.attach(ours).unwrap();
        outputs.deliver(Stream::Stderr, b"hello").unwrap();
        let last = FromSession::Exited(protocol::ExitStatus::Code(3));
        outputs.finish(&last);
        assert_eq!(frame::read(&mut client).unwrap(), Some(FromSession::Stderr(b"hello".to_vec())));
        assert_eq!(frame::read(&mut client).unwrap(), Some(last));
        assert_eq!(frame::read::<FromSession>(&mut client).unwrap(), None);
    }

    #[test]
    fn a_client_that_has_left_holds_nobody_up() {
        let outputs = Outputs::new(None, None);
        let (client, ours) = UnixStream::pair().unwrap();
        outputs.attach(ours).unwrap();
        drop(client);
        outputs.deliver(Stream::Stdout, b"x").unwrap();
        assert!(lock(&outputs.clients).attached.is_empty());
    }

    #[test]
    fn input_waits_for_the_guest_and_its_end_is_kept() {
        let input = Input::default();
        let (mut guest, ours) = UnixStream::pair().unwrap();
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| input.write(b"early", || {}));
            input.connect(ours);
            assert!(writer.join().unwrap());
            input.end();
        });
        let mut text = String::new();
        guest.read_to_string(&mut text).unwrap();
        assert_eq!(text, "early");
    }

    #[test]
    fn input_that_is_held_goes_on_with_the_next_connection() {
        let input = Input::default();
        let (mut first, ours) = UnixStream::pair().unwrap();
        input.connect(ours);
        assert!(input.write(b"one", || {}));
        input.hold();
        let mut text = String::new();
        first.read_to_string(&mut text).unwrap();
        assert_eq!(text, "one");
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| input.write(b"two", || {}));
            let (mut second, ours) = UnixStream::pair().unwrap();
            input.connect(ours);
            assert!(writer.join().unwrap());
            input.end();
            text.clear();
            second.read_to_string(&mut text).unwrap();
        });
        assert_eq!(text, "two");
    }

    #[test]
    fn holding_waits_for_nobody_and_what_is_being_written_arrives_whole() {
        let input = Input::default();
        let (mut guest, ours) = UnixStream::pair().unwrap();
        input.connect(ours);
        // More than any socket takes at once.
        let bytes = vec![7; 4 << 20];
        let told = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| input.write(&bytes, || told.store(true, Ordering::SeqCst)));
            let mut received = vec![0; 1];
            guest.read_exact(&mut received).unwrap();
            input.hold();
            assert!(!told.load(Ordering::SeqCst));
            guest.read_to_end(&mut received).unwrap();
            assert!(received == bytes);
            assert!(writer.join().unwrap() && told.load(Ordering::SeqCst));
        });
    }

    #[test]
    fn an_input_that_ended_before_the_guest_came_is_empty() {
        let input = Input::default();
        input.end();
        let (mut guest, ours) = UnixStream::pair().unwrap();
        input.connect(ours);
        assert_eq!(guest.read(&mut [0; 4]).unwrap(), 0);
    }
}
