//! What the owner of a machine asks of it while it runs: lines on a stream, each answered by a line but for one.
//!
//! ```text
//! pause          ok, when all vCPUs stand
//! resume         ok
//! snapshot DIR   ok and a JSON object of figures, when the machine, which is paused, is in that directory, which is there
//! checked-snapshot DIR
//!                the same, with a checksum of memory, all of which is read for it
//! base-snapshot DIR
//!                as snapshot; the guest has read nothing of its disks, and may go on with others
//! read-ahead     not answered: the guest's first process was heard of; the rest of what it will touch of its snapshot's memory,
//!                as far as that is known, is read ahead
//! working-set DIR
//!                ok, when the list of what the machine has touched of its snapshot's memory is in that directory, beside
//!                that snapshot or a later one of this machine
//! ```
//!
//! A process without a way to DIR, for which [`crate::jail`] sees, is sent a descriptor with the line: the open directory for a
//! snapshot, and an empty file for a working set. The answer to that says whether the file is `written`, or the list that is there is
//! `outdated`.
//!
//! The figures: `full`, whether all of memory was looked at or what was written since the machine was resumed;
//! `memory_bytes`, its size; `seen_bytes` and `written_bytes`, of pages looked at and of those that were not zero;
//! `state_bytes`, the length of the file `state`.
//!
//! A `resume` that comes while a snapshot is being written gives the snapshot up: that is answered by `error`, then the
//! `resume` by `ok`. No device is served meanwhile, and an owner that ends is outlived.
//!
//! What cannot be done is answered by `error` and the reason. The owner is trusted, but no line is longer than
//! [`MAX_LINE`]. A closed stream ends a machine that has an `--owner`, and no other.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, IoSliceMut, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStrExt, net::UnixStream},
    },
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::{
    ending::Ending,
    event_loop::signal_waits,
    exit::VmExit,
    machine::Machine,
    owner::Owner,
    snapshot::{
        WORKING_SET,
        dir::Dir,
        save::{Order, save},
        subject::{Learning, Subject},
        working_set::{Pages, WorkingSet},
    },
};

/// The most bytes of one request.
pub const MAX_LINE: usize = 4096;
/// The most descriptors that are looked at in one message; the kernel closes others.
const MAX_GIVEN: usize = 1;
/// Behind the `ok` to `working-set` with a file: the list is in there, or that beside the snapshot is to be removed.
const WRITTEN: &str = " written";
const OUTDATED: &str = " outdated";

/// The machine's end of the stream.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
    pending: Vec<u8>,
    /// What came with the requests, and belongs to the next that takes it.
    given: Option<OwnedFd>,
    machine: Arc<Mutex<Machine>>,
    owned: Owned,
}

/// What a machine's owner can ask about, beside its vCPUs.
#[derive(Debug)]
pub struct Owned {
    /// The machine's parts; `None` where there is nothing to save.
    pub subject: Option<Arc<Subject>>,
    /// The process that asks.
    pub owner: Option<Owner>,
    /// The machine's end.
    pub ending: Arc<Ending>,
}

impl Channel {
    /// Takes standard input, which must be a stream socket, and leaves /dev/null in its place.
    ///
    /// # Errors
    /// It is no socket, or the host gives no descriptor.
    pub fn from_stdin() -> io::Result<UnixStream> {
        let stream = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
        stream.local_addr()?;
        stream.set_nonblocking(true)?;
        rustix::stdio::dup2_stdin(std::fs::File::open("/dev/null")?)?;
        Ok(stream)
    }

    /// Serves the machine's owner at the other end of `stream`.
    pub fn new(stream: UnixStream, machine: Arc<Mutex<Machine>>, owned: Owned) -> Self {
        Self { stream, pending: Vec::new(), given: None, machine, owned }
    }

