//! Guest memory seen from the host: which pages there are, writing them to a file, mapping a file in their place.
//!
//! An *image* is guest memory without its gap: the regions one behind another. Offsets and ranges are the image's.
//!
//! Which pages a machine has written is read from the kernel's page tables, and costs it nothing while it runs. A page of
//! anonymous memory is there if it was ever touched. One of a private mapping of a file is anonymous if it was written,
//! by the guest, by the host's kernel for it, or by a device here: all write through these page tables.

use std::{
    fs::File,
    io,
    ops::Range,
    os::{
        fd::{AsRawFd, BorrowedFd},
        unix::fs::FileExt,
    },
    sync::OnceLock,
};

use devices::virtio::Memory;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::PAGE;

/// Guest memory of a machine that does not run: no vCPU, no vhost and no device of this process touches it.
#[derive(Clone, Copy, Debug)]
pub struct Still<'a>(&'a Memory);

/// Some of the image that lies in one piece in this process.
pub(super) struct Piece {
    pub(super) address: *mut u8,
    /// Where the guest has it.
    guest: u64,
    offset: u64,
    pub(super) bytes: u64,
}

/// The length of the image in bytes.
pub fn image_bytes(memory: &Memory) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

/// The parts of `range`, cut where a region ends.
pub(super) fn pieces(memory: &Memory, range: Range<u64>) -> impl Iterator<Item = Piece> {
    let mut start = 0;
    memory.iter().filter_map(move |region| {
        let (first, end) = (start, start + region.len());
        start = end;
        let (from, to) = (range.start.max(first), range.end.min(end));
        let skip = usize::try_from(from.checked_sub(first)?).ok()?;
        (from < to).then(|| Piece {
            address: region.as_ptr().wrapping_add(skip),
            guest: region.start_addr().0 + (from - first),
            offset: from,
            bytes: to - from,
        })
    })
}

/// Maps that part of the file, which has the image's offsets, in place of guest memory. Private: what is written to the
/// memory stays there. All in whole pages.
///
/// # Errors
/// The host's.
pub fn map(memory: &Memory, file: &File, range: Range<u64>) -> io::Result<()> {
    let start = range.start;
    map_from(memory, file, range, start)
}

