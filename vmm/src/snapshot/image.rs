//! Guest memory in files: what a snapshot has to write, and to which.
//!
//! | the machine's memory is | and the directory's | so the snapshot writes |
//! |---|---|---|
//! | its own, never a file's | anything | all that is not zero, to a new `memory` |
//! | mapped from a file | `memory` is that file, and nobody else's | what was written since, into it |
//! | mapped from a file | `memory` is that file and has other links | what was written since, to a new `memory`; the file becomes `base` |
//! | mapped from a base | `base` is that file | what differs from the base, to `memory`, new unless it is its own |
//! | mapped from a file | anything else | all that is not zero, to a new `memory` |
//!
//! What the guest has given back since it was resumed ([`crate::reclaim`]) is zero, and a hole.

use std::{
    fs::File,
    io,
    ops::Range,
    os::unix::fs::{FileExt, MetadataExt},
    sync::Arc,
};

use devices::virtio::Memory;
use rustix::{
    fs::{FallocateFlags, SeekFrom, fallocate},
    io::Errno,
};
use serde::{Deserialize, Serialize};

use super::{
    BASE, MEMORY,
    dir::Dir,
    files::MemoryFiles,
    pages::{self, Still, push},
    refusal::Refusal,
    sections::MemoryState,
    text::SharedText,
};
use crate::{
    memory::{HUGE_PAGE, PAGE},
    reclaim::GivenBack,
};

/// Pages of a clone's own memory: the first one's number, and how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent(pub u64, pub u64);

/// Shorter runs of a clone's own pages are read, not mapped: a mapping takes the kernel 9 µs, and a copy of a page 5, in
/// virtual time.
const MAPPED_BYTES: u64 = 2 * PAGE;
/// What lies nearer than this to a page that differs from the base is written with it: fewer runs, which are mapped at once,
/// for some more pages in the file.
const NEAR_BYTES: u64 = 128 << 10;
/// The most runs that are mapped, far below the kernel's limit for a process.
const MAX_MAPPINGS: usize = 8192;
/// The most that is written at once. Linux looks at the whole rest of a write before it takes the next page of it (tmpfs, 6.12):
/// 32 MiB take 53.1 ms in one call, 44.7 in calls of 1 MiB, 37.8 in calls of 64 KiB and 54.6 page by page, in virtual time.
const WRITE_BYTES: usize = 64 << 10;
/// How much is written between two looks at whether the snapshot is still wanted.
const CHUNK_BYTES: u64 = 4 << 20;

/// The files that a machine's memory is mapped from.
#[derive(Debug, Default)]
pub struct Backing {
    /// `memory`, when the machine was resumed.
    own: Option<File>,
    /// `base`, then, and the parts that `own` holds.
    base: Option<(File, Vec<Range<u64>>)>,
    /// The parts of `base`, or of `own` if there is none, that are mapped; all else in there is zeros.
    data: Vec<Range<u64>>,
    /// The parts of memory that are mapped from files, in order.
    mapped: Vec<Range<u64>>,
    /// That of them which is mapped from another file with the same content.
    text: Option<Range<u64>>,
    /// What of them the guest has given back.
    given_back: Arc<GivenBack>,
}

/// What a snapshot has written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Written {
    /// Bytes of pages that were looked at.
    pub seen_bytes: u64,
    /// Bytes of pages that were not zero, and so written.
    pub written_bytes: u64,
    /// Where they are.
    #[serde(skip)]
    data: Vec<Range<u64>>,
}

/// What is to be done about a directory's files.
#[derive(Debug)]
pub struct Plan {
    /// Write into the machine's `memory`, which a new `state` goes with only when all is there.
    pub in_place: bool,
    /// `memory` as it is becomes `base` first.
    pub promote: bool,
    since_resume: bool,
    ranges: Vec<Range<u64>>,
    /// Zeros that nobody needs to look at.
    zeros: Vec<Range<u64>>,
    /// What `memory` holds then, if there is a base.
    extents: Option<Vec<Range<u64>>>,
    /// What the file that is not zeros elsewhere has, but for what is written now.
    data: Vec<Range<u64>>,
}

