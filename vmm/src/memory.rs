//! Guest memory: where it lies in the guest's physical address space, and the host memory behind it.
//!
//! ```text
//! 0                 RAM, up to LOW_END
//! 0xd000_0000       the gap: virtio-mmio windows, IOAPIC, local APIC, KVM's TSS
//! 0x1_0000_0000     the rest of RAM
//! ```
//!
//! Host memory is anonymous and private, unless another process serves a device: then it is a file in memory that both map.
//! It starts on a boundary of 2 MiB, so that the host's huge pages can back the guest's. Nothing is touched before it is
//! needed.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, RawFd},
};

use devices::virtio::Memory;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use thiserror::Error;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
    bitmap::AtomicBitmap, mmap::MmapRegionBuilder,
};

/// First address of the gap for devices below 4 GiB.
pub const LOW_END: u64 = 0xd000_0000;
/// First address of RAM above the gap.
pub const HIGH_START: u64 = 0x1_0000_0000;
/// Three pages that KVM wants on Intel hosts without unrestricted guests.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// Bytes in a page of the guest and of the host.
pub const PAGE: u64 = 4096;
/// Bytes in a huge page.
pub const HUGE_PAGE: u64 = 2 << 20;

/// Why guest memory could not be made.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The host has no room for it.
    #[error("cannot reserve {mib} MiB of guest memory: {source}; ask for less with --memory")]
    Reserve {
        /// Size asked for.
        mib: u64,
        /// What mmap said.
        source: io::Error,
    },
    /// The pieces do not make one address space.
    #[error("guest memory layout: {0}")]
    Layout(String),
    /// KVM does not take it.
    #[error("KVM refuses guest memory at {address:#x}: {source}")]
    Slot {
        /// First guest address of the region.
        address: u64,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
}

/// The regions of RAM for a machine with that many bytes, as (first address, length), lowest first.
pub fn layout(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(LOW_END);
    let mut regions = vec![(0, low)];
    if bytes > low {
        regions.push((HIGH_START, bytes - low));
    }
    regions
}

/// Reserves guest memory of that many MiB, for this process alone.
///
/// # Errors
/// The host refuses the reservation.
pub fn reserve(mib: u32) -> Result<Memory, MemoryError> {
    reserve_in(mib, None)
}

/// Reserves guest memory as a file that other processes can map too; the first touch of a page costs twice as much.
///
/// # Errors
/// The host refuses the file or the reservation.
pub fn reserve_shared(mib: u32) -> Result<Memory, MemoryError> {
    let file = memory_file(u64::from(mib) << 20);
    let file = file.map_err(|source| MemoryError::Reserve { mib: u64::from(mib), source })?;
    reserve_in(mib, Some(&file))
}

fn reserve_in(mib: u32, file: Option<&File>) -> Result<Memory, MemoryError> {
    let bytes = u64::from(mib) << 20;
    let refused = |source| MemoryError::Reserve { mib: u64::from(mib), source };
    let mut regions = Vec::with_capacity(2);
    let mut offset = 0;
    for (start, length) in layout(bytes) {
        let part = file.map(|file| Ok(FileOffset::new(file.try_clone()?, offset))).transpose();
        let region = part.and_then(|part| host_region(length, part)).map_err(refused)?;
        offset += length;
        let region = GuestRegionMmap::new(region, GuestAddress(start))
            .ok_or_else(|| MemoryError::Layout(format!("{length:#x} bytes at {start:#x} overflow")))?;
        regions.push(region);
    }
    Memory::from_regions(regions).map_err(|e| MemoryError::Layout(e.to_string()))
}

