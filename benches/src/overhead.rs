//! Resident memory of flyrun-vmm beyond the guest's own.
//!
//! Of the process's mappings (/proc/PID/smaps) those are left out that make up the guest's memory: neighbours without
//! a gap whose sizes add up to it exactly. There may be several, because the kernel's file is mapped in their midst.
//! What counts is the rest's resident set, shared pages of program and libraries included.

use anyhow::{Context, Result};

use crate::{
    bare::{MEMORY_MIB, Machine},
    report::Report,
    run::Started,
};

/// vmm.overhead.
pub fn measure(machine: &Machine, report: &mut Report) -> Result<()> {
    let started = Started::new(&mut machine.flyrun("hold")?, "FIRST-LINE")?;
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", started.id()))?;
    let mappings = parse(&smaps)?;
    let guest = find_guest(&mappings, u64::from(MEMORY_MIB) << 20)
        .with_context(|| format!("no mappings add up to {MEMORY_MIB} MiB of guest memory:\n{smaps}"))?;
    let resident =
        |mappings: &[Mapping]| mappings.iter().map(|mapping| mapping.resident_kib).sum::<u64>() as f64;
    let guest = mappings.get(guest).unwrap_or_default();
    report.add("vmm.overhead", "KiB", &[resident(&mappings) - resident(guest)]);
    report.add("vmm.guest_resident", "KiB", &[resident(guest)]);
    Ok(())
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    resident_kib: u64,
}

fn parse(smaps: &str) -> Result<Vec<Mapping>> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        if let Some(rest) = line.strip_prefix("Rss:") {
            let mapping = mappings.last_mut().context("a size stands before the first mapping")?;
            mapping.resident_kib =
                rest.trim().trim_end_matches(" kB").parse().with_context(|| format!("not a size: {line}"))?;
        } else if let Some((start, end)) = line.split(' ').next().and_then(|range| range.split_once('-')) {
            let address =
                |text| u64::from_str_radix(text, 16).with_context(|| format!("not an address: {line}"));
            mappings.push(Mapping { start: address(start)?, end: address(end)?, resident_kib: 0 });
        }
    }
    Ok(mappings)
}

/// The range of neighbouring mappings, one without a gap to the next, that are `size` bytes together.
fn find_guest(mappings: &[Mapping], size: u64) -> Option<std::ops::Range<usize>> {
    for (first, mapping) in mappings.iter().enumerate() {
        let mut end = mapping.start;
        for (last, next) in mappings.iter().enumerate().skip(first) {
            if next.start != end || end - mapping.start > size {
                break;
            }
            end = next.end;
            if end - mapping.start == size {
                return Some(first..last + 1);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
00001000-00003000 r-xp 00000000 00:15 7 /flyrun-vmm
Size:                  8 kB
Rss:                   8 kB
7f0000000000-7f0000004000 rw-p 00000000 00:00 0
Rss:                   4 kB
VmFlags: rd wr
7f0000004000-7f0000006000 rw-p 00001000 00:15 9 /vmlinux
Rss:                   2 kB
7f0000006000-7f0000010000 rw-p 00000000 00:00 0
Rss:                   1 kB
7f0000011000-7f0000012000 rw-p 00000000 00:00 0
Rss:                  16 kB
";

    #[test]
    fn guest_memory_is_found_in_pieces_with_the_kernel_in_their_midst() {
        let mappings = parse(SMAPS).unwrap();
        assert_eq!(mappings.len(), 5);
        assert_eq!(find_guest(&mappings, 0x10000), Some(1..4));
        assert_eq!(mappings.iter().map(|mapping| mapping.resident_kib).sum::<u64>(), 31);
    }

    #[test]
    fn mappings_with_a_gap_are_not_taken_for_one_memory() {
        let mappings = parse(SMAPS).unwrap();
        assert_eq!(find_guest(&mappings, 0x11000), None);
    }
}
