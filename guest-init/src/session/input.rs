//! What a client sends on to a process: a window's worth at most waits here.

use std::{
    collections::VecDeque,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use protocol::session::STDIN_WINDOW;
use rustix::io::{Errno, write};

/// The input of one process.
#[derive(Debug)]
pub struct Input {
    sink: Option<OwnedFd>,
    buffer: VecDeque<u8>,
    ended: bool,
    taken: usize,
}

impl Input {
    /// To a non-blocking pipe or terminal; without one everything is discarded.
    pub fn new(sink: Option<OwnedFd>) -> Self {
        Self { sink, buffer: VecDeque::new(), ended: false, taken: 0 }
    }

    /// Takes what the client has sent; false if it sends more than it may.
    pub fn push(&mut self, bytes: &[u8]) -> bool {
        if self.buffer.len() + self.taken + bytes.len() > STDIN_WINDOW {
            return false;
        }
        if self.ended || self.sink.is_none() {
            self.taken += bytes.len();
        } else {
            self.buffer.extend(bytes);
        }
        true
    }

    /// Nothing more comes.
    pub fn end(&mut self) {
        self.ended = true;
    }

    /// The sink, while something waits for it.
    pub fn interest(&self) -> Option<BorrowedFd<'_>> {
        self.sink.as_ref().filter(|_| !self.buffer.is_empty()).map(AsFd::as_fd)
    }

    /// Writes what the process takes.
    pub fn pump(&mut self) {
        while let (Some(sink), (front, _)) = (&self.sink, self.buffer.as_slices()) {
            if front.is_empty() {
                break;
            }
            match write(sink, front) {
                Ok(count) => {
                    self.taken += self.buffer.drain(..count.min(self.buffer.len())).count();
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => {
                    self.sink = None;
                    self.taken += self.buffer.len();
                    self.buffer.clear();
                }
            }
        }
        if self.ended {
            self.sink = None;
        }
    }

    /// How much the client is to be told as taken: not every byte by itself, but all when nothing waits.
    pub fn acknowledge(&mut self) -> Option<u32> {
        let worth_telling = self.taken >= STDIN_WINDOW / 4 || self.taken > 0 && self.buffer.is_empty();
        worth_telling.then(|| std::mem::take(&mut self.taken) as u32)
    }
}

#[cfg(test)]
mod tests {
    use rustix::{
        io::read,
        pipe::{PipeFlags, pipe_with},
    };

    use super::*;

    #[test]
    fn a_client_that_ignores_the_window_is_refused() {
        let (_reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        let mut input = Input::new(Some(writer));
        assert!(input.push(&vec![0; STDIN_WINDOW]));
        assert!(!input.push(&[0]));
        input.pump();
        assert!(!input.push(&[0]), "what was taken counts until it is told");
        assert_eq!(input.acknowledge(), Some(65_536));
        assert!(input.push(&[0; 65_536]));
        assert!(!input.push(&[0]));
    }

    #[test]
    fn the_end_closes_the_pipe_behind_the_data() {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        let mut input = Input::new(Some(writer));
        assert!(input.push(b"last words"));
        input.end();
        input.pump();
        let mut buffer = [0; 32];
        assert_eq!(read(&reader, &mut buffer[..]), Ok(10));
        assert_eq!(read(&reader, &mut buffer[..]), Ok(0));
        assert_eq!(input.acknowledge(), Some(10));
        assert_eq!(input.acknowledge(), None);
    }

    #[test]
    fn input_that_nobody_reads_is_taken_and_discarded() {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        drop(reader);
        let mut input = Input::new(Some(writer));
        for _ in 0..10 {
            assert!(input.push(&[1; 100_000]));
            input.pump();
            assert_eq!(input.acknowledge(), Some(100_000));
        }
        assert!(input.interest().is_none());
    }
}
