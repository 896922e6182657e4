//! Memory that the guest has freed goes back to the host, and stays out of the next snapshot.
//!
//! | the memory is | what is done |
//! |---|---|
//! | anonymous | MADV_DONTNEED |
//! | a file in memory, for another process | MADV_REMOVE |
//! | mapped from a snapshot | new anonymous memory takes its place, in whole blocks: MADV_DONTNEED would bring the file's content back |
//!
//! Blocks of the last kind are remembered: what is not there of them is no longer what the snapshot has, but zero
//! ([`GivenBack::ranges`]).

use std::{
    io,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use devices::virtio::{Memory, balloon::Reclaim};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::{
    boot::command_line::REPORTING_ORDER,
    memory::PAGE,
    snapshot::pages::{self, push},
};

/// The least that Linux reports, as it is told on its command line ([`crate::boot::command_line`]). A snapshot's memory is
/// replaced in whole blocks, so that the mappings stay few.
const BLOCK: u64 = PAGE << REPORTING_ORDER;
/// The most pieces that a snapshot's mapping is cut into: each may be two more mappings, and the kernel's limit for a
/// process is 65530.
const MAX_PIECES: usize = 8192;

/// Blocks of a machine's memory, as they were when it began and as they are. Offsets are the image's.
#[derive(Debug, Default)]
pub struct GivenBack(Mutex<Blocks>);

#[derive(Debug, Default)]
struct Blocks {
    /// Those beyond the end are anonymous.
    blocks: Vec<Block>,
    bytes: u64,
    pieces: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Block {
    /// None of it is a snapshot's.
    Anonymous,
    /// Some of it is a snapshot's.
    Snapshot,
    /// It was a snapshot's, and is anonymous.
    Replaced,
}

/// What is to be done with a part of the image.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Discard(Range<u64>),
    Replace(Range<u64>),
}

impl GivenBack {
    /// Of a machine whose image has so many bytes, with these parts from a snapshot's files.
    pub fn new(bytes: u64, from_snapshot: &[Range<u64>]) -> Self {
        let count = usize::try_from(bytes.div_ceil(BLOCK)).unwrap_or(0);
        let mut blocks = vec![Block::Anonymous; count];
        for range in from_snapshot {
            for block in touched(range).filter_map(|index| usize::try_from(index).ok()) {
                if let Some(block) = blocks.get_mut(block) {
                    *block = Block::Snapshot;
                }
            }
        }
        Self(Mutex::new(Blocks { blocks, bytes, pieces: 0 }))
    }

    /// What was a snapshot's and was given back, in order. Some of it may have been used again.
    pub fn ranges(&self) -> Vec<Range<u64>> {
        let blocks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ranges = Vec::new();
        for (index, _) in (0..).zip(&blocks.blocks).filter(|(_, block)| **block == Block::Replaced) {
            push(&mut ranges, blocks.range(index));
        }
        ranges
    }
}

/// The blocks that some of the range lies in.
fn touched(range: &Range<u64>) -> Range<u64> {
    range.start / BLOCK..range.end.div_ceil(BLOCK)
}

impl Blocks {
    fn range(&self, index: u64) -> Range<u64> {
        index * BLOCK..((index + 1) * BLOCK).min(self.bytes)
    }

    fn get(&self, index: u64) -> Block {
        let found = usize::try_from(index).ok().and_then(|index| self.blocks.get(index));
        found.copied().unwrap_or(Block::Anonymous)
    }

    /// How to give whole pages back. A part of a block that is a snapshot's stays as it is.
    fn steps(&self, range: &Range<u64>) -> Vec<Step> {
        let mut steps: Vec<Step> = Vec::new();
        for index in touched(range).take_while(|_| !range.is_empty()) {
            let block = self.range(index);
            let part = range.start.max(block.start)..range.end.min(block.end);
            match (self.get(index), steps.last_mut()) {
                // Without a snapshot there is no length either.
                _ if self.blocks.is_empty() => return vec![Step::Discard(range.clone())],
                (Block::Snapshot, _) if part != block => {}
                (Block::Snapshot, Some(Step::Replace(last))) if last.end == part.start => last.end = part.end,
                (Block::Snapshot, _) => steps.push(Step::Replace(part)),
                (_, Some(Step::Discard(last))) if last.end == part.start => last.end = part.end,
                _ => steps.push(Step::Discard(part)),
            }
        }
        steps
    }

    /// Whether this part, of whole blocks, may be replaced too.
    fn has_room(&self, part: &Range<u64>) -> bool {
        self.pieces < MAX_PIECES || self.neighbours(part) > 0
    }

    fn replaced(&mut self, part: &Range<u64>) {
        // One between two pieces joins them.
        self.pieces = (self.pieces + 1).saturating_sub(self.neighbours(part));
        for index in touched(part).filter_map(|index| usize::try_from(index).ok()) {
            if let Some(block) = self.blocks.get_mut(index) {
                *block = Block::Replaced;
            }
        }
    }

    /// How many of the blocks before and behind it were replaced.
    fn neighbours(&self, part: &Range<u64>) -> usize {
        let blocks = touched(part);
        let is = |index: u64| self.get(index) == Block::Replaced;
        usize::from(blocks.start.checked_sub(1).is_some_and(is)) + usize::from(is(blocks.end))
    }
}

/// Gives back what the balloon is told. On the thread of the event loop.
#[derive(Debug)]
pub struct Reclaimer {
    memory: Memory,
    given_back: Arc<GivenBack>,
}

impl Reclaimer {
    /// Of this memory, which began as `given_back` says.
    pub fn new(memory: Memory, given_back: Arc<GivenBack>) -> Self {
        Self { memory, given_back }
    }

    /// Whole pages of one region, by the image's offsets.
    fn give_back(&self, range: &Range<u64>, shared: bool) -> io::Result<()> {
        let mut blocks = self.given_back.0.lock().unwrap_or_else(PoisonError::into_inner);
        for step in blocks.steps(range) {
            match step {
                Step::Discard(part) => pages::discard(&self.memory, part, shared)?,
                Step::Replace(part) => {
                    if blocks.has_room(&part) {
                        pages::map_nothing(&self.memory, part.clone())?;
                        blocks.replaced(&part);
                    }
                }
            }
        }
        Ok(())
    }
}

impl Reclaim for Reclaimer {
    fn reclaim(&mut self, address: GuestAddress, length: u32) -> io::Result<()> {
        let start = address.0.next_multiple_of(PAGE);
        let end = address.0.saturating_add(length.into()) / PAGE * PAGE;
        let mut offset = 0;
        for region in self.memory.iter() {
            let (first, behind) = (region.start_addr().0, region.start_addr().0.saturating_add(region.len()));
            let (from, to) = (start.max(first), end.min(behind));
            if from < to {
                let range = offset + (from - first)..offset + (to - first);
                self.give_back(&range, region.file_offset().is_some())?;
            }
            offset += region.len();
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "lists of ranges are compared")]
mod tests {
    use std::{fs::File, io::Write};

    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;
    use crate::{
        memory::{allow_huge_pages, reserve, reserve_shared},
        snapshot::pages::Still,
    };

    const MIB: u64 = 1 << 20;

    fn reclaimer(memory: &Memory, given_back: GivenBack) -> (Reclaimer, Arc<GivenBack>) {
        let given_back = Arc::new(given_back);
        (Reclaimer::new(memory.clone(), Arc::clone(&given_back)), given_back)
    }

    fn anonymous(memory: &Memory) -> Vec<Range<u64>> {
        // SAFETY: nobody else knows this memory.
        unsafe { Still::new(memory) }.anonymous().unwrap()
    }

    fn byte(memory: &Memory, at: u64) -> u8 {
        memory.read_obj(GuestAddress(at)).unwrap()
    }

    /// Eight MiB with a byte in each page.
    fn full(memory: &Memory) {
        allow_huge_pages(memory, 0, 8 * MIB, false);
        memory.write_slice(&vec![7; 8 * MIB as usize], GuestAddress(0)).unwrap();
    }

    #[test]
    fn anonymous_memory_is_given_back_by_whole_pages_and_is_zero() {
        let memory = reserve(8).unwrap();
        full(&memory);
        let (mut reclaimer, given_back) = reclaimer(&memory, GivenBack::default());
        reclaimer.reclaim(GuestAddress(MIB + 1), 4 * PAGE as u32).unwrap();
        assert_eq!(anonymous(&memory), [0..MIB + PAGE, MIB + 4 * PAGE..8 * MIB]);
        assert_eq!([MIB, MIB + PAGE, MIB + 4 * PAGE].map(|at| byte(&memory, at)), [7, 0, 7]);
        reclaimer.reclaim(GuestAddress(5 * MIB + 1), 4000).unwrap();
        reclaimer.reclaim(GuestAddress(0), u32::MAX).unwrap();
        assert_eq!((byte(&memory, 7 * MIB), given_back.ranges()), (0, vec![]));
    }

    #[test]
    fn shared_memory_is_taken_from_its_file() {
        let memory = reserve_shared(8).unwrap();
        full(&memory);
        let file = memory.iter().next().unwrap().file_offset().unwrap().file().try_clone().unwrap();
        let blocks = || std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) * 512;
        assert!(blocks() >= 8 * MIB);
        let (mut reclaimer, _) = reclaimer(&memory, GivenBack::default());
        reclaimer.reclaim(GuestAddress(2 * MIB), 4 * MIB as u32).unwrap();
        assert!(blocks() <= 4 * MIB, "{}", blocks());
        assert_eq!([MIB, 2 * MIB, 6 * MIB].map(|at| byte(&memory, at)), [7, 0, 7]);
    }

    #[test]
    fn what_was_a_snapshots_does_not_come_back_and_is_remembered() {
        let memory = reserve(8).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; 8 * MIB as usize]).unwrap();
        map(&memory, &file, 0..6 * MIB);
        let (mut reclaimer, given_back) = reclaimer(&memory, GivenBack::new(8 * MIB, &[0..5 * MIB]));
        memory.write_obj(9u8, GuestAddress(2 * MIB)).unwrap();
        // Half of a block, and those behind it.
        reclaimer.reclaim(GuestAddress(2 * MIB - BLOCK / 2), (2 * MIB + BLOCK / 2) as u32).unwrap();
        assert_eq!([2 * MIB - PAGE, 2 * MIB, 4 * MIB].map(|at| byte(&memory, at)), [7, 0, 7]);
        assert_eq!(given_back.ranges(), [2 * MIB..4 * MIB]);
        // Used again and given back again, now in parts too.
        memory.write_obj(9u8, GuestAddress(2 * MIB + PAGE)).unwrap();
        reclaimer.reclaim(GuestAddress(2 * MIB + PAGE), PAGE as u32).unwrap();
        assert_eq!((byte(&memory, 2 * MIB + PAGE), given_back.ranges()), (0, vec![2 * MIB..4 * MIB]));
        reclaimer.reclaim(GuestAddress(4 * MIB), 4 * MIB as u32).unwrap();
        assert_eq!(given_back.ranges(), [2 * MIB..5 * MIB]);
    }

    fn map(memory: &Memory, file: &File, range: Range<u64>) {
        allow_huge_pages(memory, 0, 8 * MIB, false);
        pages::map(memory, file, range).unwrap();
    }

    #[test]
    fn memory_above_the_gap_is_behind_that_below_in_the_image() {
        let halves = [(GuestAddress(0), 4 << 20), (GuestAddress(1 << 32), 4 << 20)];
        let memory = Memory::from_ranges(&halves).unwrap();
        let all = 0..8 * MIB;
        let (mut reclaimer, given_back) =
            reclaimer(&memory, GivenBack::new(8 * MIB, std::slice::from_ref(&all)));
        reclaimer.reclaim(GuestAddress((1 << 32) + 2 * MIB), 2 * MIB as u32).unwrap();
        assert_eq!(given_back.ranges(), [6 * MIB..8 * MIB]);
    }

    #[test]
    fn pieces_are_bounded() {
        let count = 4 * MAX_PIECES as u64;
        let all = 0..count * BLOCK;
        let given_back = GivenBack::new(count * BLOCK, std::slice::from_ref(&all));
        let mut blocks = given_back.0.lock().unwrap();
        let mut replaced = 0;
        for index in (0..count).step_by(2) {
            let part = blocks.range(index);
            if blocks.has_room(&part) {
                blocks.replaced(&part);
                replaced += 1;
            }
        }
        assert_eq!((replaced, blocks.pieces), (MAX_PIECES, MAX_PIECES));
        let joining = blocks.range(1);
        assert!(blocks.has_room(&joining) && !blocks.has_room(&blocks.range(count - 1)));
        blocks.replaced(&joining);
        assert_eq!(blocks.pieces, MAX_PIECES - 1);
    }

    proptest! {
        #[test]
        fn steps_stay_in_what_was_reported_and_pieces_are_counted(
            kept in proptest::collection::vec(0u64..64, 0..8),
            reports in proptest::collection::vec((0u64..16 * 32, 1u64..200), 0..20),
        ) {
            let bytes = 16 * BLOCK - 5 * PAGE;
            let snapshot: Vec<_> = kept.iter().map(|at| at * 8 * PAGE..(at * 8 + 9) * PAGE).collect();
            let given_back = GivenBack::new(bytes, &snapshot);
            let mut blocks = given_back.0.lock().unwrap();
            for (first, count) in reports {
                let range = (first * PAGE).min(bytes)..((first + count) * PAGE).min(bytes);
                let mut at = range.start;
                for step in blocks.steps(&range) {
                    let part = match &step { Step::Discard(part) | Step::Replace(part) => part.clone() };
                    prop_assert!(part.start >= at && part.end <= range.end && part.start < part.end);
                    at = part.end;
                    if let Step::Replace(part) = step {
                        prop_assert_eq!(part.start % BLOCK, 0);
                        blocks.replaced(&part);
                    }
                }
                let states: Vec<_> = blocks.blocks.iter().map(|it| *it == Block::Replaced).collect();
                let pieces = states.split(|it| !it).filter(|piece| !piece.is_empty()).count();
                prop_assert_eq!(blocks.pieces, pieces);
            }
        }
    }
}
