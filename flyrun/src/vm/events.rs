//! What happens to a virtual machine, told by threads that each wait for one thing.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use protocol::{FromGuest, ToGuest, TtySize, frame};

use crate::machine::health::Check;
use crate::monitor::Conversation;
use crate::pace::Pace;
use crate::session::printable;

/// The owner of a machine receives these in the order in which they were noticed.
#[derive(Debug)]
pub enum Event {
    /// Guest-init has connected; this is where to talk to it.
    Connected(Control),
    /// Guest-init says something.
    Guest(FromGuest),
    /// The control connection has ended, cleanly or with the error told.
    ControlClosed(Option<String>),
    /// An output stream of the workload has been copied to its end.
    OutputDone,
    /// The process flyrun-vmm has ended.
    VmmExited(io::Result<std::process::ExitStatus>),
    /// The snapshot that was asked for is complete, or why there is none.
    Snapshotted(std::result::Result<(), String>),
    /// flyrun itself has received a signal.
    Signal(i32),
    /// A health check was made.
    Checked(Check),
    /// Another flyrun asks for something.
    Asked(Conversation),
    /// An attached client wants the workload to have a signal.
    Forward(i32),
    /// An attached client's terminal has this size.
    Resize(TtySize),
}

/// Which life of the machine an event belongs to; 0 for those that belong to none.
type Life = u32;

/// Words of a guest that nobody has taken yet. One more waits, and with it the guest.
const MAX_UNHEARD: usize = 16;
/// Words of a guest in a second, in the long run, and at once. A guest-init says some twenty a second at most.
const WORDS_PER_SECOND: u32 = 100;
const WORDS_AT_ONCE: u32 = 200;

/// Where events are put.
#[derive(Clone, Debug)]
pub struct Post {
    life: Life,
    sender: Sender<(Life, Event)>,
    unheard: Arc<Unheard>,
}

/// How much of a guest's waits to be taken: what it says, 64 KiB each, would fill the host's memory otherwise.
#[derive(Debug)]
struct Unheard {
    /// `None` when nobody takes anything any more.
    count: Mutex<Option<usize>>,
    taken: Condvar,
}

