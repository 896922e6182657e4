//! How a device's queue notifications get to the event loop and leave it again.
//!
//! A device is activated and reset on a vCPU's thread, while only the loop's thread may change what the loop watches.
//! So the device keeps one control event watched from the start, and fires it to have the change made there.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
};

use event_manager::{EventOps, EventSet, Events};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The value of [`Events::data`] for the control event; queues and a device's own files use lower ones.
const CONTROL: u32 = u32::MAX;

/// The notifications of a device's queues and their place in the event loop.
#[derive(Debug)]
pub struct QueueEvents {
    control: EventFd,
    /// A change that the loop's thread has yet to make.
    wanted: Option<Vec<(u32, EventFd)>>,
    /// These stay open until the loop has forgotten them: other copies of the same event are open elsewhere, so
    /// closing alone would not end the watching.
    watched: Vec<EventFd>,
}

impl QueueEvents {
    /// Creates the control event.
    ///
    /// # Errors
    /// When the host grants no more eventfds.
    pub fn new() -> io::Result<Self> {
        Ok(QueueEvents { control: EventFd::new(EFD_NONBLOCK)?, wanted: None, watched: Vec::new() })
    }

    /// Has the loop watch `notifications`, each with the data that is to come with its events.
    pub fn watch(&mut self, notifications: Vec<(u32, EventFd)>) {
        self.wanted = Some(notifications);
        self.fire();
    }

    /// Has the loop watch nothing. A driver resets each device before it begins, and then there is nothing to do.
    pub fn forget(&mut self) {
        let pending = self.wanted.as_ref().is_some_and(|wanted| !wanted.is_empty());
        if pending || !self.watched.is_empty() {
            self.wanted = Some(Vec::new());
            self.fire();
        }
    }

    /// Has the loop call the device once more.
    pub fn fire(&self) {
        // The one possible error is a full counter, which is as good as one more.
        let _ = self.control.write(1);
    }

    /// To be called from the device's `init`.
    pub fn init(&self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::with_data(&self.control, CONTROL, EventSet::IN)) {
            log::error!("cannot watch a device's control event: {error}");
        }
    }

    /// Whether `events` is the control event. It has then been read, and the loop watches what is wanted.
    pub fn control(&mut self, events: Events, ops: &mut EventOps) -> bool {
        if events.data() != CONTROL {
            return false;
        }
        let _ = self.control.read();
        let Some(wanted) = self.wanted.take() else { return true };
        for event in self.watched.drain(..) {
            let _ = ops.remove(Events::empty(&event));
        }
        for (data, event) in wanted {
            match ops.add(Events::with_data(&event, data, EventSet::IN)) {
                Ok(()) => self.watched.push(event),
                Err(error) => log::error!("cannot watch a queue: {error}"),
            }
        }
        true
    }

    /// Reads the notification `events` is about, so that it does not come again. False when it is none of this
    /// device's, because the device was reset meanwhile.
    pub fn acknowledge(&self, events: Events) -> bool {
        let fd: RawFd = events.fd();
        match self.watched.iter().find(|event| event.as_raw_fd() == fd) {
            Some(event) => {
                let _ = event.read();
                true
            }
            None => false,
        }
    }
}
