//! A machine's cgroup on the host, which holds all that works for the machine to its share of the CPU, and flyrun-vmm to the memory and
//! tasks that its machine is made of, whatever becomes of it (Linux, Documentation/admin-guide/cgroup-v2.rst). Only a machine with a
//! limit of the CPU has one, unless `FLYRUN_CGROUP=on`: entering a cgroup is waiting for RCU, some 20 ms now and then, where the
//! hierarchy has no favordynmods.
//!
//! ```text
//! flyrun/HOST-MACHINE/          the CPU's share and limit, of both together
//! flyrun/HOST-MACHINE/vmm       flyrun-vmm, vhost's threads, virtiofsd; the limits of memory and tasks
//! flyrun/HOST-MACHINE/monitor   the monitor while the machine runs, without limits of its own: it writes down what becomes of those
//! ```

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::machine::{Config, Limits};
use crate::network;
use crate::paths::Paths;

/// All machines' cgroups are below this one, in the root of the hierarchy.
const PARENT: &str = "flyrun";
/// Microseconds over which a quota holds; the kernel's and docker's default.
const PERIOD_USEC: u64 = 100_000;
/// The kernel's least quota, in microseconds.
const MIN_QUOTA_USEC: u64 = 1_000;
/// Where the processes are: the kernel allows none beside a cgroup that has limits.
const VMM: &str = "vmm";
const MONITOR: &str = "monitor";
/// Where a cgroup's processes are listed, and put.
const PROCESSES: &str = "cgroup.procs";
const CPU: &str = "cpu";
const CONTROLLERS: &[&str] = &[CPU, "memory", "pids"];
/// Those whose limits are not the machine's, but its VMM's.
const OF_PROCESSES: &[&str] = &["memory", "pids"];
/// `on` gives each machine a cgroup.
const SWITCH: &str = "FLYRUN_CGROUP";
/// What flyrun-vmm, its kernel threads and buffers take beside the guest's memory at most.
const OWN_BYTES: u64 = 64 << 20;
/// The host's copies of what the machine reads and writes on its disks, and the daemon of a shared directory: enough to be quick, and
/// given back by the kernel where it is short.
const CACHE_BYTES: u64 = 256 << 20;
/// As many as flyrun-vmm may have by its own limits (`vmm::jail`), with vhost's.
const TASKS: u64 = 160;
/// Of each virtiofsd.
const TASKS_OF_A_SHARE: u64 = 160;
/// A process that was killed is in its cgroup for a moment more.
const MAKING_ATTEMPTS: u32 = 8;
const REMOVAL_ATTEMPTS: u32 = 50;
const REMOVAL_PAUSE: Duration = Duration::from_millis(10);

/// The cgroup of one machine, removed when dropped.
#[derive(Debug)]
pub struct Cgroup {
    root: PathBuf,
    path: PathBuf,
    /// Where this process was before it joined.
    home: Option<PathBuf>,
}

impl Cgroup {
    /// Makes the cgroup of a machine, with its limits, if it has any.
    ///
    /// # Errors
    /// This host has no cgroup v2 with a CPU controller, or the user no rights in it.
    pub fn make_if_wanted(paths: &Paths, machine: &str, config: &Config) -> Result<Option<Cgroup>> {
        let wanted = config.limits.needs_cgroup() || is_always_wanted()?;
        wanted.then(|| Self::make(paths, machine, config.limits)).transpose()
    }

    fn make(paths: &Paths, machine: &str, limits: Limits) -> Result<Cgroup> {
        let root = root()?;
        let parent = root.join(PARENT);
        let path = parent.join(format!("{}{machine}", prefix(paths)));
        let make = || {
            enable(&root, CONTROLLERS)?;
            make_dir(&parent)?;
            enable(&parent, CONTROLLERS)?;
            make_dir(&path)?;
            // Below, one thread is as good as another: the kernel's scheduler knows the machine alone.
            enable(&path, OF_PROCESSES)?;
            make_dir(&path.join(VMM))?;
            make_dir(&path.join(MONITOR))
        };
        // A sweep by another process may take the common directory in the moment before there is something in it.
        let is_lost =
            |made: &io::Result<()>| made.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
        let mut made = make();
        for _ in 0..MAKING_ATTEMPTS {
            if is_lost(&made) {
                made = make();
            }
        }
        made.map_err(|error| refused(&path, &error))?;
        let cgroup = Cgroup { root, path, home: None };
        cgroup.limit(limits)?;
        Ok(cgroup)
    }

