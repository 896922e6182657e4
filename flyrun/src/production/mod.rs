//! Whether a host is fit for guests that do not trust each other: `flyrun doctor --production`. SECURITY.md says why each
//! of these counts. Judging is pure; [`Facts`] are read before.

mod facts;

pub use facts::Facts;

/// The oldest longterm kernel that still gets its repairs as of this release.
const OLDEST_KERNEL: (u32, u32) = (5, 15);

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grade {
    /// As it should be.
    Good,
    /// Costs speed, or a layer of defence behind others.
    Weak,
    /// One guest may learn another's secrets, or a user of the host a guest's.
    Bad,
}

/// One of the things that were looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// A word for it, which stays.
    pub name: &'static str,
    /// How bad it is.
    pub grade: Grade,
    /// What was found.
    pub message: String,
    /// What to do, unless it is good.
    pub remedy: &'static str,
}

fn good(name: &'static str, message: &str) -> Finding {
    Finding { name, grade: Grade::Good, message: message.to_owned(), remedy: "" }
}

fn weak(name: &'static str, message: impl Into<String>, remedy: &'static str) -> Finding {
    Finding { name, grade: Grade::Weak, message: message.into(), remedy }
}

fn bad(name: &'static str, message: impl Into<String>, remedy: &'static str) -> Finding {
    Finding { name, grade: Grade::Bad, message: message.into(), remedy }
}

/// Judges all facts, each once.
pub fn judge(facts: &Facts) -> Vec<Finding> {
    vec![
        smt(facts),
        mitigations(facts),
        itlb(facts),
        ksm(facts),
        swap(facts),
        kernel(facts),
        cgroup(facts),
        huge_pages(facts),
        root(facts),
        kvm(facts),
    ]
}

fn smt(facts: &Facts) -> Finding {
    match facts.smt_active.as_deref() {
        Some("0") => good("smt", "no two threads share a core"),
        Some(_) => bad(
            "smt",
            "two threads share a core, and with it caches and buffers: a guest may watch the other thread's guest",
            "Boot with nosmt, or echo off > /sys/devices/system/cpu/smt/control.",
        ),
        None => weak(
            "smt",
            "the kernel does not say whether threads share a core",
            "Look into the firmware's settings.",
        ),
    }
}

/// Whether a piece of what the kernel says tells of a hole. Those of SMT are told once, by [`smt`].
fn is_hole(piece: &str) -> bool {
    let piece = piece.trim().to_lowercase();
    !piece.contains("smt") && (piece.contains("vulnerable") || piece.contains("no microcode"))
}

fn mitigations(facts: &Facts) -> Finding {
    if facts.vulnerabilities.is_empty() {
        return weak(
            "mitigations",
            "the kernel does not say what it does about the CPU's weaknesses",
            "Mount /sys, or take a kernel of 4.15 or later.",
        );
    }
    // KVM has a check of its own for the last.
    let open = facts.vulnerabilities.iter().filter(|(name, _)| *name != "itlb_multihit");
    let open: Vec<_> = open.filter(|(_, told)| told.split([';', ',']).any(is_hole)).collect();
    match open.as_slice() {
        [] => good("mitigations", "the kernel mitigates all weaknesses of this CPU that it knows"),
        open => {
            let told: Vec<_> = open.iter().map(|(name, told)| format!("{name} ({told})")).collect();
            bad(
                "mitigations",
                format!("open: {}", told.join(", ")),
                "Install the CPU's microcode (intel-microcode, amd64-microcode), and do not boot with mitigations=off.",
            )
        }
    }
}

fn itlb(facts: &Facts) -> Finding {
    let name = "nx_huge_pages";
    let told = facts.vulnerabilities.get("itlb_multihit").map_or("", String::as_str);
    match (told, facts.nx_huge_pages.as_deref()) {
        ("Not affected", Some("N" | "off" | "never") | None) => good(name, "not needed on this CPU, and off"),
        ("Not affected", Some(_)) => weak(
            name,
            "on, where the CPU does not need it: machines start more slowly",
            "echo options kvm nx_huge_pages=off > /etc/modprobe.d/kvm.conf, and reboot.",
        ),
        (_, None) => weak(name, "the module kvm is not loaded, or does not say", "modprobe kvm"),
        (_, Some("N" | "off" | "never")) => bad(
            name,
            "off: a guest can halt the host's CPU for ever (iTLB multihit)",
            "echo options kvm nx_huge_pages=auto > /etc/modprobe.d/kvm.conf, and reboot.",
        ),
        (_, Some(_)) => good(name, "on, as this CPU needs it"),
    }
}

fn ksm(facts: &Facts) -> Finding {
    match facts.ksm_run.as_deref() {
        Some("0" | "2") | None => good("ksm", "equal pages of different guests are not merged"),
        Some(_) => bad(
            "ksm",
            "equal pages are merged: by the time of a write a guest learns what others have in memory",
            "echo 2 > /sys/kernel/mm/ksm/run, and disable ksmtuned.",
        ),
    }
}

