//! Learning what a machine touches first when it goes on from a snapshot, for the next that does.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::Monitor;
use super::life::Life;

/// What is touched within this time of the start is read ahead the next time.
const FIRST_MOMENTS: Duration = Duration::from_millis(200);

/// A list that is to be written.
#[derive(Debug)]
pub struct Learning {
    snapshot: PathBuf,
    due: Instant,
}

impl Learning {
    /// The snapshot in that directory was gone on from just now.
    pub fn new(snapshot: PathBuf) -> Learning {
        Learning { snapshot, due: Instant::now() + FIRST_MOMENTS }
    }

    /// The same for a base, whose first machine teaches all others.
    pub fn for_base(base: &Path) -> Option<Learning> {
        (!base.join(vmm::snapshot::WORKING_SET).exists()).then(|| Learning::new(base.to_path_buf()))
    }

    /// Without a list the next start takes longer, so that a failure is not worth a word.
    fn write(self, life: &Life) {
        let _ = life.vm.note_working_set(&self.snapshot);
    }

    /// When it is to be written.
    pub fn due(&self) -> Instant {
        self.due
    }
}

impl Monitor<'_> {
    /// Has the list written when its time has come, or when the workload has ended before.
    pub(super) fn learn(&mut self, life: &Life) {
        let is_due = |learning: &mut Learning| learning.due <= Instant::now() || life.has_exited();
        if !life.is_still()
            && let Some(learning) = self.learning.take_if(is_due)
        {
            learning.write(life);
        }
    }

    /// Has it written before its time: the machine is suspended already.
    pub(super) fn learn_now(&mut self, life: &Life) {
        if let Some(learning) = self.learning.take() {
            learning.write(life);
        }
    }
}
