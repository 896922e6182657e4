//! The guest's own figures, from /proc and the workload's cgroup (proc(5), Documentation/admin-guide/cgroup-v2.rst).

use std::{fs::read_to_string, os::fd::BorrowedFd};

use protocol::session::{GuestStats, ProcessInfo};

use crate::run::cgroup::{counter, read_file};

/// Processes told at most, and in one frame; characters of a command line.
const MAX_PROCESSES: usize = 16_384;
const BATCH: usize = 32;
const MAX_COMMAND: usize = 1_000;
/// Ticks of the fields of /proc/PID/stat, which is part of the kernel's ABI on x86-64 (USER_HZ).
const TICKS_PER_SECOND: u64 = 100;
const SECTOR_BYTES: u64 = 512;
/// A flag in /proc/PID/stat: the kernel's own threads have it.
const PF_KTHREAD: u64 = 0x0020_0000;

/// What the machine uses. What the kernel does not tell is 0.
pub fn stats(cgroup: BorrowedFd<'_>) -> GuestStats {
    let in_cgroup = |name: &str| read_file(cgroup, name).unwrap_or_default();
    let proc = |name: &str| read_to_string(format!("/proc/{name}")).unwrap_or_default();
    let meminfo = proc("meminfo");
    let (memory_total, available) = (memory(&meminfo, "MemTotal:"), memory(&meminfo, "MemAvailable:"));
    let (net_rx, net_tx) = network(&proc("net/dev"));
    let (disk_read, disk_written) = disks(&proc("diskstats"));
    GuestStats {
        cpu_usec: counter(&in_cgroup("cpu.stat"), "usage_usec").unwrap_or(0),
        memory_total,
        memory_used: memory_total.saturating_sub(available),
        processes: in_cgroup("pids.current").trim().parse().unwrap_or(0),
        net_rx,
        net_tx,
        disk_read,
        disk_written,
    }
}

/// Bytes of a line of /proc/meminfo, which tells KiB.
fn memory(meminfo: &str, name: &str) -> u64 {
    let words = meminfo.lines().find_map(|line| line.strip_prefix(name));
    let kib: Option<u64> = words.and_then(|words| words.split_whitespace().next()?.parse().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

/// Bytes received and sent by all interfaces but loopback.
fn network(dev: &str) -> (u64, u64) {
    let interfaces = dev.lines().filter_map(|line| line.split_once(':'));
    let others = interfaces.filter(|(name, _)| name.trim() != "lo");
    others.fold((0, 0), |(received, sent), (_, line)| {
        let field = |index| -> u64 {
            line.split_whitespace().nth(index).and_then(|text| text.parse().ok()).unwrap_or(0)
        };
        (field(0).wrapping_add(received), field(8).wrapping_add(sent))
    })
}

/// Bytes read from and written to the machine's disks.
fn disks(diskstats: &str) -> (u64, u64) {
    diskstats.lines().fold((0, 0), |(read, written): (u64, u64), line| {
        let mut fields = line.split_whitespace();
        // Whole disks only: a partition's bytes are its disk's too.
        let is_disk = fields
            .nth(2)
            .and_then(|name| name.strip_prefix("vd"))
            .is_some_and(|letters| letters.bytes().all(|letter| letter.is_ascii_lowercase()));
        let mut bytes = |skip| {
            fields.nth(skip).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0).wrapping_mul(SECTOR_BYTES)
        };
        let (here_read, here_written) = (bytes(2), bytes(3));
        if is_disk {
            (read.wrapping_add(here_read), written.wrapping_add(here_written))
        } else {
            (read, written)
        }
    })
}

/// Tells the workload's processes in batches, the last of which is empty.
///
/// # Errors
/// Whatever `tell` fails with.
pub fn processes<E>(mut tell: impl FnMut(Vec<ProcessInfo>) -> Result<(), E>) -> Result<(), E> {
    let own = std::process::id();
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let mut batch = Vec::new();
    for pid in pids.filter(|pid| *pid != 1 && *pid != own).take(MAX_PROCESSES) {
        batch.extend(process(pid));
        if batch.len() == BATCH {
            tell(std::mem::take(&mut batch))?;
        }
    }
    if !batch.is_empty() {
        tell(batch)?;
    }
    tell(Vec::new())
}

fn process(pid: u32) -> Option<ProcessInfo> {
    let read = |name: &str| std::fs::read(format!("/proc/{pid}/{name}")).ok();
    let stat = Stat::parse(&String::from_utf8_lossy(&read("stat")?))?;
    if stat.flags & PF_KTHREAD != 0 {
        return None;
    }
    let status = String::from_utf8_lossy(&read("status")?).into_owned();
    let uid = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    let words = String::from_utf8_lossy(&read("cmdline")?).replace('\0', " ");
    let command = if words.trim().is_empty() { format!("[{}]", stat.name) } else { words.trim_end().into() };
    Some(ProcessInfo {
        uid: uid.split_whitespace().next()?.parse().ok()?,
        pid,
        ppid: stat.ppid,
        started: stat.start_ticks / TICKS_PER_SECOND,
        cpu_ms: stat.cpu_ticks * (1000 / TICKS_PER_SECOND),
        command: command.chars().take(MAX_COMMAND).map(|c| if c.is_control() { ' ' } else { c }).collect(),
    })
}

/// Fields of /proc/PID/stat.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    name: String,
    ppid: u32,
    flags: u64,
    cpu_ticks: u64,
    start_ticks: u64,
}