impl Backing {
    /// Maps a snapshot's memory.
    ///
    /// # Errors
    /// A file is missing or has another length, or the list of a clone's pages is none.
    pub fn restore(files: &MemoryFiles, memory: &Memory, state: &MemoryState) -> Result<Self, Refusal> {
        let bytes = pages::image_bytes(memory);
        let own = files.own(bytes)?;
        let failed = |error: io::Error| Refusal::Host(format!("cannot map the snapshot's memory: {error}"));
        let Some(extents) = &state.extents else {
            let data = map_data(memory, &own, bytes, state)?;
            let (given_back, mapped) = (Arc::new(GivenBack::new(bytes, &data)), data.clone());
            return Ok(Self { own: Some(own), base: None, data, mapped, text: None, given_back });
        };
        let extents = ranges(extents, bytes)?;
        let base = files.base(bytes)?;
        let data = map_data(memory, &base, bytes, state)?;
        let mut mapped = data.clone();
        let mut mappings = 0;
        for range in &extents {
            if range.end - range.start >= MAPPED_BYTES && mappings < MAX_MAPPINGS {
                mappings += 1;
                pages::map(memory, &own, range.clone()).map_err(failed)?;
                mapped.push(range.clone());
            } else {
                pages::read(memory, &own, range.clone()).map_err(failed)?;
            }
        }
        let mapped = union(mapped, Vec::new());
        let given_back = Arc::new(GivenBack::new(bytes, &union(mapped.clone(), extents.clone())));
        Ok(Self { own: Some(own), base: Some((base, extents)), data, mapped, text: None, given_back })
    }

    /// Maps the kernel's text from a file that other machines have too, in the place of the same in the snapshot's.
    ///
    /// # Errors
    /// The host's.
    pub fn share(&mut self, text: &SharedText, memory: &Memory) -> io::Result<()> {
        // What is written of it must be told from what is not, as of all that is mapped.
        if without(vec![text.range().clone()], &self.mapped).is_empty() {
            text.map(memory)?;
            self.text = Some(text.range().clone());
        }
        Ok(())
    }

    /// The parts of memory that are mapped from the snapshot's files, in order and apart.
    pub fn mapped(&self) -> Vec<Range<u64>> {
        without(self.mapped.clone(), self.text.as_slice())
    }

    /// The part that is mapped from a file of text.
    pub fn text(&self) -> Option<&Range<u64>> {
        self.text.as_ref()
    }

    /// What the guest gives back is to be told to this.
    pub fn given_back(&self) -> &Arc<GivenBack> {
        &self.given_back
    }

    /// What a snapshot in this directory has to write.
    ///
    /// # Errors
    /// The host's.
    pub fn plan(&self, dir: &Dir, memory: &Still<'_>) -> io::Result<Plan> {
        let changed = memory.anonymous()?;
        let zeros = without(self.given_back.ranges(), &changed);
        let is = |file: &File, name| dir.holds(file, name);
        let Some(own) = &self.own else { return Ok(Plan::full(changed)) };
        let alone = own.metadata()?.nlink() == 1;
        let plan = match &self.base {
            None if is(own, MEMORY) && alone => {
                let (ranges, extents, data) = (changed, None, self.data.clone());
                Plan { in_place: true, promote: false, since_resume: true, ranges, zeros, extents, data }
            }
            None if is(own, MEMORY) || is(own, BASE) => {
                Plan::differing(changed, zeros, self.data.clone(), is(own, MEMORY))
            }
            None => Plan::full(self.everything(memory)?),
            Some((base, extents)) if is(base, BASE) => {
                let all = union(changed.clone(), extents.clone());
                if is(own, MEMORY) && alone {
                    let then = coarse(union(all, zeros.clone()), NEAR_BYTES);
                    let new = without(then.clone(), &union(extents.clone(), zeros.clone()));
                    let (ranges, extents, data) = (union(changed, new), Some(then), self.data.clone());
                    Plan { in_place: true, promote: false, since_resume: true, ranges, zeros, extents, data }
                } else {
                    Plan::differing(without(all, &zeros), zeros, self.data.clone(), false)
                }
            }
            Some(_) => Plan::full(self.everything(memory)?),
        };
        Ok(plan)
    }

    /// All parts of memory that may not be zero.
    fn everything(&self, memory: &Still<'_>) -> io::Result<Vec<Range<u64>>> {
        let bytes = pages::image_bytes(memory.memory());
        let there = memory.anonymous()?;
        let in_files = match (&self.base, &self.own) {
            (Some((base, extents)), _) => union(extents.clone(), data(base, bytes)?),
            (None, Some(own)) => data(own, bytes)?,
            (None, None) => return Ok(there),
        };
        Ok(union(there, without(in_files, &self.given_back.ranges())))
    }
}