    /// For flyrun-vmm, and what serves it.
    pub fn of_vmm(&self) -> PathBuf {
        self.path.join(VMM)
    }

    /// Sets other limits.
    ///
    /// # Errors
    /// The kernel's.
    pub fn limit(&self, limits: Limits) -> Result<()> {
        let max = match limits.cpu_milli {
            Some(milli) => {
                let quota = (u64::from(milli) * PERIOD_USEC / 1000).max(MIN_QUOTA_USEC);
                format!("{quota} {PERIOD_USEC}")
            }
            None => format!("max {PERIOD_USEC}"),
        };
        let weight = weight(limits.cpu_shares).to_string();
        for (file, value) in [("cpu.max", max), ("cpu.weight", weight)] {
            fs::write(self.path.join(file), value).map_err(|error| refused(&self.path.join(file), &error))?;
        }
        Ok(())
    }

    /// Holds what is to start in it to the memory and tasks of its machine. Not what runs: it may have been made of another record.
    ///
    /// # Errors
    /// The kernel's.
    pub fn bound(&self, config: &Config) -> Result<()> {
        let vmm = self.of_vmm();
        let shares = u64::try_from(config.shares.len()).unwrap_or(0);
        let bounds = [
            ("memory.max", memory_bytes(config.memory.0)),
            ("pids.max", TASKS.saturating_add(TASKS_OF_A_SHARE.saturating_mul(shares))),
        ];
        for (file, value) in bounds {
            match fs::write(vmm.join(file), value.to_string()) {
                // A host without the controller goes without: the limits of the process itself (`vmm::jail`) hold in any case.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                // The kernel takes a file that is not there for one that may not be made.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied && !vmm.join(file).exists() => {
                }
                other => other.map_err(|error| refused(&vmm.join(file), &error))?,
            }
        }
        Ok(())
    }

    /// Moves a machine's flyrun-vmm into it, with all its threads.
    ///
    /// # Errors
    /// The kernel's.
    pub fn add(&self, process: u32) -> Result<()> {
        let file = self.of_vmm().join(PROCESSES);
        fs::write(&file, process.to_string()).map_err(|error| refused(&file, &error))
    }

    /// Moves this process, a machine's monitor, into it, unless it was tried before: what it does for the guest is the guest's share.
    /// To be called by who holds nothing that other machines wait for: this one may have to wait for its turn now.
    ///
    /// # Errors
    /// The kernel's.
    pub fn join(&mut self) -> Result<()> {
        if self.home.is_some() {
            return Ok(());
        }
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        self.home = Some(home(&own, &self.root));
        enter(&self.path.join(MONITOR))
    }

    /// Moves this process back to where it was. What is left to do when a machine has ended is the host's work, and nobody waits for it
    /// longer than the host takes.
    pub fn leave(&mut self) {
        let Some(home) = self.home.take() else { return };
        if enter(&home).is_err() {
            // It was the last one there, and whoever had made that cgroup has taken it away.
            let _ = enter(&self.root);
        }
    }
}

/// Moves this process into a cgroup.
fn enter(cgroup: &Path) -> Result<()> {
    let file = cgroup.join(PROCESSES);
    fs::write(&file, "0").map_err(|error| refused(&file, &error))
}

/// The directory of the cgroup that /proc/self/cgroup tells; the root, where that is none below it.
fn home(own: &str, root: &Path) -> PathBuf {
    let path = own.lines().find_map(|line| line.strip_prefix("0::/")).map(Path::new);
    let is_below = |path: &&Path| path.components().all(|part| matches!(part, Component::Normal(_)));
    path.filter(is_below).map_or_else(|| root.to_path_buf(), |path| root.join(path))
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        self.leave();
        remove(&self.path);
    }
}

/// Removes the cgroups of machines that live no more, and then the one they are in.
pub fn sweep(paths: &Paths, is_live: &dyn Fn(&str) -> bool) {
    let Ok(root) = root() else { return };
    let parent = root.join(PARENT);
    let Ok(entries) = fs::read_dir(&parent) else { return };
    let prefix = prefix(paths);
    for entry in entries.flatten() {
        let name = entry.file_name();
        if name.to_str().and_then(|name| name.strip_prefix(&prefix)).is_some_and(|machine| !is_live(machine))
        {
            remove(&entry.path());
        }
    }
    let _ = fs::remove_dir(&parent);
}

