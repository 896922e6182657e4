//! A kernel's file of any bytes: an ELF file or a bzImage that is loaded lies within memory, above the tables, with its initramfs.
#![no_main]
#![allow(clippy::expect_used, reason = "only fuzzers run this")]

use std::{fs::File, io::Write, os::unix::fs::FileExt, sync::LazyLock};

use devices::virtio::Memory;
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vmm::{
    boot::{KERNEL_MIN, Named, command_line, initrd, load_kernel, params},
    memory::reserve,
    snapshot::pages::discard,
};

const MIB: u32 = 4;
const END: u64 = (MIB as u64) << 20;
/// Once: guest memory lives as long as its process.
static MEMORY: LazyLock<Memory> = LazyLock::new(|| reserve(MIB).expect("there is memory"));
/// Where a vmlinux has its program headers, and a bzImage its setup header.
const HEAD: usize = 0x268;

fuzz_target!(|data: &[u8]| {
    let Some(([low, high], bytes)) = data.split_first_chunk::<2>() else { return };
    let Some(file) = file(bytes, u64::from(u16::from_le_bytes([*low, *high])) << 6) else { return };
    let memory = &*MEMORY;
    discard(memory, 0..END, false).expect("its pages can be given back");
    let Ok(kernel) = load_kernel(memory, named(file)) else { return };
    assert!((KERNEL_MIN..kernel.end).contains(&kernel.entry.0) && kernel.end <= END, "{kernel:?}");
    assert!(is_zero(memory, 0..KERNEL_MIN), "below a kernel's place");
    let files = file_of(&[7; 100]).into_iter().map(named).collect();
    let Ok(Some(initrd)) = initrd::load(memory, END, &kernel, files) else { return };
    assert!(initrd.address >= kernel.end && initrd.address + initrd.size <= END, "{initrd:?} {kernel:?}");
    let line = command_line::build(false, false, &[], "quiet");
    command_line::write(memory, &line).expect("it fits");
    params::write(memory, END, &kernel, line.len(), Some(initrd)).expect("it fits");
});

/// These bytes, and behind them a hole up to that length. A bzImage's signature is put where it belongs if the file says so.
fn file(bytes: &[u8], length: u64) -> Option<File> {
    let mut bytes = bytes.to_vec();
    if bytes.first() == Some(&b'H') && bytes.len() >= HEAD {
        bytes[0x202..0x206].copy_from_slice(b"HdrS");
    }
    let file = file_of(&bytes)?;
    file.set_len(length.max(bytes.len() as u64)).ok()?;
    // The last byte is no hole.
    file.write_at(&[9], length.max(1) - 1).ok()?;
    Some(file)
}

fn file_of(bytes: &[u8]) -> Option<File> {
    let mut file = tempfile::tempfile().ok()?;
    file.write_all(bytes).ok()?;
    Some(file)
}

fn named(file: File) -> Named {
    Named { path: "file".into(), file }
}

fn is_zero(memory: &Memory, range: std::ops::Range<u64>) -> bool {
    let mut page = [0; 4096];
    range.step_by(page.len()).all(|address| {
        memory.read_slice(&mut page, GuestAddress(address)).expect("there is memory");
        page.iter().all(|byte| *byte == 0)
    })
}
