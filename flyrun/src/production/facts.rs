//! What the host says about itself, as text: read here, judged elsewhere.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// What was read. `None` is a file that is not there or cannot be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// `1` while two threads of the CPU share a core.
    pub smt_active: Option<String>,
    /// What the kernel's merger of equal pages does.
    pub ksm_run: Option<String>,
    /// The kernel's table of swap areas.
    pub swaps: Option<String>,
    /// Whether KVM's huge pages are not executable.
    pub nx_huge_pages: Option<String>,
    /// Of each known weakness of CPUs, by its name: what this one does about it.
    pub vulnerabilities: BTreeMap<String, String>,
    /// The table of mounts.
    pub mounts: Option<String>,
    /// The controllers of the unified hierarchy.
    pub controllers: Option<String>,
    /// The kernel's release.
    pub release: Option<String>,
    /// Whether there are transparent huge pages.
    pub huge_pages: Option<String>,
    /// Permissions of the directory that machines, disks and snapshots are in.
    pub root_mode: Option<u32>,
    /// Permissions of /dev/kvm.
    pub kvm_mode: Option<u32>,
}

impl Facts {
    /// Reads /proc, /sys and /dev below `system`, which is `/` but in tests; `root` is flyrun's own.
    pub fn read(system: &Path, root: &Path) -> Facts {
        let text = |path: &str| fs::read_to_string(system.join(path)).ok().map(|text| text.trim().to_owned());
        let mode = |path: &Path| fs::metadata(path).ok().map(|found| found.permissions().mode() & 0o7777);
        let files = fs::read_dir(system.join("sys/devices/system/cpu/vulnerabilities"));
        let vulnerabilities = files.into_iter().flatten().flatten().filter_map(|entry| {
            let told = fs::read_to_string(entry.path()).ok()?;
            Some((entry.file_name().to_str()?.to_owned(), told.trim().to_owned()))
        });
        Facts {
            smt_active: text("sys/devices/system/cpu/smt/active"),
            ksm_run: text("sys/kernel/mm/ksm/run"),
            swaps: text("proc/swaps"),
            nx_huge_pages: text("sys/module/kvm/parameters/nx_huge_pages"),
            vulnerabilities: vulnerabilities.collect(),
            mounts: text("proc/mounts"),
            controllers: text("sys/fs/cgroup/cgroup.controllers"),
            release: text("proc/sys/kernel/osrelease"),
            huge_pages: text("sys/kernel/mm/transparent_hugepage/enabled"),
            root_mode: mode(root),
            kvm_mode: mode(&system.join("dev/kvm")),
        }
    }
}
