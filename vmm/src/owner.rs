//! The process that a machine belongs to, and ends with: its parent. But for the time of a snapshot, which is not left half
//! done.
//!
//! In a process id namespace of its own, a process does not see who its parent is. It then knows that the parent lives by the other end
//! of the stream of requests, which nobody else has.

use std::os::unix::net::UnixStream;

use rustix::{
    net::{RecvFlags, recv},
    process::{Signal, getppid, set_parent_process_death_signal},
};

use crate::{ending::Ending, exit::VmExit};

/// The parent of this process, with which it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner(u32);

impl Owner {
    /// Has the kernel end this process when its parent does, which must be that process and alive. On the process's first
    /// thread.
    ///
    /// # Errors
    /// It is not the parent, or has ended.
    pub fn end_with(pid: u32, stream: Option<&UnixStream>) -> Result<Self, String> {
        set_parent_process_death_signal(Some(Signal::KILL)).map_err(|e| format!("--owner: {e}"))?;
        // The parent may have ended just before; then the kernel has nothing to tell any more.
        match Self(pid).is_there(stream) {
            true => Ok(Self(pid)),
            false => {
                Err(format!("--owner {pid}: that process is not the parent of flyrun-vmm, or has ended"))
            }
        }
    }

    /// The same once more: a process that has become another user is no longer ended with its parent.
    ///
    /// # Errors
    /// The parent has ended meanwhile.
    pub fn still_end_with(self, stream: Option<&UnixStream>) -> Result<(), String> {
        Self::end_with(self.0, stream).map(drop)
    }

    fn is_there(self, stream: Option<&UnixStream>) -> bool {
        match getppid() {
            Some(parent) => u32::try_from(parent.as_raw_nonzero().get()) == Ok(self.0),
            None => stream.is_some_and(|stream| !is_hung_up(stream)),
        }
    }

    /// Does the work though the owner may end meanwhile; then the machine ends behind it. On the process's first thread.
    pub fn outlive<T>(
        owner: Option<Self>,
        stream: &UnixStream,
        ending: &Ending,
        work: impl FnOnce() -> T,
    ) -> T {
        let Some(owner) = owner else { return work() };
        // Neither call can fail: the arguments are valid, and there is nothing else to fail.
        let _ = set_parent_process_death_signal(None);
        let result = work();
        let _ = set_parent_process_death_signal(Some(Signal::KILL));
        if !owner.is_there(Some(stream)) {
            ending.end(VmExit::Terminated, "the owner of the machine has ended");
        }
        result
    }
}

/// Whether nobody has the other end any more, and all that was said there has been read.
fn is_hung_up(stream: &UnixStream) -> bool {
    matches!(recv(stream, &mut [0; 1][..], RecvFlags::PEEK | RecvFlags::DONTWAIT), Ok((0, _)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_tells_whether_its_other_end_is_there() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        assert!(!is_hung_up(&ours));
        drop(theirs);
        assert!(is_hung_up(&ours));
    }
}
