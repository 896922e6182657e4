//! Attaching again to a machine that was suspended meanwhile, whose monitor is another then.

use std::sync::Arc;

use super::End;
use super::link::{Frames, Link};
use super::returning::{Return, Returning, wait};
use crate::error::Result;
use crate::machine::{Machines, Record};
use crate::monitor::{Reply, Request, ask};
use crate::paths::Paths;

/// A client of a workload's streams, which may have to come back.
#[derive(Debug)]
pub struct Reattach {
    paths: Paths,
    machines: Machines,
    id: String,
    link: Link,
    has_waited: bool,
}

impl Reattach {
    /// For the attachment over this link.
    pub fn new(paths: &Paths, machines: Machines, machine: &Record, link: &Link) -> Reattach {
        link.outlast_others();
        let (paths, id, link) = (paths.clone(), machine.id.clone(), link.clone());
        Reattach { paths, machines, id, link, has_waited: false }
    }

    /// Whether the machine was suspended meanwhile.
    pub fn has_waited(&self) -> bool {
        self.has_waited
    }

    /// Not yet, as long as there is no monitor or it has just left.
    fn attempt(&self, machine: &Record) -> Option<Return> {
        let (Reply::Attached { .. }, stream) =
            ask(&self.paths.run_dir(&machine.id), &Request::Attach).ok()?
        else {
            return None;
        };
        let stream = Arc::new(stream);
        let frames = Frames::of(Arc::clone(&stream));
        self.link.begin_again(stream).then_some(Return::Back(frames))
    }
}

impl Returning for Reattach {
    fn received(&mut self, _: usize) {}

    fn come_back(&mut self, told: bool, left: &dyn Fn() -> bool) -> Result<Return> {
        if !told {
            return Ok(Return::Over(End::Lost));
        }
        self.has_waited = true;
        // Already while it is on its way: so nothing that it writes is missed.
        wait(&self.machines, &self.id, left, &mut |machine, _| Ok(self.attempt(machine)))
    }
}
