//! The table that tells the guest its CPUs, its IOAPIC and its interrupt lines: Intel's MultiProcessor Specification
//! 1.4, which Linux reads without ACPI.

use devices::virtio::Memory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

/// Where the floating pointer lies: the last KiB of base memory, one of the places the specification names (chapter 4).
pub const ADDRESS: u64 = 0x9_fc00;
/// Most CPUs that a machine can have: the table must fit its KiB.
pub const MAX_CPUS: u8 = 32;
/// Lines of the IOAPIC.
pub const IRQ_LINES: u8 = 24;

const ROOM: usize = 1024;
const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
const APIC_VERSION: u8 = 0x14;
const SPEC_1_4: u8 = 4;

const ENTRY_CPU: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IO_APIC: u8 = 2;
const ENTRY_IRQ: u8 = 3;
const ENTRY_LOCAL_IRQ: u8 = 4;

const CPU_ENABLED: u8 = 1;
const CPU_BOOT: u8 = 2;
const IRQ_TYPE_INT: u8 = 0;
const IRQ_TYPE_NMI: u8 = 1;
const IRQ_TYPE_EXTINT: u8 = 3;

/// Writes the table for that many CPUs and these interrupt lines to its place. Linux sets up every line it is told of
/// with some twenty exits to KVM's IOAPIC, so only those that have a device are in it.
///
/// # Errors
/// The machine has no memory there.
pub fn write(memory: &Memory, cpus: u8, lines: &[u8]) -> Result<(), GuestMemoryError> {
    memory.write_slice(&build(cpus, lines), GuestAddress(ADDRESS))
}

/// The floating pointer structure, directly followed by the configuration table.
fn build(cpus: u8, lines: &[u8]) -> Vec<u8> {
    let cpus = cpus.clamp(1, MAX_CPUS);
    let io_apic_id = cpus;
    let mut entries = 0u16;
    let mut body = Vec::with_capacity(ROOM);
    let mut entry = |bytes: &[u8]| {
        body.extend_from_slice(bytes);
        entries += 1;
    };
    for cpu in 0..cpus {
        let flags = if cpu == 0 { CPU_ENABLED | CPU_BOOT } else { CPU_ENABLED };
        let [s0, s1, s2, s3] = 0x600u32.to_le_bytes();
        let [f0, f1, f2, f3] = 0x201u32.to_le_bytes();
        entry(&[ENTRY_CPU, cpu, APIC_VERSION, flags, s0, s1, s2, s3, f0, f1, f2, f3, 0, 0, 0, 0, 0, 0, 0, 0]);
    }
    entry(&[ENTRY_BUS, 0, b'I', b'S', b'A', b' ', b' ', b' ']);
    let [a0, a1, a2, a3] = IO_APIC.to_le_bytes();
    entry(&[ENTRY_IO_APIC, io_apic_id, APIC_VERSION, CPU_ENABLED, a0, a1, a2, a3]);
    for line in lines.iter().filter(|line| **line < IRQ_LINES) {
        entry(&[ENTRY_IRQ, IRQ_TYPE_INT, 0, 0, 0, *line, io_apic_id, *line]);
    }
    entry(&[ENTRY_LOCAL_IRQ, IRQ_TYPE_EXTINT, 0, 0, 0, 0, 0, 0]);
    entry(&[ENTRY_LOCAL_IRQ, IRQ_TYPE_NMI, 0, 0, 0, 0, 0xff, 1]);

    let mut table = header(44 + body.len(), entries);
    table.extend_from_slice(&body);
    seal(&mut table, 7);
    let mut all = floating_pointer();
    all.extend_from_slice(&table);
    all
}

/// Section 4.1: 16 bytes, with the address of the table behind it.
fn floating_pointer() -> Vec<u8> {
    let mut pointer = Vec::with_capacity(ROOM);
    pointer.extend_from_slice(b"_MP_");
    pointer.extend_from_slice(&(ADDRESS as u32 + 16).to_le_bytes());
    pointer.extend_from_slice(&[1, SPEC_1_4, 0, 0, 0, 0, 0, 0]);
    seal(&mut pointer, 10);
    pointer
}

/// Section 4.2: 44 bytes.
fn header(length: usize, entries: u16) -> Vec<u8> {
    let length = u16::try_from(length).unwrap_or(u16::MAX);
    let mut header = Vec::with_capacity(ROOM);
    header.extend_from_slice(b"PCMP");
    header.extend_from_slice(&length.to_le_bytes());
    header.extend_from_slice(&[SPEC_1_4, 0]);
    header.extend_from_slice(b"FLYRUN  ");
    header.extend_from_slice(b"MICROVM     ");
    header.extend_from_slice(&[0; 6]);
    header.extend_from_slice(&entries.to_le_bytes());
    header.extend_from_slice(&LOCAL_APIC.to_le_bytes());
    header.extend_from_slice(&[0; 4]);
    header
}

/// Sets the byte at `position` so that the sum of all is zero.
fn seal(bytes: &mut [u8], position: usize) {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(checksum) = bytes.get_mut(position) {
        *checksum = checksum.wrapping_sub(sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [u8; 24] =
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn both_checksums_are_zero_for_every_number_of_cpus() {
        for cpus in 1..=MAX_CPUS {
            let all = build(cpus, &ALL);
            assert_eq!(sum(&all[..16]), 0);
            assert_eq!(sum(&all[16..]), 0);
        }
    }

    #[test]
    fn the_table_fits_its_kibibyte_with_all_cpus() {
        assert!(build(MAX_CPUS, &ALL).len() <= ROOM);
    }

    #[test]
    fn length_and_count_in_the_header_are_those_of_the_entries() {
        let table = &build(5, &[4, 7, 99])[16..];
        assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
        let count = u16::from_le_bytes([table[34], table[35]]);
        assert_eq!(count, 5 + 1 + 1 + 2 + 2, "line 99 does not exist");
        let mut rest = &table[44..];
        let mut seen = 0;
        while let Some(kind) = rest.first() {
            rest = &rest[if *kind == ENTRY_CPU { 20 } else { 8 }..];
            seen += 1;
        }
        assert_eq!(seen, count);
    }

    #[test]
    fn one_cpu_is_the_boot_cpu() {
        let table = &build(3, &[])[16 + 44..];
        let flags: Vec<u8> = table.chunks(20).take(3).map(|cpu| cpu[3]).collect();
        assert_eq!(flags, [3, 1, 1]);
    }

    #[test]
    fn a_machine_without_memory_there_is_refused() {
        let tiny = Memory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        assert!(write(&tiny, 1, &[]).is_err());
    }
}