/// A file in memory that nobody can shrink: a page that is gone would kill this process.
fn memory_file(bytes: u64) -> io::Result<File> {
    let file = File::from(memfd_create("guest memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    file.set_len(bytes)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

/// A mapping that begins at a huge page, of this part of a file or of nothing.
fn host_region(length: u64, part: Option<FileOffset>) -> io::Result<MmapRegion<AtomicBitmap>> {
    let too_big = |_| io::Error::from_raw_os_error(libc::ENOMEM);
    let length = usize::try_from(length).map_err(too_big)?;
    let huge = HUGE_PAGE as usize;
    let span = length.checked_add(huge).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice aliases nothing.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), span, prot, flags, -1, 0) };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let skip = base.align_offset(huge);
    let start = base.cast::<u8>().wrapping_add(skip);
    let bitmap = AtomicBitmap::new(
        length,
        std::num::NonZeroUsize::new(PAGE as usize).unwrap_or(std::num::NonZeroUsize::MIN),
    );
    let mut builder = MmapRegionBuilder::new_with_bitmap(length, bitmap).with_mmap_prot(prot);
    if let Some(part) = part {
        map_over(start, length, part.file().as_raw_fd(), part.start())?;
        builder = builder.with_file_offset(part).with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE);
    } else {
        builder = builder.with_mmap_flags(flags);
    }
    // Advice: where the host knows no huge pages the guest is slower, not wrong.
    // SAFETY: the range lies inside the mapping made above, and the advice changes no content.
    unsafe { libc::madvise(start.cast(), length, libc::MADV_HUGEPAGE) };
    // SAFETY: `start..start + length` lies inside the mapping made above, which is never unmapped: guest memory lives
    // as long as the process (the region does not own a raw pointer). The slack on either side stays reserved and
    // untouched.
    let region = unsafe { builder.with_raw_mmap_pointer(start) }.build();
    region.map_err(|e| io::Error::other(e.to_string()))
}