    /// Answers all requests that have come; `false` when there will be none any more.
    fn serve(&mut self) -> bool {
        loop {
            let more = self.take_in();
            while let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                let answer = self.answer(line.trim_ascii());
                // An owner that does not read its answers has ended, or does without.
                if self.stream.write_all(answer.as_bytes()).is_err() {
                    return false;
                }
            }
            match more {
                Input::Some if self.pending.len() <= MAX_LINE => {}
                Input::Nothing => return true,
                Input::Some => return false,
                Input::End => {
                    // Nobody else has the other end.
                    if self.owned.owner.is_some() {
                        self.owned.ending.end(VmExit::Terminated, "the owner of the machine has ended");
                    }
                    return false;
                }
            }
        }
    }

    /// Takes what the stream has, up to a line's length.
    fn take_in(&mut self) -> Input {
        let mut chunk = [0; MAX_LINE];
        match self.receive(&mut chunk) {
            Ok(0) => Input::End,
            Ok(count) => {
                self.pending.extend(chunk.iter().take(count));
                Input::Some
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Input::Nothing,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Input::Some,
            Err(_) => Input::End,
        }
    }

    fn answer(&mut self, request: &[u8]) -> String {
        let done = match request {
            b"pause" => self.machine().pause().map(|()| String::new()).map_err(|refusal| refusal.to_string()),
            b"resume" => {
                self.machine().resume().map(|()| String::new()).map_err(|refusal| refusal.to_string())
            }
            b"read-ahead" => {
                self.read_ahead();
                return String::new();
            }
            _ => match (request.strip_prefix(b"working-set "), snapshot_asked(request)) {
                (Some(dir), _) => self.working_set(Path::new(OsStr::from_bytes(dir))),
                (None, Some(asked)) => self.snapshot(asked).map(|figures| format!(" {figures}")),
                (None, None) => Err(format!("{:?} is not a request", String::from_utf8_lossy(request))),
            },
        };
        match done {
            Ok(told) => format!("ok{told}\n"),
            Err(reason) => format!("error {}\n", reason.replace('\n', " ")),
        }
    }

    /// Reads bytes, and the descriptor that came with them.
    fn receive(&mut self, chunk: &mut [u8]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_GIVEN))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [IoSliceMut::new(chunk)];
        let received = recvmsg(&self.stream, &mut bytes, &mut beside, RecvFlags::CMSG_CLOEXEC)?;
        let rights = beside.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(rights) => Some(rights),
            _ => None,
        });
        if let Some(given) = rights.flatten().last() {
            self.given = Some(given);
        }
        Ok(received.bytes)
    }

    fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the paused machine to a directory; returns the figures.
    fn snapshot(&mut self, asked: Asked<'_>) -> Result<String, String> {
        let Asked { path, checksum, any_disks } = asked;
        let dir = match self.given.take() {
            Some(given) => Dir::given(path, given),
            None => Dir::at(path).map_err(|error| format!("{}: {error}", path.display()))?,
        };
        let order = Order { dir: &dir, checksum, any_disks };
        let subject = self.owned.subject.clone().ok_or("this machine cannot be saved")?;
        let machine = Arc::clone(&self.machine);
        let mut machine = machine.lock().unwrap_or_else(PoisonError::into_inner);
        let standing = machine.standing().map_err(|refusal| refusal.to_string())?;
        let ending = Arc::clone(&self.owned.ending);
        let owner = self.owned.owner;
        let stream = self.stream.try_clone().map_err(|error| error.to_string())?;
        let saved = Owner::outlive(owner, &stream, &ending, || {
            save(&subject, &standing, order, &mut || {
                self.resume_waits() || ending.get().is_some() || signal_waits()
            })
        });
        let report = saved.map_err(|error| error.to_string())?;
        serde_json::to_string(&report).map_err(|error| error.to_string())
    }

    fn working_set(&mut self, dir: &Path) -> Result<String, String> {
        let given = self.given.take().map(File::from);
        let subject = self.owned.subject.as_ref().ok_or("this machine has no snapshot")?;
        let noted =
            Pages::touched(&subject.memory, &subject.backing).and_then(|touched| {
                match &mut *subject.learning.lock().unwrap_or_else(PoisonError::into_inner) {
                    Learning::Known { list, .. } if list.is_outdated(&touched) => match given {
                        Some(_) => Ok(OUTDATED),
                        None => Dir::at(dir).and_then(|dir| dir.remove(WORKING_SET)).map(|()| ""),
                    },
                    Learning::Known { .. } => Ok(""),
                    Learning::Watched { apart, first } => {
                        *apart = None;
                        let list = WorkingSet::new(first.take().unwrap_or_default(), &touched);
                        match given {
                            Some(mut file) => list.write_to(&mut file).map(|()| WRITTEN),
                            None => Dir::at(dir).and_then(|dir| list.write(&dir)).map(|()| ""),
                        }
                    }
                }
            });
        noted.map(str::to_owned).map_err(|error| format!("{}: {error}", dir.display()))
    }

    fn read_ahead(&self) {
        let Some(subject) = &self.owned.subject else { return };
        match &mut *subject.learning.lock().unwrap_or_else(PoisonError::into_inner) {
            Learning::Known { list, rest } => {
                let Some(rest) = rest.take() else { return };
                let (soon, later) = rest.ahead(list).split();
                self.machine().read_ahead(soon);
                later.in_background(&subject.worker);
            }
            // Without it, all is read ahead at first.
            Learning::Watched { first: first @ None, .. } => {
                *first = Pages::touched(&subject.memory, &subject.backing).ok();
            }
            Learning::Watched { .. } => {}
        }
    }

    /// Whether the owner has asked for the machine to go on. What it asks is answered later, in its turn.
    fn resume_waits(&mut self) -> bool {
        // More than a few lines nobody sends meanwhile; they are left in the stream.
        if self.pending.len() < MAX_LINE {
            self.take_in();
        }
        let mut lines = self.pending.split_inclusive(|byte| *byte == b'\n');
        lines.any(|line| line.ends_with(b"\n") && line.trim_ascii() == b"resume")
    }
}