impl Stat {
    fn parse(line: &str) -> Option<Self> {
        // The name may hold anything, parentheses too.
        let (head, rest) = line.rsplit_once(')')?;
        let (_, name) = head.split_once('(')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        Some(Self {
            name: name.to_owned(),
            ppid: u32::try_from(field(4)?).ok()?,
            flags: field(9)?,
            cpu_ticks: field(14)?.checked_add(field(15)?)?,
            start_ticks: field(22)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn memory_is_told_in_kib() {
        let meminfo =
            "MemTotal:         114032 kB\nMemFree:           80000 kB\nMemAvailable:      90000 kB\n";
        assert_eq!(memory(meminfo, "MemTotal:"), 114_032 << 10);
        assert_eq!(memory(meminfo, "MemAvailable:"), 90_000 << 10);
        assert_eq!(memory(meminfo, "MemNothing:"), 0);
    }

    #[test]
    fn network_counts_all_but_loopback() {
        let dev = "Inter-|   Receive |  Transmit\n face |bytes packets errs\n\
            lo: 10 1 0 0 0 0 0 0 10 1 0 0 0 0 0 0\n\
            eth0: 1000 2 0 0 0 0 0 0 2000 3 0 0 0 0 0 0\n\
            eth1:1 2 0 0 0 0 0 0 2 3 0 0 0 0 0 0\n";
        assert_eq!(network(dev), (1001, 2002));
    }

    #[test]
    fn disks_count_in_sectors_and_partitions_not_twice() {
        let diskstats = " 254 0 vda 10 0 8 1 20 0 16 2 0 3 3\n 254 1 vda1 10 0 8 1 20 0 16 2 0 3 3\n \
            254 16 vdb 1 0 2 1 2 0 4 2 0 3 3\n 7 0 loop0 1 0 100 1 2 0 4 2 0 3 3\n";
        assert_eq!(disks(diskstats), (10 * 512, 20 * 512));
    }

    #[test]
    fn a_process_may_be_called_anything() {
        let line = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 2 3 4 50 60 0 0 20 0 1 0 300 0 0";
        let stat = Stat::parse(line).unwrap();
        let name = "a) b (c".to_owned();
        assert_eq!(stat, Stat { name, ppid: 1, flags: 4_194_560, cpu_ticks: 110, start_ticks: 300 });
    }

    #[test]
    fn the_list_of_processes_ends_with_an_empty_batch_and_holds_this_test_s_parent() {
        let mut batches = Vec::new();
        processes(|batch| {
            batches.push(batch);
            Ok::<_, ()>(())
        })
        .unwrap();
        assert!(batches.pop().unwrap().is_empty());
        let parent = rustix::process::getppid().unwrap().as_raw_nonzero().get() as u32;
        assert!(batches.iter().flatten().any(|process| process.pid == parent));
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parsers_panic(text in "[ -~\n]{0,200}") {
            Stat::parse(&text);
            network(&text);
            memory(&text, "a");
            disks(&text);
        }
    }
}
