//! What the owner of a machine asks of it while it runs: lines on a stream, each answered by a line.
//!
//! ```text
//! pause      ok, when all vCPUs stand
//! resume     ok
//! ```
//!
//! What cannot be done is answered by `error` and the reason. The owner is trusted, but no line is longer than
//! [`MAX_LINE`]. A closed stream ends nothing: a machine that is to end with its owner has `--owner`.

use std::{
    io::{self, Read, Write},
    os::{fd::AsFd, unix::net::UnixStream},
    sync::{Arc, Mutex, PoisonError},
};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use crate::machine::Machine;

/// The most bytes of one request.
pub const MAX_LINE: usize = 4096;

/// The machine's end of the stream.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
    pending: Vec<u8>,
    machine: Arc<Mutex<Machine>>,
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
    pub fn new(stream: UnixStream, machine: Arc<Mutex<Machine>>) -> Self {
        Self { stream, pending: Vec::new(), machine }
    }

    /// Answers all requests that have come; `false` when there will be none any more.
    fn serve(&mut self) -> bool {
        let mut chunk = [0; MAX_LINE];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => return false,
                Ok(count) => self.pending.extend(chunk.iter().take(count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return false,
            }
            while let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                let answer = self.answer(line.trim_ascii());
                // An owner that does not read its answers has ended, or does without.
                if self.stream.write_all(answer.as_bytes()).is_err() {
                    return false;
                }
            }
            if self.pending.len() > MAX_LINE {
                return false;
            }
        }
    }

    fn answer(&self, request: &[u8]) -> String {
        let mut machine = self.machine.lock().unwrap_or_else(PoisonError::into_inner);
        let done = match request {
            b"pause" => machine.pause().map_err(|refusal| refusal.to_string()),
            b"resume" => machine.resume().map_err(|refusal| refusal.to_string()),
            _ => Err(format!("{:?} is not a request", String::from_utf8_lossy(request))),
        };
        match done {
            Ok(()) => "ok\n".to_owned(),
            Err(reason) => format!("error {reason}\n"),
        }
    }
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
    use super::*;
    use crate::ending::Ending;

    fn channel() -> (UnixStream, Channel, Arc<Mutex<Machine>>) {
        let (owner, stream) = UnixStream::pair().unwrap();
        stream.set_nonblocking(true).unwrap();
        let machine = Arc::new(Mutex::new(Machine::new(vec![], Arc::new(Ending::new().unwrap()))));
        let channel = Channel::new(stream, Arc::clone(&machine));
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
        assert_eq!(asked(&mut owner, &mut channel, "pause\nresume\npau"), "ok\nok\n");
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
    }
}
