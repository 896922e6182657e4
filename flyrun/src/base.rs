//! Base snapshots: machines that have booted and wait to be told what to run ([`BootConfig::Wait`]), one for each shape of
//! machine. Going on from one is what a boot comes to, without the boot.
//!
//! A base is a cache: made by the first machine of its shape that is started, in a virtual machine of its own, whose disks are
//! empty and which is told nothing; thrown away when it cannot be gone on from, and then made anew. `bases/KEY` is a
//! snapshot's directory, whole or not there.
//!
//! To mount a disk takes longer than to copy an empty one. So new machines whose disk is of the usual size have a base in whose memory it is
//! mounted, and begin with a copy of that base's own disk, `bases/KEY/disk.ext4`, as it was when the base stood still.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use images::{Store, TemplateKind};
use protocol::{BootConfig, FromGuest, PROTOCOL_VERSION};
use serde::Serialize;
use vmm::snapshot::identity::{FileId, sha256};
use vmm::spec::{DiskSpec, NetSpec};

use crate::error::{Context, Error, Result, from_images};
use crate::kernel_text;
use crate::machine::{DISK, SNAPSHOT_STATE, new_id};
use crate::paths::{Paths, RunDir, is_same_file, make_private_dir};
use crate::trace;
use crate::vm::{Event, Mailbox, NewDisk, Vm, VmPlan};

/// How long the machine that becomes a base may take, from its start to its end.
const LIMIT: Duration = Duration::from_secs(30);
/// How many bases are kept: those that were used last.
const KEPT: usize = 16;
/// A base takes some 12 MiB. Below so much free space, in bytes, none is made.
const SPARE_BYTES: u64 = 256 << 20;
/// Hexadecimal digits of a base's name.
const KEY_DIGITS: usize = 16;

/// All that a guest can tell of a machine before it is told what to run. Machines that differ in nothing of it share a base.
#[derive(Debug, Serialize)]
struct Shape<'a> {
    flyrun: &'a str,
    protocol: u32,
    /// Programs that were built anew are others.
    parts: [FileId; 3],
    kernel: &'a Path,
    cpus: u8,
    memory_mib: u32,
    /// Whether each disk is only read.
    disks: Vec<bool>,
    /// The length in bytes of the disk that is mounted.
    mounted: Option<u64>,
    nets: Vec<Card>,
}

#[derive(Debug, Serialize)]
struct Card {
    mtu: u16,
    queue_pairs: u16,
    backend: vmm::spec::NetBackend,
    /// Who moves the packets may depend on it.
    has_rate: bool,
}

impl Shape<'_> {
    fn of(plan: &VmPlan) -> Result<Shape<'_>> {
        let id = |path: &PathBuf| FileId::of(path).context(format!("cannot look at {}", path.display()));
        let card = |net: &NetSpec| Card {
            mtu: net.mtu,
            queue_pairs: net.queue_pairs,
            backend: net.backend,
            has_rate: net.rate.is_some(),
        };
        Ok(Shape {
            flyrun: env!("CARGO_PKG_VERSION"),
            protocol: PROTOCOL_VERSION,
            parts: [id(&plan.vmm)?, id(&plan.kernel)?, id(&plan.initramfs)?],
            kernel: &plan.kernel,
            cpus: plan.cpus,
            memory_mib: plan.memory_mib,
            disks: plan.disks.iter().map(|disk| disk.read_only).collect(),
            mounted: disk(plan).map(|disk| disk.bytes),
            nets: plan.nets.iter().map(card).collect(),
        })
    }

    fn key(&self) -> Result<String> {
        let text = serde_json::to_vec(self).context("cannot describe a base snapshot")?;
        Ok(sha256(&text).chars().take(KEY_DIGITS).collect())
    }
}

/// Whether machines of this plan can go on from a base at all. One whose console is shown is to show its boot, and a
/// virtiofsd cannot be taken over.
pub fn suits(plan: &VmPlan) -> bool {
    plan.restore.is_none() && plan.shares.is_empty() && plan.console.is_some()
}

/// The disk that the base of such machines has mounted, of which the machine is to have a copy.
pub fn disk(plan: &VmPlan) -> Option<&NewDisk> {
    plan.new_disk.as_ref().filter(|disk| disk.bytes == images::DISK_DEFAULT_BYTES)
}

