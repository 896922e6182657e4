//! Read-ahead: which pages of its memory's file a resumed machine has touched in its first moments, so that the next that goes
//! on from the same snapshot has them from the beginning, and takes no exit for each.
//!
//! The list is a hint, in a file of its own beside the snapshot: one that is missing, damaged or another snapshot's is of no
//! consequence but for time.

use std::{
    fs::File,
    io::{self, Read, Write},
    ops::Range,
    os::fd::BorrowedFd,
    path::Path,
};

use devices::virtio::Memory;
use serde::{Deserialize, Serialize};

use super::{
    WORKING_SET,
    dir::Dir,
    files::open_to_read,
    image::{Backing, Extent, without},
    pages::{self, Touched},
};
use crate::{
    memory::{HUGE_PAGE, PAGE},
    worker::Worker,
};

const MAGIC: [u8; 8] = *b"flywset\x1a";
/// Magic, version and CRC.
const HEAD_BYTES: usize = 16;
const VERSION: u32 = 2;
/// Most lists are no longer.
const EXPECTED_BYTES: usize = 8 << 10;
/// The longest file that is read, in bytes: 64 GiB in single pages.
const MAX_FILE_BYTES: u64 = 64 << 20;
/// The most that is read ahead, in bytes: what takes longer than the machine is worth waiting for.
const MAX_BYTES: u64 = 64 << 20;
/// The most of it that the guest stands still for while it runs, in bytes: a few milliseconds.
const MAX_SOON_BYTES: u64 = 8 << 20;

/// Pages of a machine's image that were touched, in two parts: a guest that has the first is soon so far that its first process
/// runs, and has the rest read ahead then.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkingSet {
    /// What was touched until the guest's first process was heard of.
    pub first: Pages,
    /// What was touched later.
    pub rest: Pages,
}

/// Pages, by what was done to them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    /// Those that were written, or are of no file.
    pub written: Vec<Extent>,
    /// Those that were only read, with some of their neighbours unless pages are mapped [apart](super::apart).
    pub read: Vec<Extent>,
}

/// What is read ahead at one time.
#[derive(Debug)]
pub struct Ahead {
    memory: Memory,
    /// The first page of each huge page of text: KVM maps all of it with that.
    text: Vec<Range<u64>>,
    written: Vec<Range<u64>>,
    read: Vec<Range<u64>>,
}

/// What of a list's second part is to be read ahead is only found when its time has come.
#[derive(Debug)]
pub struct Later {
    memory: Memory,
    parts: Vec<Range<u64>>,
    left: u64,
}

impl Pages {
    /// What the machine has touched until now of the files that it is mapped from, and of the memory around them that
    /// the host's huge pages cannot back.
    ///
    /// # Errors
    /// The host does not let this process see its page tables.
    pub fn touched(memory: &Memory, backing: &Backing) -> io::Result<Self> {
        let parts = blocks(&backing.mapped(), pages::image_bytes(memory));
        let Touched { written, read } = pages::touched(memory, &parts)?;
        Ok(Self { written: extents(&written), read: extents(&read) })
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.written.iter().chain(&self.read).fold(0, |sum, extent| sum.saturating_add(extent.1))
    }

    /// The parts of them that lie in these parts of memory, which are in order, as far as may be read ahead.
    fn within(&self, memory: &Memory, parts: &[Range<u64>], left: &mut u64) -> Ahead {
        let written = within(&self.written, parts, left);
        let read = within(&self.read, parts, left);
        Ahead { memory: memory.clone(), text: vec![], written, read }
    }
}

impl WorkingSet {
    /// All that was touched, of which `first` was touched first.
    pub fn new(first: Pages, all: &Pages) -> Self {
        let rest = |all: &[Extent], first: &[Extent]| extents(&without(ranges(all), &ranges(first)));
        // What was read first may have been written later.
        let rest = Pages { written: rest(&all.written, &first.written), read: rest(&all.read, &first.read) };
        Self { first, rest }
    }

