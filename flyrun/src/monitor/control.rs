//! The monitor's socket: what other flyrun processes ask of a running machine, one request a connection.
//!
//! A request is a line of JSON, and so is each reply. After [`Reply::Attached`] the connection carries the frames of
//! [`protocol::session`] instead.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use protocol::frame;
use protocol::session::{FromSession, ToSession};
use serde::{Deserialize, Serialize};

use super::log::Stream;
use super::outputs::{Input, Outputs};
use crate::error::{Context, Error, Result};
use crate::machine::Changes;
use crate::vm::{Event, Post, spawn};

/// A request is no longer than this.
const MAX_REQUEST: u64 = 64 * 1024;
/// How long a client may take to say what it wants, or to read what it is told.
const CLIENT_PATIENCE: Duration = Duration::from_secs(10);
const MAX_CONVERSATIONS: usize = 256;

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// End the workload: its stop signal, and after so many seconds SIGKILL. Answered when the machine has ended.
    Stop { timeout_s: Option<u32> },
    /// Send the workload a signal.
    Signal { signal: i32 },
    /// Answered when this life of the machine ends.
    Wait,
    /// The same, and before that at once and whenever the lease of the workload changes.
    Follow,
    /// Join the workload's streams.
    Attach,
    /// Give the machine another name.
    Rename { name: String },
    /// Let its virtual machine stand still.
    Pause,
    /// Let it run on.
    Unpause,
    /// Bring it to disk. Answered when that is done.
    Suspend {
        /// Whether copies that do not end in time are cut off, and no reason not to.
        force: bool,
    },
    /// Take a snapshot of it with this id and name, and let it go on. Answered when the snapshot has its place.
    Snapshot {
        id: String,
        name: Option<String>,
        /// As with a suspend.
        force: bool,
    },
    /// Undo a pause, or a suspend that is under way.
    Resume,
    /// Change how it is run.
    Update(Box<Changes>),
}

impl Request {
    /// Whether the workload is to stand still, which it does not as long as something is copied.
    pub fn is_suspend(&self) -> bool {
        matches!(self, Request::Suspend { .. } | Request::Snapshot { .. })
    }
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    Done,
    /// The machine's life ended.
    Ended {
        exit_code: u8,
    },
    /// The workload is to be left running for so long, though nobody may ask it anything.
    Busy {
        seconds: u32,
    },
    /// From now on the connection carries frames.
    Attached {
        terminal: bool,
    },
    /// These changes take effect when the machine starts next, all others have.
    Updated {
        later: Vec<String>,
    },
    Failed {
        message: String,
    },
}

/// One client that has asked for something.
#[derive(Debug)]
pub struct Conversation {
    pub request: Request,
    stream: UnixStream,
    _open: Open,
}

impl Conversation {
    /// Answers. A client that has left need not be told.
    pub fn reply(&mut self, reply: &Reply) {
        let _ = write_line(&mut self.stream, reply);
    }

    /// Nobody waits from now on for this client to read what it is told.
    pub fn impatient(&mut self) {
        let _ = self.stream.set_nonblocking(true);
    }

    /// The connection, for a client that stays.
    pub fn into_stream(self) -> UnixStream {
        self.stream
    }
}

/// Counts the connections there are.
#[derive(Debug)]
struct Open(Arc<AtomicUsize>);

impl Open {
    fn new(count: &Arc<AtomicUsize>) -> Option<Open> {
        let one_more = |open| (open < MAX_CONVERSATIONS).then_some(open + 1);
        count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).ok()?;
        Some(Open(count.clone()))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The path of a machine's control socket in its directory of sockets.
pub fn socket(run_dir: &Path) -> PathBuf {
    run_dir.join("monitor")
}

/// The socket, where nobody answers yet.
#[derive(Debug)]
pub struct Door(UnixListener);

impl Door {
    /// Makes the socket, where clients wait from now on.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn new(run_dir: &Path) -> Result<Door> {
        let path = socket(run_dir);
        UnixListener::bind(&path).map(Door).context(format!("cannot listen on {}", path.display()))
    }

    /// Takes requests, each posted as [`Event::Asked`].
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn open(self, post: Post) -> Result<()> {
        let Door(listener) = self;
        let open = Arc::new(AtomicUsize::new(0));
        spawn("requests", move || {
            for stream in listener.incoming() {
                // Out of descriptors, for instance: those who wait are served when there are some again.
                let Ok(mut stream) = stream else {
                    std::thread::sleep(Duration::from_millis(100));
                    continue;
                };
                let Some(slot) = Open::new(&open) else {
                    let message = format!("{MAX_CONVERSATIONS} requests are under way already");
                    let _ = write_line(&mut stream, &Reply::Failed { message });
                    continue;
                };
                let post = post.clone();
                let _ = spawn("request", move || converse(stream, slot, &post));
            }
        })
        .context("cannot start a thread")
    }
}