/// A base, and what it is known by: another one in its place is another.
#[derive(Debug)]
pub struct Base {
    pub directory: PathBuf,
    known_by: FileId,
}

impl Base {
    fn at(directory: PathBuf) -> Option<Base> {
        let known_by = FileId::of(&directory.join(SNAPSHOT_STATE)).ok()?;
        Some(Base { directory, known_by })
    }

    /// Whether it is still the one that was found.
    pub fn is_the_same(&self) -> bool {
        FileId::of(&self.directory.join(SNAPSHOT_STATE)).is_ok_and(|found| found == self.known_by)
    }

    /// Whether there is a disk that it has mounted.
    pub fn has_disk(&self) -> bool {
        self.directory.join(DISK).exists()
    }

    /// Copies that.
    ///
    /// # Errors
    /// It has none, or the host's.
    pub fn copy_disk(&self, to: &Path) -> Result<()> {
        images::copy_file(&self.directory.join(DISK), to).map_err(|error| from_images(&error))
    }
}

/// The base of the machines that are like this one, if there is one.
///
/// # Errors
/// A part of flyrun is not there.
pub fn find(paths: &Paths, plan: &VmPlan) -> Result<Option<Base>> {
    let Some(base) = Base::at(paths.bases().join(Shape::of(plan)?.key()?)) else { return Ok(None) };
    // For `trim`; a clock that is wrong does no harm.
    let _ = File::open(&base.directory).and_then(|directory| directory.set_modified(SystemTime::now()));
    Ok(Some(base))
}

/// Makes the base of the machines that are like this one. Its network card's interface is used for that, so the machine
/// must not run yet.
///
/// # Errors
/// None can be made, which is a reason to boot.
pub fn make(paths: &Paths, store: &Store, plan: &VmPlan) -> Result<Base> {
    let base = paths.bases().join(Shape::of(plan)?.key()?);
    make_private_dir(&paths.bases())?;
    let lock_file = base.with_extension("lock");
    let lock = crate::files::open_lock(&lock_file).context("cannot lock a base snapshot")?;
    if lock.try_lock().is_err() || !is_same_file(&lock, &lock_file) {
        return Err(Error::new("another flyrun makes it now"));
    }
    let made = match Base::at(base.clone()) {
        Some(base) => Ok(base),
        None => write(paths, store, plan, &base).and_then(|()| {
            Base::at(base).ok_or_else(|| Error::new("the base snapshot that was just made is gone again"))
        }),
    };
    let _ = fs::remove_file(&lock_file);
    made
}

fn write(paths: &Paths, store: &Store, plan: &VmPlan, base: &Path) -> Result<()> {
    let told = || format!("cannot write {}", base.display());
    let space = rustix::fs::statvfs(paths.bases()).context(told())?;
    if space.f_bavail.saturating_mul(space.f_frsize) < SPARE_BYTES {
        return Err(Error::new("the disk has too little room for one"));
    }
    trim(&paths.bases(), KEPT - 1);
    let draft = base.with_extension("new");
    let _ = fs::remove_dir_all(&draft);
    let finished = record(paths, store, plan, &draft).and_then(|()| {
        fs::rename(&draft, base).context(told())?;
        File::open(paths.bases()).and_then(|directory| directory.sync_all()).context(told())?;
        kernel_text::keep(paths);
        Ok(())
    });
    if finished.is_err() {
        let _ = fs::remove_dir_all(&draft);
    }
    trace::step("base made");
    finished
}

