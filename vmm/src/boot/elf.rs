//! Loads an ELF vmlinux: each PT_LOAD segment to its physical address.
//!
//! Segments are read, not mapped from the page cache. Mapping costs nothing at first, but then every page that the kernel
//! touches is a VM exit, and for those it writes a copy as well: of 11 MB, 2100 exits, where read() into huge pages leaves
//! 14. Measured in virtual time, from the spawn to the first line: 45.4 ms mapped, 40.9 ms read.

use std::{collections::BTreeMap, fs::File, ops::Range, os::unix::fs::FileExt};

use devices::virtio::Memory;
use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend};

use super::{KERNEL_MIN, KernelText, LoadedKernel};
use crate::memory::{self, HUGE_PAGE};

const MACHINE_X86_64: u16 = 62;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const PT_LOAD: u32 = 1;
const PF_X: u32 = 1;
const PF_W: u32 = 2;
/// From here on a huge page costs less than small ones for what is read into it.
const DENSE_BYTES: u64 = 512 << 10;
/// A vmlinux has about six.
const MAX_SEGMENTS: u16 = 64;

/// Loads the file into memory.
///
/// # Errors
/// Says what is wrong with the file.
pub fn load(memory: &Memory, file: &File) -> Result<LoadedKernel, String> {
    let file_length = file.metadata().map_err(|e| e.to_string())?.len();
    let mut header = Elf64_Ehdr::default();
    file.read_exact_at(header.as_mut_slice(), 0).map_err(|_| "the ELF header is cut short".to_owned())?;
    check(&header)?;
    let mut segments = segments(file, &header)?;
    segments.retain(|segment| segment.p_type == PT_LOAD && segment.p_memsz != 0);
    let mut ranges = Vec::with_capacity(segments.len());
    for segment in &segments {
        ranges.push(range(memory, segment, file_length)?);
    }
    let sparse = sparse_chunks(&segments);
    sparse.iter().for_each(|chunk| memory::allow_huge_pages(memory, *chunk, HUGE_PAGE, false));
    let mut end = 0;
    let mut entry_inside = false;
    for (segment, (first, behind)) in segments.iter().zip(ranges) {
        read(memory, file, segment.p_paddr, segment.p_offset, segment.p_filesz)?;
        end = end.max(behind);
        entry_inside |= (first..behind).contains(&header.e_entry);
    }
    sparse.iter().for_each(|chunk| memory::allow_huge_pages(memory, *chunk, HUGE_PAGE, true));
    if !entry_inside {
        return Err(format!("no loaded segment holds the entry point {:#x}", header.e_entry));
    }
    let text = text(&segments);
    Ok(LoadedKernel { entry: GuestAddress(header.e_entry), end, setup_header: None, text })
}

fn check(header: &Elf64_Ehdr) -> Result<(), String> {
    let [_, _, _, _, class, order, ..] = header.e_ident;
    if class != CLASS_64 || order != LITTLE_ENDIAN || header.e_machine != MACHINE_X86_64 {
        return Err(format!(
            "it is ELF class {class}, byte order {order}, machine {}, wanted are 2, 1 and 62",
            header.e_machine
        ));
    }
    if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() {
        return Err(format!("program headers of {} bytes, wanted are 56", header.e_phentsize));
    }
    if header.e_phnum > MAX_SEGMENTS {
        return Err(format!("{} program headers, at most {MAX_SEGMENTS} are accepted", header.e_phnum));
    }
    Ok(())
}

fn segments(file: &File, header: &Elf64_Ehdr) -> Result<Vec<Elf64_Phdr>, String> {
    let mut segments = vec![Elf64_Phdr::default(); usize::from(header.e_phnum)];
    for (index, segment) in (0u64..).zip(&mut segments) {
        index
            .checked_mul(size_of::<Elf64_Phdr>() as u64)
            .and_then(|offset| offset.checked_add(header.e_phoff))
            .and_then(|offset| file.read_exact_at(segment.as_mut_slice(), offset).ok())
            .ok_or_else(|| format!("program header {index} is not in the file"))?;
    }
    Ok(segments)
}

