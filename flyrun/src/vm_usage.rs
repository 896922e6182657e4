//! What a machine costs the host, from /proc (proc(5)).

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde::Serialize;

/// Unit of the times in /proc/PID/stat (USER_HZ), part of the kernel's ABI on x86-64.
const USEC_PER_TICK: u64 = 10_000;

/// What flyrun-vmm uses; zeros when it has just ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VmUsage {
    /// Bytes of memory it has mapped and that are present.
    pub rss: u64,
    /// The same, with pages that several processes share counted in parts.
    pub pss: u64,
    /// Microseconds of CPU, the guest's included.
    pub cpu_usec: u64,
}

/// Microseconds of CPU that a process has used, of its /proc/PID/stat; 0 when it has ended.
pub fn cpu_usec(stat: &str) -> u64 {
    cpu_ticks(stat).unwrap_or(0) * USEC_PER_TICK
}

/// What the flyrun-vmm that was started from this directory of sockets uses.
pub fn vm_usage(run_dir: &Path) -> VmUsage {
    let Some(process) = find(&run_dir.join("spec.json")) else { return VmUsage::default() };
    let read = |name: &str| fs::read_to_string(process.join(name)).unwrap_or_default();
    let memory = read("smaps_rollup");
    let stat = read("stat");
    VmUsage { rss: kib(&memory, "Rss:") << 10, pss: kib(&memory, "Pss:") << 10, cpu_usec: cpu_usec(&stat) }
}

/// The process in /proc that has this file as an argument of its own.
fn find(spec: &Path) -> Option<std::path::PathBuf> {
    let entries = fs::read_dir("/proc").ok()?.flatten().map(|entry| entry.path());
    let mut processes = entries
        .filter(|path| path.file_name().is_some_and(|name| name.as_bytes().iter().all(u8::is_ascii_digit)));
    processes.find(|process| {
        let words = fs::read(process.join("cmdline")).unwrap_or_default();
        let mut words = words.split(|byte| *byte == 0);
        let is_vmm = words.next().is_some_and(|program| program.ends_with(b"flyrun-vmm"));
        is_vmm && words.any(|word| word == spec.as_os_str().as_bytes())
    })
}

fn kib(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// utime and stime, the 14th and 15th field.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    next()?.checked_add(next()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_memory_are_read() {
        assert_eq!(cpu_ticks("7 (a) b) S 1 7 7 0 -1 4194560 1 2 3 4 50 60 0 0 20"), Some(110));
        assert_eq!(cpu_ticks("7 (a"), None);
        assert_eq!(kib("Rss:   12 kB\nPss:  7 kB\nPss_Dirty: 9 kB\n", "Pss:"), 7);
    }

    #[test]
    fn a_machine_without_a_vmm_uses_nothing() {
        assert_eq!(vm_usage(Path::new("/no/such/directory")), VmUsage::default());
    }
}