/// CRC-32 of the image's pages that are not zero, each behind its number as eight bytes. `None` when `given_up` says so.
///
/// # Errors
/// The host's.
pub fn checksum(
    backing: &Backing,
    memory: &Still<'_>,
    given_up: &mut dyn FnMut() -> bool,
) -> io::Result<Option<u32>> {
    let mut hash = crc32fast::Hasher::new();
    for range in backing.everything(memory)? {
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min(at + CHUNK_BYTES);
            for (offset, bytes) in memory.bytes(at..end) {
                for (page, number) in bytes.chunks(PAGE as usize).zip(offset / PAGE..) {
                    if !is_zero(page) {
                        hash.update(&number.to_le_bytes());
                        hash.update(page);
                    }
                }
            }
            if given_up() {
                return Ok(None);
            }
            at = end;
        }
    }
    Ok(Some(hash.finalize()))
}

impl Plan {
    fn full(ranges: Vec<Range<u64>>) -> Self {
        Self {
            in_place: false,
            promote: false,
            since_resume: false,
            ranges,
            zeros: Vec::new(),
            extents: None,
            data: Vec::new(),
        }
    }

    fn differing(
        ranges: Vec<Range<u64>>,
        zeros: Vec<Range<u64>>,
        data: Vec<Range<u64>>,
        promote: bool,
    ) -> Self {
        let extents = coarse(union(ranges, zeros.clone()), NEAR_BYTES);
        let ranges = without(extents.clone(), &zeros);
        Self { in_place: false, promote, since_resume: true, extents: Some(extents), ranges, zeros, data }
    }

    /// Whether only what was written since the machine was resumed is looked at.
    pub fn since_resume(&self) -> bool {
        self.since_resume
    }

    /// Whether there is a base then.
    pub fn has_base(&self) -> bool {
        self.extents.is_some()
    }

    /// What `state` says of the files then.
    pub fn state(&self, written: &Written) -> MemoryState {
        let extent = |range: &Range<u64>| Extent(range.start / PAGE, (range.end - range.start) / PAGE);
        let list = |ranges: &[Range<u64>]| ranges.iter().map(extent).collect();
        let data = match &self.extents {
            Some(_) => self.data.clone(),
            None => coarse(union(self.data.clone(), written.data.clone()), HUGE_PAGE),
        };
        MemoryState { extents: self.extents.as_deref().map(list), data: Some(list(&data)) }
    }

    /// Writes the pages to the file, with holes for those that are zero. `None` when `given_up` says so: then the file is
    /// good for nothing but being written again.
    ///
    /// # Errors
    /// The host's.
    pub fn write(
        &self,
        memory: &Still<'_>,
        file: &File,
        given_up: &mut dyn FnMut() -> bool,
    ) -> io::Result<Option<Written>> {
        file.set_len(pages::image_bytes(memory.memory()))?;
        let (mut written, mut since) = (Written::default(), 0);
        // A new file has nothing there.
        for range in self.zeros.iter().filter(|_| self.in_place) {
            punch(file, range.start, range.end - range.start)?;
        }
        for range in &self.ranges {
            let mut at = range.start;
            while at < range.end {
                let end = range.end.min(at + CHUNK_BYTES);
                for (offset, bytes) in memory.bytes(at..end) {
                    self.write_piece(file, offset, bytes, &mut written)?;
                }
                since += end - at;
                if since >= CHUNK_BYTES {
                    since = 0;
                    if given_up() {
                        return Ok(None);
                    }
                }
                at = end;
            }
        }
        Ok(Some(written))
    }

    fn write_piece(&self, file: &File, offset: u64, bytes: &[u8], written: &mut Written) -> io::Result<()> {
        written.seen_bytes += bytes.len() as u64;
        let mut at = 0;
        for run in runs(bytes) {
            let place = offset + at;
            let length = run.bytes.len() as u64;
            if !run.zero {
                for (bytes, place) in run.bytes.chunks(WRITE_BYTES).zip((place..).step_by(WRITE_BYTES)) {
                    file.write_all_at(bytes, place)?;
                }
                written.written_bytes += length;
                push(&mut written.data, place..place + length);
            } else if self.in_place {
                punch(file, place, length)?;
            }
            at += length;
        }
        Ok(())
    }
}

/// Pages one behind another that are all zero, or none of them.
struct Run<'a> {
    zero: bool,
    bytes: &'a [u8],
}

