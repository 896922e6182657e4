//! The end of a machine: the first reason wins, whichever thread finds it.

use std::{io, sync::OnceLock};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::exit::VmExit;

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// The exit code that says so.
    pub exit: VmExit,
    /// One line: facts, and what to do. Empty where the exit code says all.
    pub reason: String,
}

/// Where all threads look for the end.
#[derive(Debug)]
pub struct Ending {
    first: OnceLock<End>,
    event: EventFd,
}

impl Ending {
    /// A machine that has not ended.
    ///
    /// # Errors
    /// The host gives no eventfd.
    pub fn new() -> io::Result<Self> {
        Ok(Self { first: OnceLock::new(), event: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)? })
    }

    /// Ends the machine, unless something ended it before. May be called on any thread.
    pub fn end(&self, exit: VmExit, reason: impl Into<String>) {
        if self.first.set(End { exit, reason: reason.into() }).is_ok() {
            // The counter cannot overflow: it is written once.
            let _once = self.event.write(1);
        }
    }

    /// The end, if it has come.
    pub fn get(&self) -> Option<&End> {
        self.first.get()
    }

    /// Becomes readable at the end.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_wins() {
        let ending = Ending::new().unwrap();
        assert_eq!(ending.get(), None);
        ending.end(VmExit::TripleFault, "a");
        ending.end(VmExit::Reset, "b");
        assert_eq!(ending.get(), Some(&End { exit: VmExit::TripleFault, reason: "a".into() }));
        assert_eq!(ending.event().read().unwrap(), 1);
    }
}