    /// Whether so much else was written that it is better learned anew.
    pub fn is_outdated(&self, all: &Pages) -> bool {
        let count =
            |extents: &[Extent]| extents.iter().fold(0, |sum: u64, extent| sum.saturating_add(extent.1));
        let Self { first, rest } = self;
        let others = without(without(ranges(&all.written), &ranges(&first.written)), &ranges(&rest.written));
        count(&extents(&others)) > (count(&first.written) + count(&rest.written)) / 2
    }

    /// Writes it beside a snapshot, whole or not at all.
    ///
    /// # Errors
    /// The host's.
    pub fn write(&self, dir: &Dir) -> io::Result<()> {
        let draft = format!("{WORKING_SET}.new{}", std::process::id());
        let put = || {
            self.write_to(&mut dir.create(&draft)?)?;
            dir.rename(&draft, WORKING_SET)
        };
        put().inspect_err(|_| _ = dir.remove(&draft))
    }

    /// Writes it to a file that nobody reads yet.
    ///
    /// # Errors
    /// The host's.
    pub fn write_to(&self, file: &mut File) -> io::Result<()> {
        let payload = postcard::to_allocvec(self).map_err(io::Error::other)?;
        file.write_all(&head(&payload))?;
        file.write_all(&payload)
    }

    /// That of the snapshot, if there is one that can be read.
    pub fn read(dir: &Path) -> Option<Self> {
        Self::read_from(&open_to_read(&dir.join(WORKING_SET)).ok()?)
    }

    /// That in the file, if it can be read.
    pub fn read_from(file: &File) -> Option<Self> {
        let mut bytes = Vec::with_capacity(EXPECTED_BYTES);
        file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).ok()?;
        let (found, payload) = bytes.split_first_chunk::<HEAD_BYTES>()?;
        if *found != head(payload) {
            return None;
        }
        postcard::from_bytes(payload).ok()
    }

    /// What of its first part is in this memory, mapped from these parts of files; and the rest, for later.
    pub fn ahead(&self, memory: &Memory, mapped: &[Range<u64>]) -> (Ahead, Later) {
        let mut left = MAX_BYTES;
        let parts = blocks(mapped, pages::image_bytes(memory));
        let first = self.first.within(memory, &parts, &mut left);
        (first, Later { memory: memory.clone(), parts, left })
    }

    /// The same, for a guest all of whose first moments are before what somebody waits for.
    pub fn all_first(self) -> WorkingSet {
        let all = |first: Vec<Extent>, rest: Vec<Extent>| {
            let mut all = [first, rest].concat();
            all.sort_unstable_by_key(|extent| extent.0);
            all
        };
        let Self { first, rest } = self;
        let first = Pages { written: all(first.written, rest.written), read: all(first.read, rest.read) };
        WorkingSet { first, rest: Pages::default() }
    }
}

impl Later {
    /// What of the rest of this list is in that memory.
    pub fn ahead(mut self, list: &WorkingSet) -> Ahead {
        list.rest.within(&self.memory, &self.parts, &mut self.left)
    }
}

impl Ahead {
    /// The same with a part of memory that is mapped from huge pages.
    #[must_use]
    pub fn with_text(self, range: Option<&Range<u64>>) -> Self {
        let firsts = range.into_iter().flat_map(|range| range.clone().step_by(HUGE_PAGE as usize));
        Self { text: firsts.map(|first| first..first + PAGE).collect(), ..self }
    }

    /// Has the pages that will be written there, for this process. Cheaper before KVM has the memory, which it is told about
    /// each of them.
    pub fn make(&self) {
        self.written.iter().for_each(|range| pages::populate(&self.memory, range.clone(), true));
    }

    /// Has all pages there, for this process and, where KVM can do that, for the guest. What does not work is left to be done
    /// when the guest touches it. The vCPU does not run.
    pub fn give(&self, vcpu: BorrowedFd<'_>) {
        self.give_while(vcpu, &|| true);
    }

    /// [`Self::make`] and [`Self::give`] by the thread of this vCPU, for as long as the machine is to run: an exit of the guest for
    /// each page costs more.
    pub fn give_meanwhile(&self, vcpu: BorrowedFd<'_>, is_to_run: &dyn Fn() -> bool) {
        for range in self.written.iter().take_while(|_| is_to_run()) {
            pages::populate(&self.memory, range.clone(), true);
        }
        self.give_while(vcpu, is_to_run);
    }