/// A snapshot that is asked for.
struct Asked<'a> {
    path: &'a Path,
    checksum: bool,
    any_disks: bool,
}

fn snapshot_asked(request: &[u8]) -> Option<Asked<'_>> {
    let kinds = [
        (b"snapshot ".as_slice(), false, false),
        (b"checked-snapshot ", true, false),
        (b"base-snapshot ", false, true),
    ];
    kinds.into_iter().find_map(|(word, checksum, any_disks)| {
        let path = Path::new(OsStr::from_bytes(request.strip_prefix(word)?));
        Some(Asked { path, checksum, any_disks })
    })
}

/// What a look into the stream has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Input {
    Some,
    /// For now.
    Nothing,
    /// For ever.
    End,
}

impl MutEventSubscriber for Channel {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.stream, EventSet::IN)) {
            eprintln!("flyrun-vmm: the host does not poll the owner's stream: {error}");
        }
    }

    fn process(&mut self, _: Events, ops: &mut EventOps) {
        if !self.serve()
            && let Err(error) = ops.remove(Events::empty(&self.stream))
        {
            eprintln!("flyrun-vmm: the owner's stream cannot be left: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn channel() -> (UnixStream, Channel, Arc<Mutex<Machine>>) {
        let (owner, stream) = UnixStream::pair().unwrap();
        stream.set_nonblocking(true).unwrap();
        let ending = Arc::new(Ending::new().unwrap());
        let machine = Arc::new(Mutex::new(Machine::new(vec![], Arc::clone(&ending))));
        let owned = Owned { subject: None, owner: None, ending };
        let channel = Channel::new(stream, Arc::clone(&machine), owned);
        (owner, channel, machine)
    }

    fn asked(owner: &mut UnixStream, channel: &mut Channel, lines: &str) -> String {
        owner.write_all(lines.as_bytes()).unwrap();
        assert!(channel.serve());
        let mut answer = vec![0; 4096];
        let count = owner.read(&mut answer).unwrap();
        String::from_utf8(answer[..count].to_vec()).unwrap()
    }

    #[test]
    fn requests_are_answered_in_order() {
        let (mut owner, mut channel, machine) = channel();
        let told = asked(&mut owner, &mut channel, "pause\n");
        assert_eq!(told, "error Pause needs a machine that is running, this one is Configured\n");
        machine.lock().unwrap().start().unwrap();
        assert_eq!(asked(&mut owner, &mut channel, "pause\nresume\nread-ahead\npau"), "ok\nok\n");
        assert_eq!(asked(&mut owner, &mut channel, "se\n"), "ok\n");
        let told = asked(&mut owner, &mut channel, "pause\nfly\n");
        assert!(
            told.contains("needs a machine that is running") && told.ends_with("is not a request\n"),
            "{told}"
        );
    }

    #[test]
    fn an_endless_line_and_a_closed_stream_are_the_end_of_it() {
        let (mut owner, mut channel, _) = channel();
        owner.write_all(&vec![b'x'; MAX_LINE * 3]).unwrap();
        assert!(!channel.serve());
        let (owner, mut channel, _) = self::channel();
        drop(owner);
        assert!(!channel.serve());
        assert_eq!(channel.owned.ending.get(), None);
    }

    #[test]
    fn a_machine_ends_when_an_owner_closes_the_stream_whatever_was_said_last() {
        let (mut stream, mut channel, _) = channel();
        channel.owned.owner = Owner::end_with(std::os::unix::process::parent_id(), None).ok();
        assert!(channel.owned.owner.is_some());
        stream.write_all(b"read-ahead\n").unwrap();
        drop(stream);
        assert!(!channel.serve());
        assert!(channel.owned.ending.get().is_some_and(|end| end.exit == VmExit::Terminated));
    }
}