fn swap(facts: &Facts) -> Finding {
    let Some(table) = &facts.swaps else { return good("swap", "there is none") };
    let areas = table.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    let disks: Vec<_> = areas.filter(|area| !area.starts_with("/dev/zram")).collect();
    match disks.as_slice() {
        [] => good("swap", "no guest's memory is written to a disk"),
        disks => weak(
            "swap",
            format!("guests' memory may be written to {}, and stay there", disks.join(", ")),
            "swapoff -a, or encrypt it with a key that is made at each boot (crypttab: swap).",
        ),
    }
}

fn kernel(facts: &Facts) -> Finding {
    let release = facts.release.as_deref().unwrap_or("");
    let mut numbers = release.split(['.', '-']).map(|part| part.parse().ok());
    let version = numbers.next().flatten().zip(numbers.next().flatten());
    match version {
        Some(version) if version >= OLDEST_KERNEL => good("kernel", release),
        Some(_) => bad(
            "kernel",
            format!("{release} is older than 5.15, and gets no repairs any more"),
            "Install your distribution's current kernel.",
        ),
        None => weak(
            "kernel",
            format!("its release is {release:?}"),
            "Install your distribution's current kernel.",
        ),
    }
}

fn cgroup(facts: &Facts) -> Finding {
    let mounts = facts.mounts.as_deref().unwrap_or("");
    let options = mounts.lines().find_map(|line| {
        let fields: Vec<_> = line.split(' ').collect();
        (fields.get(2) == Some(&"cgroup2")).then(|| fields.get(3).copied().unwrap_or(""))
    });
    match options {
        None => bad(
            "cgroup2",
            "there is no cgroup v2: a machine cannot be held to its share of the host",
            "Boot with systemd.unified_cgroup_hierarchy=1.",
        ),
        Some(options) if options.split(',').any(|option| option == "ro") => bad(
            "cgroup2",
            "not writable: a machine cannot be held to its share of the host",
            "Run flyrun where /sys/fs/cgroup is writable: as root, in no container or in one with its own cgroup namespace.",
        ),
        Some(_) if !has_controllers(facts) => weak(
            "cgroup2",
            "without the controllers of memory and tasks: a flyrun-vmm is held to its own limits alone",
            "Boot with systemd.unified_cgroup_hierarchy=1, and without cgroup_disable=memory.",
        ),
        Some(options) if options.split(',').any(|option| option == "favordynmods") => {
            good("cgroup2", "mounted with favordynmods")
        }
        Some(_) => weak(
            "cgroup2",
            "mounted without favordynmods: now and then a start takes some 20 ms longer",
            "mount -o remount,favordynmods /sys/fs/cgroup",
        ),
    }
}

fn has_controllers(facts: &Facts) -> bool {
    let there = facts.controllers.as_deref().unwrap_or("");
    ["cpu", "memory", "pids"].iter().all(|wanted| there.split_whitespace().any(|name| name == *wanted))
}

fn huge_pages(facts: &Facts) -> Finding {
    match facts.huge_pages.as_deref() {
        Some(told) if told.contains("[never]") => weak(
            "thp",
            "no transparent huge pages: machines start more slowly",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        ),
        Some(_) => good("thp", "transparent huge pages where they are asked for"),
        None => weak(
            "thp",
            "the kernel has no transparent huge pages",
            "Take a kernel with CONFIG_TRANSPARENT_HUGEPAGE.",
        ),
    }
}

fn root(facts: &Facts) -> Finding {
    match facts.root_mode {
        None => good("root-mode", "the root does not exist yet; it will be its owner's alone"),
        Some(mode) if mode & 0o077 == 0 => good("root-mode", "the root is its owner's alone"),
        Some(mode) if mode & 0o022 != 0 => bad(
            "root-mode",
            format!("the root has mode {mode:04o}: others may write to disks and snapshots"),
            "chmod 700 the directory that --root names.",
        ),
        Some(mode) => bad(
            "root-mode",
            format!("the root has mode {mode:04o}: others may find disks, logs and snapshots"),
            "chmod 700 the directory that --root names.",
        ),
    }
}

fn kvm(facts: &Facts) -> Finding {
    match facts.kvm_mode {
        Some(mode) if mode & 0o007 != 0 => weak(
            "kvm-mode",
            format!("/dev/kvm has mode {mode:04o}: every user of the host may make machines"),
            "chmod 660 /dev/kvm, and a udev rule for it.",
        ),
        Some(_) => good("kvm-mode", "/dev/kvm is for its group alone"),
        None => weak("kvm-mode", "there is no /dev/kvm", "flyrun doctor says what is missing."),
    }
}

#[cfg(test)]
mod tests;