    fn give_while(&self, vcpu: BorrowedFd<'_>, is_to_run: &dyn Fn() -> bool) {
        let mut all = self.text.clone();
        all.extend(joined(self.written.iter().chain(&self.read).cloned().collect()));
        // KVM has this process map what it does not have yet.
        let mut to_give = all.into_iter().take_while(|_| is_to_run());
        if to_give.try_for_each(|range| pages::fault_in(&self.memory, range, vcpu)).is_err() {
            let to_read = self.read.iter().take_while(|_| is_to_run());
            to_read.for_each(|range| pages::populate(&self.memory, range.clone(), false));
        }
    }

    /// What the guest is to stand still for, and what is more than that.
    pub fn split(self) -> (Self, Self) {
        let mut left = MAX_SOON_BYTES;
        let mut soon_of = |ranges: Vec<Range<u64>>| -> (Vec<_>, Vec<_>) {
            ranges.into_iter().partition(|range| {
                let bytes = range.end - range.start;
                let is_soon = bytes <= left;
                left -= if is_soon { bytes } else { 0 };
                is_soon
            })
        };
        let (written, more_written) = soon_of(self.written);
        let (read, more_read) = soon_of(self.read);
        let later =
            Self { memory: self.memory.clone(), text: vec![], written: more_written, read: more_read };
        (Self { written, read, ..self }, later)
    }

    /// Has the pages that are only read there for this process, by the worker, while the guest runs.
    ///
    /// Not those that are written: while the kernel copies a page that was mapped already, KVM has the vCPU try again and again,
    /// and that lasts as long as the thread waits for a CPU. For the same reason the thread has no lower priority than others:
    /// it holds what a fault of the guest may wait for.
    pub fn in_background(self, worker: &Worker) {
        if self.read.is_empty() {
            return;
        }
        let populated = worker.give(move |queue| {
            let ranges = self.read.iter().take_while(|_| !queue.is_waiting());
            ranges.for_each(|range| pages::populate(&self.memory, range.clone(), false));
        });
        // Without a thread, nothing is read ahead.
        let _ = populated;
    }
}

/// The blocks of a huge page that the ranges, which are in order, lie in.
fn blocks(mapped: &[Range<u64>], bytes: u64) -> Vec<Range<u64>> {
    let mut blocks = Vec::with_capacity(mapped.len());
    for range in mapped {
        let end = range.end.next_multiple_of(HUGE_PAGE).min(bytes);
        pages::push(&mut blocks, range.start / HUGE_PAGE * HUGE_PAGE..end);
    }
    blocks
}

fn head(payload: &[u8]) -> [u8; HEAD_BYTES] {
    let mut head = [0; HEAD_BYTES];
    let fields = MAGIC.into_iter().chain(VERSION.to_le_bytes()).chain(crc32fast::hash(payload).to_le_bytes());
    head.iter_mut().zip(fields).for_each(|(place, byte)| *place = byte);
    head
}

/// The ranges in order, neighbours as one: a call costs as much as some pages.
fn joined(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined = Vec::with_capacity(ranges.len());
    ranges.into_iter().for_each(|range| pages::push(&mut joined, range));
    joined
}

fn ranges(extents: &[Extent]) -> Vec<Range<u64>> {
    let range = |Extent(first, count): &Extent| {
        first.saturating_mul(PAGE)..first.saturating_add(*count).saturating_mul(PAGE)
    };
    extents.iter().map(range).collect()
}

fn extents(ranges: &[Range<u64>]) -> Vec<Extent> {
    ranges.iter().map(|range| Extent(range.start / PAGE, (range.end - range.start) / PAGE)).collect()
}