/// The same of a file that has the part from this offset on.
///
/// # Errors
/// The host's.
pub fn map_from(memory: &Memory, file: &File, range: Range<u64>, from: u64) -> io::Result<()> {
    let start = range.start;
    for piece in pieces(memory, range) {
        let offset = (piece.offset - start).checked_add(from).map(libc::off_t::try_from);
        let offset = offset.and_then(Result::ok).ok_or(io::ErrorKind::InvalidInput)?;
        let length = usize::try_from(piece.bytes).map_err(io::Error::other)?;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: the range is guest memory, a mapping of this process that is never unmapped and that no Rust reference
        // points into; the new mapping has the same length and protection, and other content, as guest memory may.
        let mapped =
            unsafe { libc::mmap(piece.address.cast(), length, prot, flags, file.as_raw_fd(), offset) };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Puts anonymous memory that nobody has touched in place of guest memory. In whole pages.
///
/// # Errors
/// The host's.
pub fn map_nothing(memory: &Memory, range: Range<u64>) -> io::Result<()> {
    for piece in pieces(memory, range) {
        let length = usize::try_from(piece.bytes).map_err(io::Error::other)?;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: as in `map`.
        let mapped = unsafe { libc::mmap(piece.address.cast(), length, prot, flags, -1, 0) };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Gives the pages behind anonymous guest memory, or those of its file in memory, back to the host. In whole pages.
///
/// # Errors
/// The host's.
pub fn discard(memory: &Memory, range: Range<u64>, shared: bool) -> io::Result<()> {
    let advice = if shared { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
    for piece in pieces(memory, range) {
        let length = usize::try_from(piece.bytes).map_err(io::Error::other)?;
        // SAFETY: the range is guest memory, whose content may become another at any time, and no Rust reference points
        // into it.
        if unsafe { libc::madvise(piece.address.cast(), length, advice) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Fills that part of guest memory from the file, which has the image's offsets.
///
/// # Errors
/// The host's, or the file ends before.
pub fn read(memory: &Memory, file: &File, range: Range<u64>) -> io::Result<()> {
    for mut piece in pieces(memory, range) {
        while piece.bytes > 0 {
            let offset = libc::off_t::try_from(piece.offset).map_err(io::Error::other)?;
            let length = usize::try_from(piece.bytes).map_err(io::Error::other)?;
            // SAFETY: the range is guest memory of that length, and no Rust reference to it exists.
            let got = unsafe { libc::pread(file.as_raw_fd(), piece.address.cast(), length, offset) };
            match usize::try_from(got) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(got) => {
                    piece.address = piece.address.wrapping_add(got);
                    piece.offset += got as u64;
                    piece.bytes = piece.bytes.saturating_sub(got as u64);
                }
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }
    Ok(())
}

/// Has the host's kernel map that part of guest memory now: as it would for the first reading, or writing, of each page.
/// Advice: before Linux 5.14 nothing happens.
pub fn populate(memory: &Memory, range: Range<u64>, write: bool) {
    let advice = if write { libc::MADV_POPULATE_WRITE } else { libc::MADV_POPULATE_READ };
    for piece in pieces(memory, range) {
        // SAFETY: the range is guest memory, and neither advice changes its content.
        unsafe { libc::madvise(piece.address.cast(), piece.bytes as usize, advice) };
    }
}

/// `_IOWR(KVMIO, 0xd5, struct kvm_pre_fault_memory)`.
const KVM_PRE_FAULT_MEMORY: libc::c_ulong = 0xc040_aed5;
/// KVM does a part of it at a time; after so many calls it is left alone.
const MAX_CALLS: usize = 64;

/// Has KVM map that part of guest memory for the guest, which then takes no exit for it.
///
/// # Errors
/// KVM's: `ENOTTY` before Linux 6.11, `EOPNOTSUPP` without nested paging.
pub fn fault_in(memory: &Memory, range: Range<u64>, vcpu: BorrowedFd<'_>) -> io::Result<()> {
    for Piece { guest, bytes, .. } in pieces(memory, range) {
        let mut wanted = kvm_bindings::kvm_pre_fault_memory { gpa: guest, size: bytes, ..Default::default() };
        for _ in 0..MAX_CALLS {
            // SAFETY: KVM reads and writes one such structure.
            let done = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_PRE_FAULT_MEMORY as _, &raw mut wanted) };
            match io::Error::last_os_error() {
                _ if done == 0 && wanted.size == 0 => break,
                _ if done == 0 => {}
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            }
        }
    }
    Ok(())
}

static PAGEMAP: OnceLock<File> = OnceLock::new();

/// This process's page tables, open since somebody asked for them first: in a jail there is no /proc.
///
/// # Errors
/// The host does not let this process see them.
pub fn pagemap() -> io::Result<&'static File> {
    match PAGEMAP.get() {
        Some(open) => Ok(open),
        None => {
            let open = File::open("/proc/self/pagemap")?;
            Ok(PAGEMAP.get_or_init(|| open))
        }
    }
}

/// What of a file's mapping is there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// Pages that were written, and are no longer the file's.
    pub written: Vec<Range<u64>>,
    /// Pages of the file, which the kernel maps with some around them.
    pub read: Vec<Range<u64>>,
}

/// What is there of those parts of the image, which are mapped from files.
///
/// # Errors
/// The host does not let this process see its page tables.
pub fn touched(memory: &Memory, parts: &[Range<u64>]) -> io::Result<Touched> {
    let pagemap = pagemap()?;
    let mut touched = Touched::default();
    for piece in parts.iter().flat_map(|part| pieces(memory, part.clone())) {
        let first = piece.address as u64;
        words(pagemap, first..first + piece.bytes, &mut |address, word| {
            let page = address - first + piece.offset..address - first + piece.offset + PAGE;
            match (word & (PM_PRESENT | PM_SWAP) != 0, word & PM_FILE != 0) {
                (true, true) => push(&mut touched.read, page),
                (true, false) => push(&mut touched.written, page),
                (false, _) => {}
            }
        })?;
    }
    Ok(touched)
}

impl<'a> Still<'a> {
    /// Says that the memory does not change.
    ///
    /// # Safety
    /// As long as the value lives, no vCPU runs and no device, in this process or in the host's kernel, writes to it.
    pub unsafe fn new(memory: &'a Memory) -> Self {
        Self(memory)
    }

    /// The memory.
    pub fn memory(&self) -> &'a Memory {
        self.0
    }

    /// The bytes of that part of the image, piece by piece, with their offsets.
    pub fn bytes(&self, range: Range<u64>) -> impl Iterator<Item = (u64, &'a [u8])> {
        pieces(self.0, range).map(|piece| {
            // SAFETY: the piece is guest memory, mapped as long as the process lives, and nobody writes to it while
            // `self`, whose lifetime the slice has, says so.
            let bytes = unsafe { std::slice::from_raw_parts(piece.address, piece.bytes as usize) };
            (piece.offset, bytes)
        })
    }

    /// The ranges of pages that are anonymous: touched, where memory is not a file's; written, where it is. In order.
    ///
    /// # Errors
    /// The host does not let this process see its page tables.
    pub fn anonymous(&self) -> io::Result<Vec<Range<u64>>> {
        self.anonymous_within(0..image_bytes(self.0))
    }

    /// Those of them in that part of the image.
    ///
    /// # Errors
    /// As there.
    pub fn anonymous_within(&self, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let pagemap = pagemap()?;
        let mut ranges = Vec::new();
        for piece in pieces(self.0, range) {
            let first = piece.address as u64;
            let addresses = first..first + piece.bytes;
            let mut add = |found: Range<u64>| {
                push(&mut ranges, found.start - first + piece.offset..found.end - first + piece.offset);
            };
            if let Err(error) = scan(pagemap, addresses.clone(), &mut add) {
                match error.raw_os_error() {
                    // Before Linux 6.7 there is no such request.
                    Some(libc::ENOTTY | libc::EINVAL) => read_pagemap(pagemap, addresses, &mut add)?,
                    _ => return Err(error),
                }
            }
        }
        Ok(ranges)
    }
}

/// Adds a range behind the others, or to the last.
pub fn push(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
        _ => ranges.push(range),
    }
}

/// linux/fs.h: struct pm_scan_arg.
#[repr(C)]
#[derive(Debug, Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// struct page_region.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
const SCAN_REGIONS: usize = 1024;

/// Asks the kernel for the ranges of addresses that are present or swapped, not a file's, and not the zero page.
fn scan(pagemap: &File, addresses: Range<u64>, found: &mut dyn FnMut(Range<u64>)) -> io::Result<()> {
    let mut regions = vec![PageRegion::default(); SCAN_REGIONS];
    let mut start = addresses.start;
    while start < addresses.end {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            start,
            end: addresses.end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            category_inverted: PAGE_IS_FILE | PAGE_IS_PFNZERO,
            category_mask: PAGE_IS_FILE | PAGE_IS_PFNZERO,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            // None of the pages that match has it, so that neighbours are one region.
            return_mask: PAGE_IS_FILE,
            ..ScanArg::default()
        };
        // SAFETY: the kernel reads and writes one `ScanArg`, and writes at most `vec_len` regions to `regions`.
        let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN as _, &raw mut arg) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        for region in regions.iter().take(count) {
            found(region.start..region.end);
        }
        if arg.walk_end <= start {
            return Err(io::ErrorKind::InvalidData.into());
        }
        start = arg.walk_end;
    }
    Ok(())
}

/// Documentation/admin-guide/mm/pagemap.rst.
const PM_FILE: u64 = 1 << 61;
const PM_SWAP: u64 = 1 << 62;
const PM_PRESENT: u64 = 1 << 63;

/// The same by reading a word for each page; the zero page counts as one that is there.
fn read_pagemap(pagemap: &File, addresses: Range<u64>, found: &mut dyn FnMut(Range<u64>)) -> io::Result<()> {
    words(pagemap, addresses, &mut |at, word| {
        if word & (PM_PRESENT | PM_SWAP) != 0 && word & PM_FILE == 0 {
            found(at..at + PAGE);
        }
    })
}

/// The word that the kernel has for each page, with the page's address.
fn words(pagemap: &File, addresses: Range<u64>, found: &mut dyn FnMut(u64, u64)) -> io::Result<()> {
    let mut buffer = vec![0u8; 8 << 13];
    let mut at = addresses.start;
    while at < addresses.end {
        let pages = ((addresses.end - at).div_ceil(PAGE) as usize).min(buffer.len() / 8);
        let bytes = buffer.get_mut(..pages * 8).unwrap_or_default();
        pagemap.read_exact_at(bytes, at / PAGE * 8)?;
        for word in bytes.chunks_exact(8) {
            let word = word.first_chunk().copied().map_or(0, u64::from_le_bytes);
            found(at, word);
            at += PAGE;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::reserve;

    fn anonymous(memory: &Memory) -> Vec<Range<u64>> {
        // SAFETY: nobody else knows this memory.
        unsafe { Still::new(memory) }.anonymous().unwrap()
    }

    /// Four MiB without huge pages, so that a touch is a page.
    fn memory() -> Memory {
        let memory = reserve(4).unwrap();
        crate::memory::allow_huge_pages(&memory, 0, 4 << 20, false);
        memory
    }

    #[test]
    fn untouched_memory_is_not_there_and_touched_memory_is() {
        let memory = memory();
        assert_eq!(anonymous(&memory), []);
        for page in [3, 4, 9] {
            memory.write_obj(1u8, GuestAddress(page * PAGE + 5)).unwrap();
        }
        assert_eq!(anonymous(&memory), [3 * PAGE..5 * PAGE, 9 * PAGE..10 * PAGE]);
    }

    #[test]
    fn of_a_mapped_file_only_what_was_written_is_there_and_the_file_stays() {
        let memory = memory();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 64 * PAGE as usize]).unwrap();
        map(&memory, &file, 0..64 * PAGE).unwrap();
        assert_eq!(memory.read_obj::<u8>(GuestAddress(5 * PAGE)).unwrap(), 7);
        assert_eq!(anonymous(&memory), []);
        memory.write_obj(1u8, GuestAddress(6 * PAGE)).unwrap();
        memory.write_obj(1u8, GuestAddress(100 * PAGE)).unwrap();
        assert_eq!(anonymous(&memory), [6 * PAGE..7 * PAGE, 100 * PAGE..101 * PAGE]);
        let mut byte = [0];
        file.read_exact_at(&mut byte, 6 * PAGE).unwrap();
        assert_eq!(byte, [7]);
    }

    #[test]
    fn both_ways_of_asking_agree() {
        let memory = memory();
        for page in [0, 1, 17, 1000, 1023] {
            memory.write_obj(1u8, GuestAddress(page * PAGE)).unwrap();
        }
        let piece = pieces(&memory, 0..4 << 20).next().unwrap();
        let addresses = piece.address as u64..piece.address as u64 + piece.bytes;
        let (mut scanned, mut read) = (Vec::new(), Vec::new());
        let pagemap = pagemap().unwrap();
        read_pagemap(pagemap, addresses.clone(), &mut |range| push(&mut read, range)).unwrap();
        assert_eq!(read.len(), 4);
        match scan(pagemap, addresses, &mut |range| push(&mut scanned, range)) {
            Ok(()) => assert_eq!(scanned, read),
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENOTTY)),
        }
    }

    #[test]
    fn more_ranges_than_the_kernel_tells_at_once_are_all_found() {
        let memory = reserve(64).unwrap();
        crate::memory::allow_huge_pages(&memory, 0, 64 << 20, false);
        let pages = 3 * SCAN_REGIONS as u64;
        for page in 0..pages {
            memory.write_obj(1u8, GuestAddress(2 * page * PAGE)).unwrap();
        }
        let found = anonymous(&memory);
        assert_eq!(found.len() as u64, pages);
        let last = 2 * (pages - 1) * PAGE;
        assert_eq!(found.last(), Some(&(last..last + PAGE)));
    }

    #[test]
    fn a_range_over_the_gap_is_two_pieces() {
        let halves = [(GuestAddress(0), 1 << 20), (GuestAddress(1 << 32), 1 << 20)];
        let memory = Memory::from_ranges(&halves).unwrap();
        assert_eq!(image_bytes(&memory), 2 << 20);
        let parts: Vec<_> =
            pieces(&memory, (1 << 20) - PAGE..(1 << 20) + PAGE).map(|p| (p.offset, p.bytes)).collect();
        assert_eq!(parts, [((1 << 20) - PAGE, PAGE), (1 << 20, PAGE)]);
        assert_eq!(pieces(&memory, 5 << 20..6 << 20).count(), 0);
    }
}
