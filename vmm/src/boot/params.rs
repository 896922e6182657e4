//! The zero page: what the boot protocol tells the kernel about its memory, command line and initramfs.

use devices::virtio::Memory;
use linux_loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, LoadedKernel, command_line, initrd::Initrd};
use crate::memory;

/// Where the zero page lies.
pub const ZERO_PAGE: u64 = 0x7000;
/// End of base memory: behind it come the MP table and the BIOS area.
const BASE_END: u64 = 0x9_fc00;
const BIOS_END: u64 = 0x10_0000;

const BOOT_FLAG: u16 = 0xaa55;
const HDRS: u32 = 0x5372_6448;
const LOADER_UNDEFINED: u8 = 0xff;
const LOADED_HIGH: u8 = 1;
const MIN_ALIGNMENT: u32 = 0x20_0000;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Writes the zero page for a machine with that many bytes of memory.
///
/// # Errors
/// The machine has no memory there.
pub fn write(
    guest: &Memory,
    memory_bytes: u64,
    kernel: &LoadedKernel,
    command_line_length: usize,
    initrd: Option<Initrd>,
) -> Result<(), BootError> {
    let params = build(memory_bytes, kernel, command_line_length, initrd);
    Ok(guest.write_obj(params, GuestAddress(ZERO_PAGE))?)
}

fn build(
    memory_bytes: u64,
    kernel: &LoadedKernel,
    command_line_length: usize,
    initrd: Option<Initrd>,
) -> boot_params {
    let mut params = boot_params { hdr: kernel.setup_header.unwrap_or_default(), ..Default::default() };
    if kernel.setup_header.is_none() {
        params.hdr.boot_flag = BOOT_FLAG;
        params.hdr.header = HDRS;
        params.hdr.kernel_alignment = MIN_ALIGNMENT;
        params.hdr.loadflags = LOADED_HIGH;
    }
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = command_line::ADDRESS as u32;
    params.hdr.cmdline_size = command_line_length as u32;
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = initrd.address as u32;
        params.hdr.ramdisk_size = initrd.size as u32;
    }
    let map = e820(memory_bytes);
    params.e820_entries = map.len() as u8;
    // Copied, because the packed struct allows no references into its table.
    let mut table = params.e820_table;
    for (slot, entry) in table.iter_mut().zip(map) {
        *slot = entry;
    }
    params.e820_table = table;
    params
}

fn e820(memory_bytes: u64) -> Vec<boot_e820_entry> {
    let entry = |addr: u64, end: u64, type_: u32| boot_e820_entry { addr, size: end - addr, r#type: type_ };
    let mut map = vec![entry(0, BASE_END, E820_RAM), entry(BASE_END, BIOS_END, E820_RESERVED)];
    for (start, length) in memory::layout(memory_bytes) {
        map.push(entry(start.max(BIOS_END), start + length, E820_RAM));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{HIGH_START, LOW_END, reserve};

    fn kernel() -> LoadedKernel {
        LoadedKernel { entry: GuestAddress(0x100_0000), end: 0x200_0000, setup_header: None, text: None }
    }

    fn ram(map: &[boot_e820_entry]) -> u64 {
        map.iter()
            .filter(|e| {
                let t = e.r#type;
                t == E820_RAM
            })
            .map(|e| e.size)
            .sum()
    }

    #[test]
    fn the_map_is_sorted_without_overlap_and_loses_only_the_bios_area() {
        for mib in [64u64, 3328, 8192] {
            let map = e820(mib << 20);
            for pair in map.windows(2) {
                let (addr, size, next) = (pair[0].addr, pair[0].size, pair[1].addr);
                assert!(addr + size <= next);
            }
            assert_eq!(ram(&map), (mib << 20) - (BIOS_END - BASE_END));
        }
    }

    #[test]
    fn memory_beyond_the_gap_starts_at_four_gib() {
        let map = e820(LOW_END + (1 << 30));
        let last = map.last().unwrap();
        let (addr, size) = (last.addr, last.size);
        assert_eq!((addr, size), (HIGH_START, 1 << 30));
    }

    #[test]
    fn the_header_has_the_protocols_magic_and_places() {
        let initrd = Initrd { address: 0x300_0000, size: 77 };
        let params = build(128 << 20, &kernel(), 40, Some(initrd));
        let header = params.hdr;
        let (magic, image, size, line) =
            (header.header, header.ramdisk_image, header.ramdisk_size, header.cmd_line_ptr);
        assert_eq!((magic, image, size, u64::from(line)), (HDRS, 0x300_0000, 77, command_line::ADDRESS));
        let (loader, entries) = (header.type_of_loader, params.e820_entries);
        assert_eq!((loader, entries), (LOADER_UNDEFINED, 3));
    }

    #[test]
    fn the_zero_page_is_one_page_and_is_written() {
        assert_eq!(size_of::<boot_params>(), 4096);
        let memory = reserve(2).unwrap();
        write(&memory, 2 << 20, &kernel(), 4, None).unwrap();
        assert_eq!(memory.read_obj::<u32>(GuestAddress(ZERO_PAGE + 0x202)).unwrap(), HDRS);
    }
}
