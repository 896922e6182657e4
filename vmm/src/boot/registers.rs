//! The boot CPU's registers at the 64-bit entry point: long mode, flat segments, the first GiB mapped one to one.

use devices::virtio::Memory;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::params::ZERO_PAGE;

const GDT: u64 = 0x500;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PD: u64 = 0xb000;

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;

/// Boot protocol: `__BOOT_CS` and `__BOOT_DS`.
const SELECTOR_CODE: u16 = 0x10;
const SELECTOR_DATA: u16 = 0x18;
const SELECTOR_TASK: u16 = 0x20;
const TYPE_CODE: u8 = 0xb;
const TYPE_DATA: u8 = 0x3;
const TYPE_BUSY_TASK: u8 = 0xb;
const DESCRIPTORS: [u64; 6] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x008f_8b00_0000_ffff, 0];

/// Writes the tables that the registers point to.
///
/// # Errors
/// The machine has no memory there.
pub fn write_tables(memory: &Memory) -> Result<(), GuestMemoryError> {
    for (index, descriptor) in (0u64..).zip(DESCRIPTORS) {
        memory.write_obj(descriptor, GuestAddress(GDT + index * 8))?;
    }
    memory.write_obj(PDPT | PRESENT_WRITABLE, GuestAddress(PML4))?;
    memory.write_obj(PD | PRESENT_WRITABLE, GuestAddress(PDPT))?;
    let mut directory = [0u8; 4096];
    for (index, slot) in (0u64..).zip(directory.chunks_exact_mut(8)) {
        slot.copy_from_slice(&((index << 21) | LARGE_PAGE | PRESENT_WRITABLE).to_le_bytes());
    }
    memory.write_slice(&directory, GuestAddress(PD))
}

/// Sets long mode with flat segments on top of KVM's reset state.
pub fn long_mode(sregs: &mut kvm_sregs) {
    let data = segment(SELECTOR_DATA, TYPE_DATA);
    sregs.cs = kvm_segment { l: 1, db: 0, ..segment(SELECTOR_CODE, TYPE_CODE) };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { s: 0, db: 0, ..segment(SELECTOR_TASK, TYPE_BUSY_TASK) };
    sregs.gdt.base = GDT;
    sregs.gdt.limit = (size_of_val(&DESCRIPTORS) - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_PG;
    sregs.cr3 = PML4;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}

fn segment(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment { limit: 0xf_ffff, selector, type_, present: 1, db: 1, s: 1, g: 1, ..Default::default() }
}

/// General registers at the entry point: RSI holds the zero page.
pub fn general(entry: GuestAddress) -> kvm_regs {
    kvm_regs { rip: entry.0, rsi: ZERO_PAGE, rflags: RFLAGS_RESERVED, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::reserve;

    #[test]
    fn the_first_gib_maps_to_itself() {
        let memory = reserve(2).unwrap();
        write_tables(&memory).unwrap();
        let read = |address| memory.read_obj::<u64>(GuestAddress(address)).unwrap();
        for virt in [0u64, 0x20_0000, 0x3fe0_0000, 0x123_4567] {
            let pdpt = read(PML4 + (virt >> 39) * 8) & !0xfff;
            let pd = read(pdpt + ((virt >> 30) & 511) * 8) & !0xfff;
            let entry = read(pd + ((virt >> 21) & 511) * 8);
            assert_eq!((entry & !0x1f_ffff) | (virt & 0x1f_ffff), virt);
            assert_eq!(entry & (LARGE_PAGE | PRESENT_WRITABLE), LARGE_PAGE | PRESENT_WRITABLE);
        }
    }

    #[test]
    fn selectors_lie_inside_the_descriptor_table_and_code_is_64_bit() {
        let mut sregs = kvm_sregs::default();
        long_mode(&mut sregs);
        for segment in [sregs.cs, sregs.ds, sregs.ss, sregs.tr] {
            assert!(segment.selector + 7 <= sregs.gdt.limit);
        }
        assert_eq!((sregs.cs.l, sregs.cs.db), (1, 0));
        assert_ne!(DESCRIPTORS[2] >> 53 & 1, 0);
    }

    #[test]
    fn the_entry_point_gets_the_zero_page() {
        let regs = general(GuestAddress(0x100_0000));
        assert_eq!((regs.rip, regs.rsi, regs.rflags & (1 << 9)), (0x100_0000, ZERO_PAGE, 0));
    }
}
