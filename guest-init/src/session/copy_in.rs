//! A copy into the machine: a tar of the client's, unpacked by the code that unpacks images.

use std::io::{self, BufReader, Read};

use protocol::{
    ExitStatus, FailureKind,
    session::{FromSession, STDIN_WINDOW, ToSession},
};

use super::helper::Peer;
use crate::{
    failure::Failure,
    unpack::{
        layer::Applier,
        tar::Archive,
        tree::{Tree, open_root},
    },
};

/// As much as one read of the unpacker takes.
const BUFFER_BYTES: usize = 64 * 1024;

/// Unpacks what the client sends below this directory.
///
/// # Errors
/// [`Failure`] naming the entry; what was unpacked before it stays.
pub fn receive(directory: &str, peer: &mut Peer) -> Result<(), Failure> {
    let tree = Tree::new(open_root(directory)?)?;
    peer.send(&FromSession::Started { pid: std::process::id() })?;
    let stream = Stdin { peer, chunk: Vec::new(), at: 0, taken: 0, is_over: false };
    let mut archive = Archive::new(BufReader::with_capacity(BUFFER_BYTES, stream));
    let mut applier = Applier::copy_into(tree);
    applier.apply(&mut archive)?;
    applier.finish()?;
    let mut rest = archive.into_inner();
    // What stands behind the archive's end is read too, so that the client can finish.
    io::copy(&mut rest, &mut io::sink())
        .map_err(|error| Failure::new(FailureKind::Setup, format!("lost the client: {error}")))?;
    peer.send(&FromSession::Exited(ExitStatus::Code(0)))
}

/// The client's input as a stream.
struct Stdin<'a> {
    peer: &'a mut Peer,
    chunk: Vec<u8>,
    at: usize,
    taken: usize,
    is_over: bool,
}

impl Read for Stdin<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.chunk.len() && !self.is_over {
            self.acknowledge()?;
            match self.peer.receive() {
                Some(ToSession::Stdin(bytes)) => (self.chunk, self.at) = (bytes, 0),
                Some(ToSession::StdinEnd) => self.is_over = true,
                Some(_) => {}
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
        let rest = self.chunk.get(self.at..).unwrap_or_default();
        let count = rest.len().min(buffer.len());
        for (place, byte) in buffer.iter_mut().zip(rest) {
            *place = *byte;
        }
        self.at += count;
        self.taken += count;
        Ok(count)
    }
}

impl Stdin<'_> {
    fn acknowledge(&mut self) -> io::Result<()> {
        if self.taken < STDIN_WINDOW / 4 {
            return Ok(());
        }
        let bytes = std::mem::take(&mut self.taken) as u32;
        self.peer.send(&FromSession::StdinTaken { bytes }).map_err(io::Error::other)
    }
}