fn converse(mut stream: UnixStream, open: Open, post: &Post) {
    let patient = stream
        .set_read_timeout(Some(CLIENT_PATIENCE))
        .and_then(|()| stream.set_write_timeout(Some(CLIENT_PATIENCE)));
    match patient.and_then(|()| read_line(&stream)) {
        Ok(request) => {
            post.send(Event::Asked(Conversation { request, stream, _open: open }));
        }
        Err(error) => {
            let _ = write_line(
                &mut stream,
                &Reply::Failed { message: format!("cannot read the request: {error}") },
            );
        }
    }
}

/// Joins a client to the workload's streams, until either leaves.
///
/// # Errors
/// Too many clients are attached, or the system refuses.
pub fn attach(
    mut stream: UnixStream,
    outputs: Arc<Outputs>,
    input: Option<Arc<Input>>,
    post: Post,
) -> io::Result<()> {
    stream.set_read_timeout(None)?;
    let id = outputs.attach(stream.try_clone()?)?;
    spawn("client", move || {
        let mut frames = 0;
        while let Ok(Some(message)) = frame::read::<ToSession>(&mut stream) {
            if matches!(message, ToSession::Received { .. }) {
                // It does not count, and is of commands alone.
                continue;
            }
            frames += 1;
            match message {
                ToSession::Stdin(bytes) => {
                    // Also what nobody reads is taken, or the client would wait for ever.
                    let tell = || {
                        outputs.tell(id, &FromSession::StdinTaken { bytes: bytes.len() as u32 });
                        outputs.tell(id, &FromSession::Received { frames });
                    };
                    match &input {
                        Some(input) => _ = input.write(&bytes, tell),
                        None => tell(),
                    }
                    continue;
                }
                ToSession::StdinEnd => {
                    if let Some(input) = &input {
                        input.end();
                    }
                }
                ToSession::CloseStdout => outputs.close(id, Stream::Stdout),
                ToSession::CloseStderr => outputs.close(id, Stream::Stderr),
                ToSession::Signal { signal } => {
                    post.send(Event::Forward(signal));
                }
                ToSession::Resize(size) => {
                    post.send(Event::Resize(size));
                }
                ToSession::Received { .. } => {}
            }
            outputs.tell(id, &FromSession::Received { frames });
        }
        outputs.detach(id);
    })
}

/// Asks a machine's monitor.
///
/// # Errors
/// There is no monitor, or it ended while it was asked.
pub fn ask(run_dir: &Path, request: &Request) -> Result<(Reply, UnixStream)> {
    let lost = |error: &io::Error| {
        Error::caused("the machine's monitor does not answer", error)
            .advice("`flyrun ps -a` finds out what is left of it.")
    };
    let mut stream = UnixStream::connect(socket(run_dir)).map_err(|error| lost(&error))?;
    write_line(&mut stream, request).map_err(|error| lost(&error))?;
    let reply = read_line(&stream).map_err(|error| lost(&error))?;
    Ok((reply, stream))
}

fn write_line(stream: &mut UnixStream, value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// Reads one line, and not a byte behind it.
pub fn read_line<T: serde::de::DeserializeOwned>(stream: &UnixStream) -> io::Result<T> {
    let mut line = Vec::new();
    BufReader::with_capacity(1, stream).take(MAX_REQUEST).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_slice(&line)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::Mailbox;

    #[test]
    fn a_request_is_asked_and_answered() {
        let directory = tempfile::tempdir().unwrap();
        let mailbox = Mailbox::new();
        Door::new(directory.path()).unwrap().open(mailbox.post()).unwrap();
        let answering = std::thread::spawn(move || {
            let Ok(Event::Asked(mut conversation)) = mailbox.next(None) else { panic!("no request") };
            conversation.reply(&Reply::Done);
            conversation.request.clone()
        });
        let (reply, _) = ask(directory.path(), &Request::Signal { signal: 15 }).unwrap();
        assert_eq!(reply, Reply::Done);
        assert_eq!(answering.join().unwrap(), Request::Signal { signal: 15 });
    }

    #[test]
    fn garbage_is_answered_and_reaches_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let mailbox = Mailbox::new();
        Door::new(directory.path()).unwrap().open(mailbox.post()).unwrap();
        for garbage in ["nonsense\n", "{}\n", "{\"stop\":7}\n", "[[[[[[[\n", "\n"] {
            let mut stream = UnixStream::connect(socket(directory.path())).unwrap();
            stream.write_all(garbage.as_bytes()).unwrap();
            let reply: Reply = read_line(&stream).unwrap();
            assert!(matches!(reply, Reply::Failed { .. }), "{garbage}");
        }
        let long = vec![b'x'; MAX_REQUEST as usize + 10];
        let mut stream = UnixStream::connect(socket(directory.path())).unwrap();
        let _ = stream.write_all(&long);
        assert!(mailbox.next(Some(std::time::Instant::now())).is_err());
    }

    #[test]
    fn nobody_there_is_said_clearly() {
        let directory = tempfile::tempdir().unwrap();
        let told = ask(directory.path(), &Request::Wait).unwrap_err().to_string();
        assert!(told.contains("does not answer") && told.contains("flyrun ps"), "{told}");
    }
}