/// The parts of the list that lie in these parts of memory, which are in order, as far as may be read ahead.
fn within(extents: &[Extent], mapped: &[Range<u64>], left: &mut u64) -> Vec<Range<u64>> {
    let mut parts = Vec::new();
    for Extent(first, count) in extents {
        let start = first.saturating_mul(PAGE);
        let end = first.saturating_add(*count).saturating_mul(PAGE);
        let from = mapped.partition_point(|part| part.end <= start);
        for part in mapped.iter().skip(from).take_while(|part| part.start < end) {
            let part = start.max(part.start)..end.min(part.end);
            if part.end - part.start > *left {
                return parts;
            }
            *left -= part.end - part.start;
            parts.push(part);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use std::{fs, os::fd::AsFd};

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::snapshot::{apart::Apart, files::MemoryFiles};
    use crate::{memory::reserve, snapshot::sections::MemoryState};

    fn set() -> WorkingSet {
        let first = Pages { written: vec![Extent(3, 2)], read: vec![Extent(20, 4)] };
        let rest = Pages { written: vec![Extent(9, 1)], read: vec![] };
        WorkingSet { first, rest }
    }

    #[test]
    fn what_was_written_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(WorkingSet::read(dir.path()), None);
        set().write(&Dir::at(dir.path()).unwrap()).unwrap();
        assert_eq!(WorkingSet::read(dir.path()), Some(set()));
        assert_eq!((set().first.count(), set().rest.count()), (6, 1));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_damaged_list_is_none() {
        let dir = tempfile::tempdir().unwrap();
        set().write(&Dir::at(dir.path()).unwrap()).unwrap();
        let path = dir.path().join(WORKING_SET);
        let good = fs::read(&path).unwrap();
        for index in 0..good.len() {
            let mut bad = good.clone();
            bad[index] ^= 0x10;
            fs::write(&path, &bad).unwrap();
            assert_eq!(WorkingSet::read(dir.path()), None, "{index}");
            fs::write(&path, &good[..index]).unwrap();
            assert_eq!(WorkingSet::read(dir.path()), None, "{index}");
        }
    }

    #[test]
    fn the_rest_is_what_was_not_touched_or_not_written_before() {
        let first = Pages { written: vec![Extent(3, 2)], read: vec![Extent(20, 4)] };
        let all =
            Pages { written: vec![Extent(2, 4), Extent(21, 1)], read: vec![Extent(20, 1), Extent(22, 9)] };
        let set = WorkingSet::new(first.clone(), &all);
        assert_eq!(set.first, first);
        let written = vec![Extent(2, 1), Extent(5, 1), Extent(21, 1)];
        assert_eq!(set.rest, Pages { written, read: vec![Extent(24, 7)] });
    }

    #[test]
    fn only_what_is_mapped_is_read_ahead_and_not_too_much() {
        let page = |range: Range<u64>| range.start * PAGE..range.end * PAGE;
        let mapped = [page(2..4), page(8..30)];
        let mut left = MAX_BYTES;
        let parts =
            within(&[Extent(0, 9), Extent(28, 1 << 50), Extent(u64::MAX, u64::MAX)], &mapped, &mut left);
        assert_eq!(parts, [page(2..4), page(8..9), page(28..30)]);
        assert_eq!(left, MAX_BYTES - 5 * PAGE);
        assert_eq!(within(&[Extent(8, 3)], &mapped, &mut (2 * PAGE)), []);
    }

    #[test]
    fn touched_pages_are_there_the_next_time() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = File::create(dir.path().join(super::super::MEMORY)).unwrap();
        file.write_all(&vec![7; 4 << 20]).unwrap();
        let restored = || {
            let memory = reserve(4).unwrap();
            let backing =
                Backing::restore(&MemoryFiles::open(dir.path()), &memory, &MemoryState::default()).unwrap();
            (memory, backing)
        };
        let (memory, backing) = restored();
        assert_eq!(Pages::touched(&memory, &backing).unwrap(), Pages::default());
        memory.write_obj(1u8, GuestAddress(5 * PAGE)).unwrap();
        memory.write_obj(1u8, GuestAddress(6 * PAGE)).unwrap();
        memory.read_obj::<u8>(GuestAddress(700 * PAGE)).unwrap();
        let touched = Pages::touched(&memory, &backing).unwrap();
        assert_eq!(touched.written, [Extent(5, 2)]);
        assert!(touched.read.iter().any(|Extent(first, count)| (*first..first + count).contains(&700)));

        let (memory, backing) = restored();
        let list = WorkingSet::new(Pages::default(), &touched);
        let (first, rest) = list.ahead(&memory, &backing.mapped());
        assert!(first.written.is_empty() && first.read.is_empty());
        let rest = rest.ahead(&list);
        rest.make();
        // What is no vCPU gives nothing to a guest.
        rest.give(File::open("/dev/null").unwrap().as_fd());
        let again = Pages::touched(&memory, &backing).unwrap();
        assert_eq!(again.written, touched.written);
        assert!(again.count() >= touched.count());
        assert_eq!(memory.read_obj::<u8>(GuestAddress(5 * PAGE)).unwrap(), 7);
    }

    #[test]
    fn a_running_guest_stands_still_for_so_much_only() {
        let memory = reserve(64).unwrap();
        let mib = |range: Range<u64>| range.start << 20..range.end << 20;
        let all = Ahead {
            text: vec![],
            memory: memory.clone(),
            written: vec![mib(0..3), mib(4..10)],
            read: vec![mib(20..24), mib(30..32), mib(40..41)],
        };
        let (soon, later) = all.split();
        assert_eq!((soon.written, soon.read), (vec![mib(0..3)], vec![mib(20..24), mib(40..41)]));
        assert_eq!((later.written, later.read), (vec![mib(4..10)], vec![mib(30..32)]));
    }

    #[test]
    fn what_is_read_ahead_meanwhile_ends_when_the_machine_is_to_pause() {
        // Whole huge pages, which the host may back memory with.
        let (one, other) = (0..HUGE_PAGE, 2 * HUGE_PAGE..3 * HUGE_PAGE);
        let memory = reserve(8).unwrap();
        let written = vec![one.clone(), other.clone()];
        let ahead = Ahead { memory: memory.clone(), text: vec![], written, read: vec![] };
        let no_vcpu = File::open("/dev/null").unwrap();
        let all = [Range { start: 0, end: pages::image_bytes(&memory) }];
        let written_while = |turns: usize| {
            let left = std::cell::Cell::new(turns);
            ahead.give_meanwhile(no_vcpu.as_fd(), &|| left.replace(left.get().saturating_sub(1)) > 0);
            pages::touched(&memory, &all).unwrap().written
        };
        assert_eq!(written_while(0), []);
        assert_eq!(written_while(1), std::slice::from_ref(&one));
        assert_eq!(written_while(9), [one, other]);
    }

    #[test]
    fn pages_that_are_mapped_apart_are_touched_without_their_neighbours() {
        // In memory, where no file system keeps several pages as one.
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut file = File::create(dir.path().join(super::super::MEMORY)).unwrap();
        file.write_all(&vec![7; 4 << 20]).unwrap();
        let memory = reserve(4).unwrap();
        // The rest of the second 2 MiB is of no file.
        let state = MemoryState { extents: None, data: Some(vec![Extent(0, 800)]) };
        let backing = Backing::restore(&MemoryFiles::open(dir.path()), &memory, &state).unwrap();
        let Ok(_apart) = Apart::new(&memory, &backing.mapped()) else {
            eprintln!("skipped: this host cannot map pages apart");
            return;
        };
        for page in [3, 100, 101, 700] {
            assert_eq!(memory.read_obj::<u8>(GuestAddress(page * PAGE)).unwrap(), 7);
        }
        memory.write_obj(1u8, GuestAddress(9 * PAGE)).unwrap();
        memory.write_obj(1u8, GuestAddress(900 * PAGE)).unwrap();
        let touched = Pages::touched(&memory, &backing).unwrap();
        assert_eq!(touched.read, [Extent(3, 1), Extent(100, 2), Extent(700, 1)]);
        assert_eq!(touched.written, [Extent(9, 1), Extent(900, 1)]);
    }

    #[test]
    fn blocks_are_whole_huge_pages_within_memory() {
        let page = |range: Range<u64>| range.start * PAGE..range.end * PAGE;
        let mapped = [page(3..4), page(600..700), page(2000..2100)];
        assert_eq!(blocks(&mapped, 2200 * PAGE), [page(0..1024), page(1536..2200)]);
    }
}