/// By which flyruns with different directories leave each other's cgroups alone.
fn prefix(paths: &Paths) -> String {
    format!("{:016x}-", network::host(paths))
}

fn remove(path: &Path) {
    let _gone_already = fs::remove_dir(path.join(MONITOR));
    for leaf_or_all in [path.join(VMM), path.to_path_buf()] {
        for _ in 0..REMOVAL_ATTEMPTS {
            match fs::remove_dir(&leaf_or_all) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                    std::thread::sleep(REMOVAL_PAUSE)
                }
                _ => break,
            }
        }
    }
    // The last one out takes the common directory away.
    if let Some(parent) = path.parent() {
        let _ = fs::remove_dir(parent);
    }
}

/// Whether this host can hold machines to limits.
pub fn is_available() -> bool {
    root().is_ok()
}

/// Where the unified hierarchy is mounted.
fn root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let root = mount_point(&mounts).map(PathBuf::from);
    let has_cpu = |root: &PathBuf| {
        let controllers = fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
        controllers.split_whitespace().any(|name| name == CPU)
    };
    root.filter(has_cpu).ok_or_else(|| {
        Error::new("this host has no cgroup v2 with the cpu controller, which CPU limits need")
            .advice("Boot it with systemd.unified_cgroup_hierarchy=1, or leave --cpu-shares away and give whole --cpus.")
    })
}

fn mount_point(mounts: &str) -> Option<&str> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (at, kind) = (fields.next()?, fields.next()?);
        (kind == "cgroup2").then_some(at)
    })
}

fn make_dir(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Gives what is below a cgroup these controllers: the CPU's, without which there is no use in it, and others where the host has them.
fn enable(cgroup: &Path, controllers: &[&str]) -> io::Result<()> {
    let file = cgroup.join("cgroup.subtree_control");
    let there = fs::read_to_string(cgroup.join("cgroup.controllers"))?;
    let enabled = fs::read_to_string(&file)?;
    let has = |list: &str, wanted: &str| list.split_whitespace().any(|name| name == wanted);
    for name in controllers {
        let is_needed = *name == CPU;
        if has(&enabled, name) || !(is_needed || has(&there, name)) {
            continue;
        }
        match fs::write(&file, format!("+{name}")) {
            Err(error) if is_needed => return Err(error),
            // Somebody's processes in the cgroup itself, for instance, are no reason to have no limit of the CPU.
            _ => {}
        }
    }
    Ok(())
}

/// What the cgroup of a machine with so much memory may hold.
fn memory_bytes(guest: u64) -> u64 {
    guest.saturating_add(OWN_BYTES).saturating_add(CACHE_BYTES)
}

fn is_always_wanted() -> Result<bool> {
    match std::env::var(SWITCH).as_deref() {
        Err(_) | Ok("" | "auto") => Ok(false),
        Ok("on") => Ok(true),
        Ok(other) => Err(Error::new(format!("{SWITCH} is {other:?}, which is neither on nor auto"))),
    }
}

/// docker's and runc's way from shares (2 to 262144, 1024 is usual) to weight (1 to 10000, 100 is usual).
fn weight(shares: Option<u32>) -> u64 {
    match shares {
        Some(shares) => 1 + (u64::from(shares.clamp(2, 262_144)) - 2) * 9_999 / 262_142,
        None => 100,
    }
}

fn refused(path: &Path, error: &io::Error) -> Error {
    let told = Error::caused(format!("cannot limit the machine's CPU by {}", path.display()), error);
    match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            told.advice("Run flyrun as root, or leave the CPU limits away.")
        }
        _ => told,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_become_weights() {
        assert_eq!([None, Some(2), Some(1024), Some(262_144)].map(weight), [100, 1, 39, 10_000]);
    }

    #[test]
    fn the_unified_hierarchy_is_found_wherever_it_is() {
        let mounts =
            "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(mount_point(mounts), Some("/sys/fs/cgroup/unified"));
        assert_eq!(mount_point("cgroup2 /x ext4 rw 0 0\n\nx\n"), None);
    }

    #[test]
    fn a_monitor_goes_home_or_to_the_root_when_that_cannot_be_named() {
        let root = Path::new("/c");
        assert_eq!(home("1:cpu:/x\n0::/user.slice/a b.scope\n", root), Path::new("/c/user.slice/a b.scope"));
        for own in ["", "0::/\n", "0::/../outside\n", "1:cpu:/x\n", "0::relative"] {
            assert_eq!(home(own, root), root, "{own}");
        }
    }
}