/// The guest addresses of the segment, as first and first behind, if file and memory hold all of it.
fn range(memory: &Memory, segment: &Elf64_Phdr, file_length: u64) -> Result<(u64, u64), String> {
    let (first, size) = (segment.p_paddr, segment.p_memsz);
    if segment.p_filesz > size {
        return Err(format!(
            "the segment at {first:#x} has {:#x} bytes in the file and {size:#x} in memory",
            segment.p_filesz
        ));
    }
    if segment.p_offset.checked_add(segment.p_filesz).is_none_or(|end| end > file_length) {
        return Err(format!("the segment at {first:#x} ends behind the file's end: the file is cut short"));
    }
    let fits = usize::try_from(size).is_ok_and(|size| memory.check_range(GuestAddress(first), size));
    if first < KERNEL_MIN || !fits {
        return Err(format!(
            "the segment of {size:#x} bytes at {first:#x} lies outside the machine's memory"
        ));
    }
    Ok((first, first + size))
}

/// The huge pages, by first address, of which the file fills so little that small pages cost less.
fn sparse_chunks(segments: &[Elf64_Phdr]) -> Vec<u64> {
    let mut filled: BTreeMap<u64, u64> = BTreeMap::new();
    for segment in segments {
        let (start, end) = (segment.p_paddr, segment.p_paddr.saturating_add(segment.p_filesz));
        let mut chunk = start - start % HUGE_PAGE;
        while chunk < end {
            let bytes = end.min(chunk.saturating_add(HUGE_PAGE)) - start.max(chunk);
            *filled.entry(chunk).or_default() += bytes;
            let Some(next) = chunk.checked_add(HUGE_PAGE) else { break };
            chunk = next;
        }
    }
    filled.into_iter().filter(|(_, bytes)| *bytes < DENSE_BYTES).map(|(chunk, _)| chunk).collect()
}

/// The longest run of huge pages with nothing but what is executed and not written to.
fn text(segments: &[Elf64_Phdr]) -> Option<KernelText> {
    let mut in_order: Vec<&Elf64_Phdr> = segments.iter().collect();
    in_order.sort_by_key(|segment| segment.p_paddr);
    let is_text = |segment: &Elf64_Phdr| segment.p_flags & PF_X != 0 && segment.p_flags & PF_W == 0;
    let mut runs: Vec<KernelText> = Vec::new();
    let mut run: Option<KernelText> = None;
    for segment in in_order {
        let (start, end) = (segment.p_paddr, segment.p_paddr.saturating_add(segment.p_filesz));
        match (&mut run, is_text(segment)) {
            // No whole huge page lies between the two.
            (Some(run), true) if start / HUGE_PAGE <= run.range.end.div_ceil(HUGE_PAGE) => {
                run.grow(start);
                run.range.end = run.range.end.max(end);
            }
            (_, true) => {
                runs.extend(run.replace(KernelText { range: start..end, padding: vec![] }));
            }
            (Some(last), false) => {
                if let Some(edge) =
                    last.range.end.checked_next_multiple_of(HUGE_PAGE).filter(|edge| *edge <= start)
                {
                    last.grow(edge);
                }
                runs.extend(run.take());
            }
            (None, false) => {}
        }
    }
    runs.extend(run);
    runs.into_iter().filter_map(KernelText::whole).max_by_key(|run| run.range.end - run.range.start)
}

impl KernelText {
    /// Takes what lies before this address for padding.
    fn grow(&mut self, end: u64) {
        if self.range.end < end {
            self.padding.push(self.range.end..end);
            self.range.end = end;
        }
    }

