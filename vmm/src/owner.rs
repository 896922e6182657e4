//! The process that a machine belongs to, and ends with: its parent. But for the time of a snapshot, which is not left half
//! done.

use rustix::process::{Signal, getppid, set_parent_process_death_signal};

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
    pub fn end_with(pid: u32) -> Result<Self, String> {
        set_parent_process_death_signal(Some(Signal::KILL)).map_err(|e| format!("--owner: {e}"))?;
        // The parent may have ended just before; then the kernel has nothing to tell any more.
        match Self(pid).is_there() {
            true => Ok(Self(pid)),
            false => {
                Err(format!("--owner {pid}: that process is not the parent of flyrun-vmm, or has ended"))
            }
        }
    }

    fn is_there(self) -> bool {
        let parent = getppid().map(|parent| parent.as_raw_nonzero().get());
        parent.is_some_and(|parent| u32::try_from(parent) == Ok(self.0))
    }

    /// Does the work though the owner may end meanwhile; then the machine ends behind it. On the process's first thread.
    pub fn outlive<T>(owner: Option<Self>, ending: &Ending, work: impl FnOnce() -> T) -> T {
        let Some(owner) = owner else { return work() };
        // Neither call can fail: the arguments are valid, and there is nothing else to fail.
        let _ = set_parent_process_death_signal(None);
        let result = work();
        let _ = set_parent_process_death_signal(Some(Signal::KILL));
        if !owner.is_there() {
            ending.end(VmExit::Terminated, "the owner of the machine has ended");
        }
        result
    }
}
