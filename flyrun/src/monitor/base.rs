//! Starting a machine from the base snapshot of its shape.

use std::path::{Path, PathBuf};

use protocol::{BootConfig, RunConfig, Start, ToGuest, frame};
use vmm::spec::DiskSpec;

use super::life::Life;
use super::{Monitor, suspend};
use crate::base::{self, Base};
use crate::error::{Context, Error, Result};
use crate::network::Attached;
use crate::vm::{NewDisk, VmPlan};

/// Disks are as long as their whole sectors of so many bytes.
const SECTOR: u64 = 512;

/// The base that a life goes on from, and what it is to do then.
#[derive(Debug)]
pub struct FromBase {
    pub snapshot: Base,
    start: Option<Start>,
    /// The disk that is mounted in the base's memory is to be the machine's, in this file.
    disk: Option<PathBuf>,
    /// The machine did not come to run, and a boot may help.
    pub has_failed: bool,
}

impl FromBase {
    /// Has a snapshot of the machine hold only what differs from the base, or all where files cannot be linked.
    pub fn keep(&self, snapshot: &Path) {
        let memory = self.snapshot.directory.join(vmm::snapshot::MEMORY);
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
        let found = start(config, &plan.disks, plan.new_disk.as_ref())
            .and_then(|start| Ok((base::find(self.host.paths, plan)?, start)));
        let found = match found {
            Ok((Some(base), start)) => Ok((base, start)),
            Ok((None, start)) => {
                // No other machine's network has to wait for this.
                network.map_or(Ok(()), Attached::wait_ready)?;
                base::make(self.host.paths, self.host.store, plan).map(|base| (base, start))
            }
            Err(error) => Err(error),
        };
        match found {
            Ok((base, start)) => {
                let disk = base::disk(plan).map(|disk| disk.file.clone());
                Ok(Some(FromBase { snapshot: base, start: Some(start), disk, has_failed: false }))
            }
            Err(error) => {
                self.no_base = Some(error.to_string());
                Ok(None)
            }
        }
    }

    /// Copies the disk that the base's memory goes with, if it has one. Without it there is no base.
    pub(super) fn copy_disk_of_base(&mut self, to: &Path) -> bool {
        let Some(from) = self.base.as_ref().filter(|from| from.disk.is_some()) else { return false };
        if let Err(error) = from.snapshot.copy_disk(to) {
            if !from.snapshot.has_disk() {
                base::discard(&from.snapshot.directory);
            }
            self.no_base = Some(error.to_string());
            self.base = None;
            return false;
        }
        true
    }

    /// The machine has come from its base, and waits: this is what it runs. `false` if it has come from elsewhere.
    ///
    /// # Errors
    /// The base is another than the one that the machine's disk is of.
    pub(super) fn run_from_base(&mut self, life: &mut Life) -> Result<bool> {
        let Some(from) = &mut self.base else { return Ok(false) };
        let Some(start) = from.start.take() else { return Ok(false) };
        if from.disk.is_some() && !from.snapshot.is_the_same() {
            return Err(Error::new("the base snapshot has been made anew meanwhile"));
        }
        // The time last.
        life.run(Start { realtime_ns: suspend::realtime_ns(), ..start });
        Ok(true)
    }

    /// A base that cannot be gone on from is of no use to anybody. One that somebody has removed meanwhile was all right.
    pub(super) fn give_up_base(&mut self, from: &FromBase, reason: String) {
        if let Some(disk) = &from.disk {
            // Nothing has run on it, and it may be another base's.
            let _ = std::fs::remove_file(disk);
        }
        if from.snapshot.directory.exists() {
            eprintln!("flyrun: cannot start from the base snapshot, and boots: {reason}");
            base::discard(&from.snapshot.directory);
        }
        self.without_base = true;
        self.cold_reason = Some(reason);
    }
}

/// What guest-init is to be told, if one frame can hold it.
fn start(config: &RunConfig, disks: &[DiskSpec], new: Option<&NewDisk>) -> Result<Start> {
    let disks = disks.iter().map(|disk| length(disk, new)).collect::<Result<_>>()?;
    // No time takes more bytes than this one.
    let start = Start { realtime_ns: u64::MAX, disks, config: config.clone() };
    frame::encode(&ToGuest::Run(Box::new(start.clone())))
        .context("what the machine is to run is too long for one message")?;
    Ok(start)
}

/// As flyrun-vmm counts it.
fn length(disk: &DiskSpec, new: Option<&NewDisk>) -> Result<u64> {
    let mut all = 0;
    for path in &disk.files {
        if let Some(new) = new.filter(|new| new.file == *path) {
            all += images::rounded_bytes(new.bytes);
            continue;
        }
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
        assert_eq!(length(&DiskSpec { files, read_only: true, rate: None }, None).unwrap(), 1536);
        let new = NewDisk { file: directory.path().join("new"), bytes: 64 << 20 };
        let disk = DiskSpec { files: vec![new.file.clone()], read_only: false, rate: None };
        assert_eq!(length(&disk, Some(&new)).unwrap(), 64 << 20);
    }

    #[test]
    fn what_no_frame_holds_is_booted_with() {
        let mut config = RunConfig { argv: vec!["sh".into()], ..RunConfig::default() };
        assert_eq!(start(&config, &[], None).unwrap().config, config);
        config.env = vec!["x".repeat(frame::MAX_FRAME_BYTES)];
        assert!(start(&config, &[], None).unwrap_err().to_string().contains("too long"));
    }
}