/// Boots a machine of that shape up to the point where it waits, and writes it to the directory.
fn record(paths: &Paths, store: &Store, plan: &VmPlan, draft: &Path) -> Result<()> {
    let run_dir = Arc::new(paths.make_run_dir(&format!("base-{}", new_id()?))?);
    let mounted =
        disk(plan).and_then(|own| plan.disks.iter().position(|disk| disk.files.contains(&own.file)));
    let wait_with = |index| BootConfig::WaitWithDisk(protocol::disk_name(index));
    let mut plan = VmPlan {
        disks: empty_disks(plan, store, &run_dir)?,
        new_disk: None,
        boot: mounted.map_or(BootConfig::Wait, wait_with),
        console: Some(run_dir.path().join("console.log")),
        shares: vec![],
        delivery: None,
        nets: plan.nets.clone(),
        vmm: plan.vmm.clone(),
        kernel: plan.kernel.clone(),
        initramfs: plan.initramfs.clone(),
        streams: None,
        cgroup: None,
        restore: None,
        text: None,
        lock: None,
        ..*plan
    };
    let mailbox = Mailbox::new();
    let post = mailbox.post();
    let vm = Vm::start(&mut plan, Arc::clone(&run_dir), &post)?.attend()?;
    let until = Instant::now() + LIMIT;
    // Open as long as the machine is to wait.
    let mut control = None;
    loop {
        match mailbox.next(Some(until)).map_err(|_| Error::new("the machine did not become one in time"))? {
            Event::Connected(connected) => control = Some(connected),
            Event::Guest(FromGuest::Ready) => {
                vm.pause()?;
                vm.base_snapshot(draft, &post)?;
            }
            Event::Guest(FromGuest::Failed { message, .. }) => return Err(Error::new(message)),
            Event::Snapshotted(result) => {
                // The machine's disks and its interface are free when it is gone.
                vm.end();
                drop(control);
                result.map_err(Error::new)?;
                return mounted
                    .map_or(Ok(()), |index| keep_disk(&disk_file(&run_dir, index), &draft.join(DISK)));
            }
            Event::VmmExited(status) => {
                return Err(vm.failure(&status).unwrap_or_else(|| Error::new("the machine ended")));
            }
            _ => {}
        }
    }
}

fn keep_disk(disk: &Path, to: &Path) -> Result<()> {
    images::copy_file(disk, to).map_err(|error| from_images(&error))?;
    File::open(to).and_then(|file| file.sync_all()).context(format!("cannot write {}", to.display()))
}

fn disk_file(run_dir: &RunDir, index: usize) -> PathBuf {
    run_dir.path().join(format!("disk{index}"))
}

/// As many disks as the machine will have, with nothing on them but an empty filesystem on the one that is to be mounted.
fn empty_disks(plan: &VmPlan, store: &Store, run_dir: &RunDir) -> Result<Vec<DiskSpec>> {
    let empty = |(index, spec): (usize, &DiskSpec)| {
        let file = disk_file(run_dir, index);
        match disk(plan).filter(|own| spec.files.contains(&own.file)) {
            Some(own) => store
                .copy_template(TemplateKind::Disk, own.bytes, &file)
                .map_err(|error| from_images(&error))?,
            None => _ = File::create(&file).context(format!("cannot write {}", file.display()))?,
        }
        Ok(DiskSpec { files: vec![file], read_only: spec.read_only, rate: None })
    };
    plan.disks.iter().enumerate().map(empty).collect()
}

/// Throws a base away that cannot be gone on from. Machines that run from it keep what they have mapped.
pub fn discard(base: &Path) {
    let gone = base.with_extension(format!("gone{}", std::process::id()));
    if fs::rename(base, &gone).is_ok() {
        let _ = fs::remove_dir_all(&gone);
    }
}

/// Leaves only so many bases, those that were used last, and nothing that a killed flyrun has left.
fn trim(bases: &Path, most: usize) {
    let mut found: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in fs::read_dir(bases).into_iter().flatten().flatten() {
        let path = entry.path();
        match path.extension() {
            Some(extension) if extension == "lock" => {}
            // Another that is being made holds its lock.
            Some(extension) if extension == "new" && is_locked(&path.with_extension("lock")) => {}
            Some(_) => _ = fs::remove_dir_all(&path),
            None => {
                let used = entry.metadata().and_then(|metadata| metadata.modified());
                found.push((used.unwrap_or(SystemTime::UNIX_EPOCH), path));
            }
        }
    }
    found.sort();
    let surplus = found.len().saturating_sub(most);
    found.iter().take(surplus).for_each(|(_, base)| discard(base));
}

fn is_locked(lock: &Path) -> bool {
    File::open(lock).is_ok_and(|lock| lock.try_lock().is_err())
}

/// Removes all bases, and tells how many bytes that gives back.
pub fn remove_all(paths: &Paths) -> u64 {
    let bytes = bytes_of(&paths.bases());
    trim(&paths.bases(), 0);
    kernel_text::remove(paths);
    bytes - bytes_of(&paths.bases()).min(bytes)
}