/// Puts a file in the place of a reservation that [`host_region`] has just made and nobody knows yet.
fn map_over(start: *mut u8, length: usize, file: RawFd, offset: u64) -> io::Result<()> {
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    let (prot, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE);
    // SAFETY: the range is the caller's own anonymous mapping, to which no reference or pointer exists elsewhere.
    let mapped = unsafe { libc::mmap(start.cast(), length, prot, flags, file, offset) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Tells KVM about guest memory, one slot for each region.
///
/// # Errors
/// KVM refuses a slot.
pub fn register(vm: &VmFd, memory: &Memory) -> Result<(), MemoryError> {
    for (slot, region) in (0u32..).zip(memory.iter()) {
        let address = region.start_addr().0;
        let slot = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: address,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the region's mapping lives as long as the process, and its address and length are the mapping's.
        unsafe { vm.set_user_memory_region(slot) }.map_err(|source| MemoryError::Slot { address, source })?;
    }
    Ok(())
}

/// Whether the host may back the range with huge pages from now on: at the first touch, or later by gathering what is there.
/// Zeroing a huge page costs as much as some 100 small ones, so it does not pay where few bytes are written. A host without
/// huge pages does not change anything.
pub fn allow_huge_pages(memory: &Memory, address: u64, length: u64, allow: bool) {
    let Ok(size) = usize::try_from(length) else { return };
    if let Ok(slice) = memory.get_slice(GuestAddress(address), size) {
        let advice = if allow { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
        // SAFETY: the range is guest memory, and neither advice changes its content.
        unsafe { libc::madvise(slice.ptr_guard_mut().as_ptr().cast(), size, advice) };
    }
}

/// Fills guest memory from that part of the file, in as few system calls as the kernel allows.
///
/// Mapping the file and copying was slower: 8.6 ms against 7.4 for a kernel of 11 MB, in virtual time.
///
/// # Errors
/// The range is not guest memory, or the file ends too early or cannot be read.
pub fn load(memory: &Memory, address: u64, file: &File, offset: u64, length: u64) -> io::Result<()> {
    let size = usize::try_from(length).map_err(io::Error::other)?;
    let slice = memory.get_slice(GuestAddress(address), size).map_err(io::Error::other)?;
    read_at(&slice, file, offset)
}

fn read_at<B: vm_memory::bitmap::BitmapSlice>(
    slice: &vm_memory::VolatileSlice<'_, B>,
    file: &File,
    offset: u64,
) -> io::Result<()> {
    let mut done = 0;
    while done < slice.len() {
        let at = libc::off_t::try_from(offset.saturating_add(done as u64)).map_err(io::Error::other)?;
        let rest = slice.offset(done).map_err(io::Error::other)?;
        // SAFETY: `rest` is guest memory of exactly that length, and no Rust reference to it exists.
        let got =
            unsafe { libc::pread(file.as_raw_fd(), rest.ptr_guard_mut().as_ptr().cast(), rest.len(), at) };
        match usize::try_from(got) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(got) => done += got,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vm_memory::Bytes;

    #[test]
    fn memory_below_the_gap_is_one_region() {
        assert_eq!(layout(128 << 20), [(0, 128 << 20)]);
        assert_eq!(layout(LOW_END), [(0, LOW_END)]);
    }

    proptest! {
        #[test]
        fn regions_keep_their_sum_and_stay_out_of_the_gap(mib in 1u64..1 << 20) {
            let regions = layout(mib << 20);
            prop_assert_eq!(regions.iter().map(|r| r.1).sum::<u64>(), mib << 20);
            for (start, length) in regions {
                prop_assert!(start + length <= LOW_END || start >= HIGH_START);
                prop_assert!(length > 0);
            }
        }
    }

    #[test]
    fn reserved_memory_is_aligned_to_huge_pages_and_zero() {
        let memory = reserve(3).unwrap();
        let host = memory.get_host_address(GuestAddress(0)).unwrap();
        assert_eq!(host as u64 % HUGE_PAGE, 0);
        assert_eq!(memory.read_obj::<u64>(GuestAddress((3 << 20) - 8)).unwrap(), 0);
        assert!(memory.read_obj::<u64>(GuestAddress(3 << 20)).is_err());
    }

    #[test]
    fn shared_memory_is_one_file_that_cannot_shrink() {
        let memory = reserve_shared((LOW_END >> 20) as u32 + 4).unwrap();
        let (mut regions, mut expected) = (memory.iter(), [(0, 0), (HIGH_START, LOW_END)].into_iter());
        let file = regions.next().unwrap().file_offset().unwrap().file();
        assert_eq!(file.metadata().unwrap().len(), LOW_END + (4 << 20));
        assert!(file.set_len(0).is_err());
        for region in memory.iter() {
            assert_eq!(region.as_ptr() as u64 % HUGE_PAGE, 0);
            let at = (region.start_addr().0, region.file_offset().unwrap().start());
            assert_eq!(Some(at), expected.next());
        }
        memory.write_obj(7u64, GuestAddress(HIGH_START + 8)).unwrap();
        let mut got = [0; 8];
        std::os::unix::fs::FileExt::read_exact_at(file, &mut got, LOW_END + 8).unwrap();
        assert_eq!(u64::from_le_bytes(got), 7);
    }

    #[test]
    fn any_part_of_a_file_arrives_whole() {
        let memory = reserve(4).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        let bytes: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(file.path(), &bytes).unwrap();
        let opened = File::open(file.path()).unwrap();
        for (offset, length) in [(0usize, 300_000usize), (4097, 200_001), (5, 100), (299_999, 1)] {
            load(&memory, 0x10_0001, &opened, offset as u64, length as u64).unwrap();
            let mut got = vec![0; length];
            memory.read_slice(&mut got, GuestAddress(0x10_0001)).unwrap();
            assert_eq!(got, bytes[offset..offset + length]);
        }
    }

    #[test]
    fn a_file_that_ends_too_early_or_memory_that_does_is_an_error() {
        let memory = reserve(2).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(200_000).unwrap();
        for (address, offset, length) in [
            (0, 100_000, 100_001),
            (0, 199_999, 2),
            (0, u64::MAX, 100_000),
            ((2 << 20) - 10, 0, 11),
            (0, 0, u64::MAX),
        ] {
            assert!(load(&memory, address, &file, offset, length).is_err(), "{address:#x} {offset} {length}");
        }
    }
}