fn runs(bytes: &[u8]) -> impl Iterator<Item = Run<'_>> {
    let page = PAGE as usize;
    let mut rest = bytes;
    // Of the first page of the rest, so that no page is looked at twice.
    let mut first_is_zero = rest.chunks(page).next().map(is_zero);
    std::iter::from_fn(move || {
        let zero = first_is_zero.take()?;
        let mut length = 0;
        for page in rest.chunks(page) {
            let same = length == 0 || is_zero(page) == zero;
            if !same {
                first_is_zero = Some(!zero);
                break;
            }
            length += page.len();
        }
        let (bytes, behind) = rest.split_at_checked(length)?;
        rest = behind;
        Some(Run { zero, bytes })
    })
}

fn is_zero(page: &[u8]) -> bool {
    let (blocks, rest) = page.as_chunks::<512>();
    blocks.iter().all(block_is_zero) && rest.iter().all(|byte| *byte == 0)
}

/// Without a branch for each word: the compiler makes vector instructions of it.
fn block_is_zero(bytes: &[u8; 512]) -> bool {
    bytes.as_chunks::<8>().0.iter().fold(0, |bits, word| bits | u64::from_ne_bytes(*word)) == 0
}

fn punch(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match fallocate(file, flags, offset, length) {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => file.write_all_at(&vec![0; length as usize], offset),
        Err(error) => Err(error.into()),
    }
}

/// Maps the file but for what has no data for long, which stays anonymous: memory there is new, and not a copy of a page of
/// zeros. Returns what is mapped.
fn map_data(
    memory: &Memory,
    file: &File,
    bytes: u64,
    state: &MemoryState,
) -> Result<Vec<Range<u64>>, Refusal> {
    let failed = |error: io::Error| Refusal::Host(format!("cannot map the snapshot's memory: {error}"));
    let parts = match &state.data {
        Some(extents) => ranges(extents, bytes)?,
        None => coarse(data(file, bytes).map_err(failed)?, HUGE_PAGE),
    };
    parts.iter().try_for_each(|range| pages::map(memory, file, range.clone())).map_err(failed)?;
    Ok(parts)
}

/// The ranges, in order, with gaps closed that are shorter than this.
fn coarse(ranges: Vec<Range<u64>>, gap: u64) -> Vec<Range<u64>> {
    let mut parts: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match parts.last_mut() {
            Some(last) if range.start - last.end < gap => last.end = range.end,
            _ => parts.push(range),
        }
    }
    parts
}

/// The parts of a file that are no holes, in whole pages.
fn data(file: &File, bytes: u64) -> io::Result<Vec<Range<u64>>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < bytes {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // Only a hole is left.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
        if end <= start || start < at {
            return Err(io::ErrorKind::InvalidData.into());
        }
        push(&mut found, start / PAGE * PAGE..end.next_multiple_of(PAGE).min(bytes));
        at = end;
    }
    Ok(found)
}

/// Both lists as one, in order.
fn union(one: Vec<Range<u64>>, other: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let mut all = [one, other].concat();
    all.sort_unstable_by_key(|range| range.start);
    let mut merged = Vec::with_capacity(all.len());
    all.into_iter().for_each(|range| push(&mut merged, range));
    merged
}

/// The first list without what is in the second. Both are in order.
pub(super) fn without(list: Vec<Range<u64>>, other: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut left = Vec::with_capacity(list.len());
    let mut rest = other;
    for range in list {
        let mut at = range.start;
        while let Some((first, behind)) = rest.split_first() {
            if first.start >= range.end {
                break;
            }
            if at < first.start {
                left.push(at..first.start);
            }
            at = at.max(first.end);
            if first.end > range.end {
                // The next range may lie in it too.
                break;
            }
            rest = behind;
        }
        if at < range.end {
            left.push(at..range.end);
        }
    }
    left
}

/// A list of pages as ranges of the image.
fn ranges(extents: &[Extent], bytes: u64) -> Result<Vec<Range<u64>>, Refusal> {
    let mut ranges: Vec<Range<u64>> = Vec::with_capacity(extents.len());
    for Extent(first, count) in extents {
        let start = first.checked_mul(PAGE);
        let end = first.checked_add(*count).and_then(|end| end.checked_mul(PAGE)).filter(|end| *end <= bytes);
        let (Some(start), Some(end)) = (start, end) else {
            return Err(Refusal::Corrupted(format!(
                "{count} pages from {first} on are not in the machine's memory"
            )));
        };
        if *count == 0 || ranges.last().is_some_and(|last| last.end > start) {
            return Err(Refusal::Corrupted("a list of pages is not in order".into()));
        }
        ranges.push(start..end);
    }
    Ok(ranges)
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "lists of ranges are compared")]
mod tests;
