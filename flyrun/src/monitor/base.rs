//! Starting a machine from the base snapshot of its shape.

use std::path::{Path, PathBuf};

use protocol::{BootConfig, RunConfig, Start, ToGuest, frame};
use vmm::spec::DiskSpec;

use super::life::Life;
use super::{Monitor, suspend};
use crate::base;
use crate::error::{Context, Result};
use crate::network::Attached;
use crate::vm::VmPlan;

/// Disks are as long as their whole sectors of so many bytes.
const SECTOR: u64 = 512;

/// The base that a life goes on from, and what it is to do then.
#[derive(Debug)]
pub struct FromBase {
    pub directory: PathBuf,
    start: Option<Start>,
    /// The machine did not come to run, and a boot may help.
    pub has_failed: bool,
}

impl FromBase {
    /// Has a snapshot of the machine hold only what differs from the base, or all where files cannot be linked.
    pub fn keep(&self, snapshot: &Path) {
        let memory = self.directory.join(vmm::snapshot::MEMORY);
        let _ = std::fs::hard_link(memory, snapshot.join(vmm::snapshot::BASE));
    }
}

impl Monitor<'_> {
    /// The base for this life, if it can go on from one; made now if there is none yet.
    ///
    /// # Errors
    /// The host's rules for the machine cannot be made.
    pub(super) fn find_base(
        &mut self,
        plan: &VmPlan,
        network: Option<&mut Attached>,
    ) -> Result<Option<FromBase>> {
        let BootConfig::Run(config) = &plan.boot else { return Ok(None) };
        if self.machine.record().config.cold || self.without_base || !base::suits(plan) {
            return Ok(None);
        }
        let found =
            start(config, &plan.disks).and_then(|start| Ok((base::find(self.host.paths, plan)?, start)));
        let found = match found {
            Ok((Some(directory), start)) => Ok((directory, start)),
            Ok((None, start)) => {
                // No other machine's network has to wait for this.
                network.map_or(Ok(()), Attached::wait_ready)?;
                base::make(self.host.paths, plan).map(|directory| (directory, start))
            }
            Err(error) => Err(error),
        };
        match found {
            Ok((directory, start)) => Ok(Some(FromBase { directory, start: Some(start), has_failed: false })),
            Err(error) => {
                self.no_base = Some(error.to_string());
                Ok(None)
            }
        }
    }

    /// The machine has come from its base, and waits: this is what it runs. `false` if it has come from elsewhere.
    pub(super) fn run_from_base(&mut self, life: &mut Life) -> bool {
        let Some(start) = self.base.as_mut().and_then(|base| base.start.take()) else { return false };
        // The time last.
        life.run(Start { realtime_ns: suspend::realtime_ns(), ..start });
        true
    }

    /// A base that cannot be gone on from is of no use to anybody. One that somebody has removed meanwhile was all right.
    pub(super) fn give_up_base(&mut self, base: &FromBase, reason: String) {
        if base.directory.exists() {
            eprintln!("flyrun: cannot start from the base snapshot, and boots: {reason}");
            base::discard(&base.directory);
        }
        self.without_base = true;
        self.cold_reason = Some(reason);
    }
}

/// What guest-init is to be told, if one frame can hold it.
fn start(config: &RunConfig, disks: &[DiskSpec]) -> Result<Start> {
    let disks = disks.iter().map(length).collect::<Result<_>>()?;
    // No time takes more bytes than this one.
    let start = Start { realtime_ns: u64::MAX, disks, config: config.clone() };
    frame::encode(&ToGuest::Run(Box::new(start.clone())))
        .context("what the machine is to run is too long for one message")?;
    Ok(start)
}

/// As flyrun-vmm counts it.
fn length(disk: &DiskSpec) -> Result<u64> {
    let mut all = 0;
    for path in &disk.files {
        let told = || format!("cannot look at {}", path.display());
        let mut file = std::fs::File::open(path).context(told())?;
        let bytes = std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0)).context(told())?;
        all += bytes.next_multiple_of(SECTOR);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_as_long_as_the_whole_sectors_of_its_files() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str, bytes: usize| {
            let path = directory.path().join(name);
            std::fs::write(&path, vec![0; bytes]).unwrap();
            path
        };
        let files = vec![file("a", 1), file("b", 1024)];
        assert_eq!(length(&DiskSpec { files, read_only: true, rate: None }).unwrap(), 1536);
    }

    #[test]
    fn what_no_frame_holds_is_booted_with() {
        let mut config = RunConfig { argv: vec!["sh".into()], ..RunConfig::default() };
        assert_eq!(start(&config, &[]).unwrap().config, config);
        config.env = vec!["x".repeat(frame::MAX_FRAME_BYTES)];
        assert!(start(&config, &[]).unwrap_err().to_string().contains("too long"));
    }
}
