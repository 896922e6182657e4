//! What goes along with a machine's process while it runs: its usage is written down, its health checked, and what makes the next start
//! quick is there: a part of its jail, and its kernel's text.

use std::time::{Duration, Instant};

use super::health::Watch;
use super::{Conversation, Monitor};
use crate::kernel_text;
use crate::network;
use crate::paths::Paths;
use crate::usage::{Ledger, Meter, Sources};
use crate::vm::{Post, leave_spare, spawn as spawn_thread};

/// When a start is over for everybody who waits for it.
const SETTLED: Duration = Duration::from_millis(300);

/// Where a life of a machine takes place.
pub struct Place {
    pub network: Option<network::Attached>,
    pub post: Post,
}

/// What goes along with a machine's process from its start on.
#[derive(Default)]
pub struct Company {
    pub meter: Option<Meter>,
    pub watch: Option<Watch>,
    /// Requests that wait for the end of a check.
    pub deferred: Vec<Conversation>,
    /// When it is time for what the next machine will find.
    ready_due: Option<Instant>,
}

impl Company {
    /// Whether a health check is under way.
    pub fn is_checking(&self) -> bool {
        self.watch.as_ref().is_some_and(|watch| watch.due().is_none())
    }

    pub fn due(&self) -> Option<Instant> {
        let meter = self.meter.as_ref().map(Meter::due);
        meter.into_iter().chain(self.watch.as_ref().and_then(Watch::due)).chain(self.ready_due).min()
    }

    /// Does what is due. When the process has exited, its figures are soon to be had no more.
    pub fn tend(&mut self, paths: &Paths, has_exited: bool, is_paused: bool) {
        if let Some(meter) = &mut self.meter {
            meter.tick();
            if has_exited {
                meter.look();
            }
        }
        if let Some(watch) = &mut self.watch
            && !has_exited
            && !is_paused
        {
            watch.check();
        }
        if self.ready_due.take_if(|due| *due <= Instant::now()).is_some() {
            leave_spare();
            let paths = paths.clone();
            // Nothing is missed where it does not start.
            let _ = spawn_thread("text", move || kernel_text::keep(&paths));
        }
    }
}

impl Monitor<'_> {
    pub(super) fn begin_company(&self, company: &mut Company, place: &Place, process: u32) {
        let (record, paths) = (self.machine.record(), self.host.paths);
        let facts = place.network.as_ref().map(network::Attached::facts).unwrap_or_default();
        let interface = (!facts.interface.is_empty()).then_some(facts.interface.as_str());
        let sources = Sources::of(process, interface);
        company.meter = Some(Meter::begin(Ledger::new(paths.usage()), record, sources));
        let directory = self.machine.directory();
        company.watch = Watch::begin(paths, record, directory, facts.ipv4, place.post.clone());
        company.ready_due = Some(Instant::now() + SETTLED);
    }

    /// The record may be another than before.
    pub(super) fn tell_company(&self, company: &mut Company, place: &mut Place) {
        let record = self.machine.record();
        if let Some(meter) = &mut company.meter {
            meter.change(record);
        }
        if let Some(network) = &mut place.network
            && let Err(error) = network.rename(&record.name)
        {
            eprintln!("flyrun: {error}");
        }
    }
}