impl Unheard {
    fn new() -> Unheard {
        Unheard { count: Mutex::new(Some(0)), taken: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Option<usize>> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a place.
    fn add(&self) {
        let is_full = |count: &mut Option<usize>| count.is_some_and(|count| count >= MAX_UNHEARD);
        let mut count = self.taken.wait_while(self.lock(), is_full).unwrap_or_else(PoisonError::into_inner);
        *count = count.map(|count| count.saturating_add(1));
    }

    fn take(&self) {
        let mut count = self.lock();
        *count = count.map(|count| count.saturating_sub(1));
        self.taken.notify_one();
    }

    fn end(&self) {
        *self.lock() = None;
        self.taken.notify_all();
    }
}

/// Where they are received.
#[derive(Debug)]
pub struct Mailbox {
    receiver: Receiver<(Life, Event)>,
    post: Post,
}

impl Mailbox {
    pub fn new() -> Mailbox {
        let (sender, receiver) = channel();
        Mailbox { receiver, post: Post { life: 0, sender, unheard: Arc::new(Unheard::new()) } }
    }

    /// For events that belong to no life in particular.
    pub fn post(&self) -> Post {
        Post { life: 0, ..self.post.clone() }
    }

    /// For the events of the next life; what threads of earlier ones still say is passed over from now on.
    pub fn begin_life(&mut self) -> Post {
        self.post.life += 1;
        self.post.clone()
    }

    /// The next event of this life or of none.
    ///
    /// # Errors
    /// None came within `limit`.
    pub fn next(&self, limit: Option<std::time::Instant>) -> Result<Event, Late> {
        loop {
            let received = match limit {
                // The mailbox holds a sender itself, so that the channel never closes.
                None => self.receiver.recv().map_err(|_| Late),
                Some(limit) => {
                    let left = limit.saturating_duration_since(std::time::Instant::now());
                    self.receiver.recv_timeout(left).map_err(|_| Late)
                }
            };
            let received = received?;
            if matches!(received.1, Event::Guest(_)) {
                self.post.unheard.take();
            }
            match received {
                (life, event) if life == 0 || life == self.post.life => return Ok(event),
                _ => {}
            }
        }
    }
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        self.post.unheard.end();
    }
}

/// No event came in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Late;

impl Post {
    /// Puts an event there; `false` if nobody will ever take it.
    pub fn send(&self, event: Event) -> bool {
        self.sender.send((self.life, event)).is_ok()
    }
}

/// The writing side of the control connection.
#[derive(Debug)]
pub struct Control {
    stream: UnixStream,
}

impl Control {
    /// Sends one message. A guest that is gone is noticed elsewhere, so a failure here says only that it was not heard.
    pub fn send(&mut self, message: &ToGuest) -> bool {
        frame::write(&mut self.stream, message).is_ok()
    }
}

#[cfg(test)]
impl Control {
    /// Over a connection to a guest that a test plays.
    pub fn over(stream: UnixStream) -> Control {
        Control { stream }
    }
}

impl Drop for Control {
    /// Tells guest-init that everything was received and it may end.
    fn drop(&mut self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

/// Waits for guest-init on the control socket and passes on what it says.
pub fn watch_control(listener: UnixListener, post: Post) -> io::Result<()> {
    spawn("control", move || {
        let error = match listener.accept().and_then(|(stream, _)| Ok((stream.try_clone()?, stream))) {
            Ok((writer, reader)) => {
                post.send(Event::Connected(Control { stream: writer }));
                pass_frames(reader, &post)
            }
            Err(error) => Some(error.to_string()),
        };
        post.send(Event::ControlClosed(error));
    })
}

/// Passes on what guest-init says until it has ended; the error, if it is no message.
pub fn pass_frames(mut reader: UnixStream, post: &Post) -> Option<String> {
    let mut pace = Pace::new(WORDS_PER_SECOND, WORDS_AT_ONCE, Instant::now());
    loop {
        match frame::read::<FromGuest>(&mut reader) {
            Ok(Some(message)) => {
                pace.wait();
                post.unheard.add();
                if !post.send(Event::Guest(for_a_terminal(message))) {
                    return None;
                }
            }
            Ok(None) => return None,
            Err(error) => return Some(error.to_string()),
        }
    }
}

/// The guest's words, of which some are for the user to read: its kernel may be hostile, and the terminal obeys.
fn for_a_terminal(message: FromGuest) -> FromGuest {
    match message {
        FromGuest::Failed { kind, message } => FromGuest::Failed { kind, message: printable(&message) },
        FromGuest::NotFrozen { message } => FromGuest::NotFrozen { message: printable(&message) },
        other => other,
    }
}

/// Starts the VMM process and waits for it to end. On one thread: the kernel ends the process with the thread that started it, and
/// `own_pids` is a property of that thread.
pub fn start_process(mut command: Command, own_pids: bool, post: Post) -> io::Result<(u32, OwnedFd)> {
    let (sender, started) = channel();
    spawn("vmm", move || {
        let mut start = || {
            if own_pids {
                vmm::jail::ask_for_own_pids()?;
            }
            let child = command.spawn()?;
            let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
            Ok((child, pidfd))
        };
        let outcome = start();
        // With its ends of the child's sockets.
        drop(command);
        match outcome {
            Ok((mut child, pidfd)) => {
                // Whoever asked waits for it.
                let _ = sender.send(Ok((child.id(), pidfd)));
                post.send(Event::VmmExited(child.wait()));
            }
            Err(error) => _ = sender.send(Err(error)),
        }
    })?;
    started.recv().unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))
}

/// Starts a thread that needs little stack, as all of these do.
pub fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.into()).stack_size(128 * 1024).spawn(body).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_talks_without_end_waits_until_it_is_heard() {
        let mailbox = Mailbox::new();
        let (mut guest, ours) = UnixStream::pair().unwrap();
        let post = mailbox.post();
        let passing = thread::spawn(move || pass_frames(ours, &post));
        let talking = thread::spawn(move || {
            let words = frame::encode(&FromGuest::Busy { seconds: 1 }).unwrap();
            (0..100_000).take_while(|_| std::io::Write::write_all(&mut guest, &words).is_ok()).count()
        });
        let count = || mailbox.post.unheard.lock().unwrap();
        while count() < MAX_UNHEARD {
            thread::yield_now();
        }
        // It has its full number, and nobody lets it have more.
        for _ in 0..10 {
            assert!(matches!(mailbox.next(None), Ok(Event::Guest(FromGuest::Busy { seconds: 1 }))));
            assert!(count() <= MAX_UNHEARD);
        }
        // Its thread is not held for ever by a mailbox that is gone.
        drop(mailbox);
        assert_eq!(passing.join().unwrap(), None);
        assert!(talking.join().unwrap() < 100_000);
    }

    #[test]
    fn what_a_guest_says_is_nothing_that_a_terminal_obeys() {
        let said = "a\x1b]0;b\u{9b}c\n".to_string();
        let kind = protocol::FailureKind::Setup;
        let (mut guest, ours) = UnixStream::pair().unwrap();
        for message in
            [FromGuest::Failed { kind, message: said.clone() }, FromGuest::NotFrozen { message: said }]
        {
            frame::write(&mut guest, &message).unwrap();
        }
        drop(guest);
        let mailbox = Mailbox::new();
        assert_eq!(pass_frames(ours, &mailbox.post()), None);
        for _ in 0..2 {
            let Event::Guest(FromGuest::Failed { message, .. } | FromGuest::NotFrozen { message }) =
                mailbox.next(None).unwrap()
            else {
                panic!("it says something else");
            };
            assert_eq!(message, "a?]0;b?c?");
        }
    }

    #[test]
    fn what_an_earlier_life_still_says_is_passed_over() {
        let mut mailbox = Mailbox::new();
        let first = mailbox.begin_life();
        let second = mailbox.begin_life();
        first.send(Event::OutputDone);
        mailbox.post().send(Event::Signal(1));
        second.send(Event::Signal(2));
        assert!(matches!(mailbox.next(None), Ok(Event::Signal(1))));
        assert!(matches!(mailbox.next(None), Ok(Event::Signal(2))));
        assert!(mailbox.next(Some(std::time::Instant::now())).is_err());
    }
}