/// What the files two levels down take of the disk.
fn bytes_of(bases: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = |directory: &Path| fs::read_dir(directory).into_iter().flatten().flatten();
    entries(bases)
        .flat_map(|base| entries(&base.path()))
        .filter_map(|file| Some(file.metadata().ok()?.blocks() * 512))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(directory: &Path) -> VmPlan {
        for part in ["vmm", "kernel", "initramfs"] {
            fs::write(directory.join(part), part).unwrap();
        }
        VmPlan {
            vmm: directory.join("vmm"),
            kernel: directory.join("kernel"),
            initramfs: directory.join("initramfs"),
            cpus: 1,
            memory_mib: 128,
            disks: vec![DiskSpec { files: vec!["/a".into()], read_only: true, rate: None }],
            new_disk: None,
            nets: vec![],
            shares: vec![],
            boot: BootConfig::Wait,
            delivery: None,
            console: Some("/console".into()),
            streams: None,
            cgroup: None,
            restore: None,
            text: None,
            lock: None,
        }
    }

    fn key(plan: &VmPlan) -> String {
        Shape::of(plan).unwrap().key().unwrap()
    }

    #[test]
    fn a_base_is_for_machines_that_a_guest_cannot_tell_apart() {
        let directory = tempfile::tempdir().unwrap();
        let one = plan(directory.path());
        let mut other = plan(directory.path());
        other.disks[0].files = vec!["/b".into(), "/c".into()];
        other.console = Some("/elsewhere".into());
        // Of another size, it is mounted when the machine is there.
        other.new_disk = Some(NewDisk { file: "/b".into(), bytes: images::MIN_BYTES });
        assert_eq!(key(&one), key(&other));
        let changes: [fn(&mut VmPlan); 6] = [
            |plan| plan.cpus = 2,
            |plan| plan.memory_mib = 256,
            |plan| plan.disks[0].read_only = false,
            |plan| plan.disks.push(plan.disks[0].clone()),
            |plan| {
                plan.new_disk = Some(NewDisk { file: "/a".into(), bytes: images::DISK_DEFAULT_BYTES });
            },
            |plan| {
                plan.nets.push(NetSpec {
                    tap: "t".into(),
                    mac: [2; 6],
                    mtu: 1500,
                    backend: Default::default(),
                    queue_pairs: 1,
                    rate: None,
                });
            },
        ];
        let mut keys: Vec<String> = changes
            .iter()
            .map(|change| {
                let mut changed = plan(directory.path());
                change(&mut changed);
                key(&changed)
            })
            .collect();
        keys.push(key(&one));
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), changes.len() + 1);
    }

    #[test]
    fn a_base_that_was_made_anew_is_another() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_path_buf();
        assert!(Base::at(path.clone()).is_none());
        let write = |seconds| {
            let state = File::create(path.join(SNAPSHOT_STATE)).unwrap();
            state.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)).unwrap();
        };
        write(1);
        let base = Base::at(path.clone()).unwrap();
        assert!(base.is_the_same() && !base.has_disk());
        fs::write(path.join(DISK), "disk").unwrap();
        base.copy_disk(&path.join("copy")).unwrap();
        assert_eq!(fs::read(path.join("copy")).unwrap(), b"disk");
        write(2);
        assert!(!base.is_the_same());
        fs::remove_file(path.join(SNAPSHOT_STATE)).unwrap();
        assert!(!base.is_the_same());
    }

    #[test]
    fn another_build_has_other_bases() {
        let directory = tempfile::tempdir().unwrap();
        let plan = plan(directory.path());
        let before = key(&plan);
        fs::write(&plan.initramfs, "built anew").unwrap();
        assert_ne!(key(&plan), before);
    }

    #[test]
    fn those_used_last_are_kept_and_drafts_of_the_dead_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let bases = directory.path();
        for (name, used) in [("a", 3), ("b", 1), ("c", 2), ("d.new", 9), ("e.gone7", 9), ("f.new", 9)] {
            fs::create_dir(bases.join(name)).unwrap();
            let time = SystemTime::UNIX_EPOCH + Duration::from_secs(used);
            File::open(bases.join(name)).unwrap().set_modified(time).unwrap();
        }
        let lock = crate::files::open_lock(&bases.join("f.lock")).unwrap();
        lock.lock().unwrap();
        trim(bases, 2);
        let mut left: Vec<_> = fs::read_dir(bases).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["a", "c", "f.lock", "f.new"]);
    }
}