    /// The whole huge pages of it.
    fn whole(self) -> Option<Self> {
        let start = self.range.start.checked_next_multiple_of(HUGE_PAGE)?;
        let end = self.range.end - self.range.end % HUGE_PAGE;
        let clip = |piece: &Range<u64>| piece.start.max(start)..piece.end.min(end);
        let padding = self.padding.iter().map(clip).filter(|piece| piece.start < piece.end).collect();
        (start < end).then_some(Self { range: start..end, padding })
    }
}

fn read(memory: &Memory, file: &File, address: u64, offset: u64, length: u64) -> Result<(), String> {
    if length == 0 {
        return Ok(());
    }
    memory::load(memory, address, file, offset, length)
        .map_err(|e| format!("{length:#x} bytes at {offset:#x} of the file: {e}"))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;
    use crate::memory::reserve;

    #[test]
    fn text_is_whole_huge_pages_that_are_executed_and_not_written_to() {
        let segment = |first: u64, bytes: u64, p_flags: u32| Elf64_Phdr {
            p_paddr: first,
            p_filesz: bytes,
            p_flags,
            ..Default::default()
        };
        const READ_EXECUTE: u32 = 4 | PF_X;
        // As images/kernel builds it.
        let kernel = [
            segment(0x100_0000, 0x60_2000, READ_EXECUTE),
            segment(0x180_0000, 0x14_90b0, READ_EXECUTE),
            segment(0x1a0_0000, 0x40_0000, 4 | PF_W),
            segment(0x1e0_0000, 0x80_0000, READ_EXECUTE | PF_W),
        ];
        let padding = vec![0x160_2000..0x180_0000, 0x194_90b0..0x1a0_0000];
        assert_eq!(text(&kernel), Some(KernelText { range: 0x100_0000..0x1a0_0000, padding }));
        // What lies behind the last page that is full is data.
        let no_room = [segment(0x100_0000, 0x30_0000, READ_EXECUTE), segment(0x131_0000, 0x1000, 4 | PF_W)];
        assert_eq!(text(&no_room).unwrap().range, 0x100_0000..0x120_0000);
        let far =
            [segment(0x100_0000, 0x20_0000, READ_EXECUTE), segment(0x150_0000, 0x30_0000, READ_EXECUTE)];
        assert_eq!(text(&far).unwrap().range, 0x160_0000..0x180_0000);
        let in_two =
            [segment(0x10_0000, 0x20_0000, READ_EXECUTE), segment(0x30_0000, 0x20_0000, READ_EXECUTE)];
        assert_eq!(text(&in_two), Some(KernelText { range: 0x20_0000..0x40_0000, padding: vec![] }));
        assert_eq!(text(&[segment(0x10_0000, 0x20_0000, READ_EXECUTE)]), None);
        assert_eq!(text(&[segment(u64::MAX - 5, 100, READ_EXECUTE)]), None);
        assert_eq!(text(&[]), None);
    }

    const LOAD_AT: u64 = 0x20_0000;

    fn header(segments: u16) -> Elf64_Ehdr {
        let mut header = Elf64_Ehdr {
            e_machine: MACHINE_X86_64,
            e_phentsize: 56,
            e_phnum: segments,
            e_phoff: 64,
            e_entry: LOAD_AT,
            ..Default::default()
        };
        header.e_ident[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', CLASS_64, LITTLE_ENDIAN]);
        header
    }

    fn segment(offset: u64, filesz: u64, memsz: u64) -> Elf64_Phdr {
        Elf64_Phdr {
            p_type: PT_LOAD,
            p_offset: offset,
            p_paddr: LOAD_AT,
            p_filesz: filesz,
            p_memsz: memsz,
            ..Default::default()
        }
    }

    fn file(header: &Elf64_Ehdr, segments: &[Elf64_Phdr], length: usize) -> File {
        let mut bytes: Vec<u8> = (0..length).map(|i| (i % 251) as u8).collect();
        let mut at = 0;
        for part in std::iter::once(header.as_slice()).chain(segments.iter().map(|s| s.as_slice())) {
            bytes[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file
    }

    fn content(memory: &Memory, address: u64) -> u8 {
        memory.read_obj(GuestAddress(address)).unwrap()
    }

    #[test]
    fn an_aligned_segment_arrives_whole_with_zeros_behind_it() {
        let memory = reserve(4).unwrap();
        let file = file(&header(1), &[segment(4096, 5000, 9000)], 20000);
        let kernel = load(&memory, &file).unwrap();
        assert_eq!((kernel.entry.0, kernel.end), (LOAD_AT, LOAD_AT + 9000));
        for i in [0, 1, 4095, 4096, 4999] {
            assert_eq!(u64::from(content(&memory, LOAD_AT + i)), (4096 + i) % 251);
        }
        assert_eq!(content(&memory, LOAD_AT + 5000), 0);
        assert_eq!(content(&memory, LOAD_AT + 8191), 0);
    }

    #[test]
    fn a_segment_askew_in_the_file_arrives_whole() {
        let memory = reserve(4).unwrap();
        let file = file(&header(1), &[segment(4097, 9000, 9000)], 20000);
        load(&memory, &file).unwrap();
        for i in [0, 8999] {
            assert_eq!(u64::from(content(&memory, LOAD_AT + i)), (4097 + i) % 251);
        }
    }

    #[test]
    fn only_huge_pages_with_little_in_them_are_sparse() {
        let at = |p_paddr, p_filesz| Elf64_Phdr { p_paddr, p_filesz, ..segment(0, 0, 0) };
        let segments = [
            at(0x100_0000, 0x5f_0000),
            at(0x160_0000, 0x2000),
            at(0x180_0000, 0x4_0000),
            at(0x184_0000, 0x4_0000),
        ];
        assert_eq!(sparse_chunks(&segments), [0x160_0000]);
        assert_eq!(sparse_chunks(&[at(0x1ff_ffff, 2)]), [0x1e0_0000, 0x200_0000]);
        assert_eq!(sparse_chunks(&[]), [0u64; 0]);
    }

    #[test]
    fn broken_segments_are_refused_with_their_address() {
        let memory = reserve(4).unwrap();
        let mut low = segment(4096, 10, 10);
        low.p_paddr = 0x1000;
        let mut wrapping = segment(4096, 10, u64::MAX);
        wrapping.p_paddr = u64::MAX - 5;
        let bad = [
            segment(4096, 5000, 4999),
            segment(4096, 20000, 20000),
            segment(u64::MAX, 1, 1),
            segment(4096, 1, 8 << 20),
            low,
            wrapping,
        ];
        for segment in bad {
            let error = load(&memory, &file(&header(1), &[segment], 20000)).unwrap_err();
            assert!(error.contains("segment"), "{error}");
        }
    }

    #[test]
    fn an_entry_point_outside_all_segments_is_refused() {
        let memory = reserve(4).unwrap();
        let mut header = header(1);
        header.e_entry = 0x123;
        assert!(
            load(&memory, &file(&header, &[segment(4096, 10, 10)], 20000)).unwrap_err().contains("0x123")
        );
    }

    #[test]
    fn other_machines_are_named() {
        let memory = reserve(4).unwrap();
        let mut arm = header(0);
        arm.e_machine = 183;
        assert!(load(&memory, &file(&arm, &[], 100)).unwrap_err().contains("machine 183"));
    }

    proptest! {
        #[test]
        fn no_bytes_in_the_headers_panic(noise in proptest::collection::vec((0usize..176, any::<u8>()), 0..24)) {
            let memory = reserve(4).unwrap();
            let mut start = header(2).as_slice().to_vec();
            start.extend_from_slice(segment(4096, 5000, 9000).as_slice());
            start.extend_from_slice(segment(4099, 50, 50).as_slice());
            start.resize(20000, 1);
            for (at, byte) in noise {
                start[at] = byte;
            }
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&start).unwrap();
            if let Ok(kernel) = load(&memory, &file) {
                prop_assert!(kernel.end <= 4 << 20 && kernel.entry.0 < kernel.end);
            }
        }
    }
}
