use std::path::{Path, PathBuf};

use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::{
    memory::{allow_huge_pages, reserve},
    reclaim::Reclaimer,
};
use devices::virtio::balloon::Reclaim as _;

const MIB: u64 = 1 << 20;

/// A machine of 8 MiB, and the directory of its snapshot.
struct Machine {
    memory: Memory,
    backing: Backing,
    dir: PathBuf,
}

fn memory() -> Memory {
    let memory = reserve(8).unwrap();
    allow_huge_pages(&memory, 0, 8 * MIB, false);
    memory
}

impl Machine {
    fn booted(dir: &Path) -> Self {
        Self { memory: memory(), backing: Backing::default(), dir: dir.to_path_buf() }
    }

    fn resumed(dir: &Path, state: &MemoryState) -> Self {
        let memory = memory();
        let backing = Backing::restore(&MemoryFiles::open(dir), &memory, state).unwrap();
        Self { memory, backing, dir: dir.to_path_buf() }
    }

    fn set(&self, page: u64, byte: u8) {
        self.memory.write_slice(&[byte; PAGE as usize], GuestAddress(page * PAGE)).unwrap();
    }

    fn get(&self, page: u64) -> u8 {
        let mut bytes = [0; PAGE as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(page * PAGE)).unwrap();
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "page {page}");
        bytes[0]
    }

    /// As `save` does it, without the rest of the state.
    fn suspend(&self) -> (MemoryState, Written, Plan) {
        // SAFETY: nobody else knows this memory.
        let still = unsafe { Still::new(&self.memory) };
        let plan = self.backing.plan(&Dir::at(&self.dir).unwrap(), &still).unwrap();
        let name = if plan.in_place { MEMORY } else { "new" };
        let path = self.dir.join(name);
        let file = File::options().write(true).create(true).truncate(false).open(&path).unwrap();
        let written = plan.write(&still, &file, &mut || false).unwrap().unwrap();
        if plan.promote {
            std::fs::rename(self.dir.join(MEMORY), self.dir.join(BASE)).unwrap();
        }
        if !plan.in_place {
            std::fs::rename(path, self.dir.join(MEMORY)).unwrap();
        }
        (plan.state(&written), written, plan)
    }
}

fn pages(written: &Written) -> (u64, u64) {
    (written.seen_bytes / PAGE, written.written_bytes / PAGE)
}

/// A clone's directory: links to the files of the other.
fn clone(dir: &Path) -> TempDir {
    let clone = tempfile::tempdir().unwrap();
    for name in [MEMORY, BASE] {
        if dir.join(name).exists() {
            std::fs::hard_link(dir.join(name), clone.path().join(name)).unwrap();
        }
    }
    clone
}

#[test]
fn zero_pages_are_holes_and_all_others_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::booted(dir.path());
    for (page, byte) in [(0, 1), (5, 2), (6, 0), (7, 3), (2047, 4)] {
        machine.set(page, byte);
    }
    let (state, written, _) = machine.suspend();
    assert_eq!((pages(&written), state.extents.is_none()), ((5, 4), true));
    let file = dir.path().join(MEMORY).metadata().unwrap();
    assert!(file.len() == 8 * MIB && file.blocks() * 512 <= 8 * PAGE, "{} blocks", file.blocks());
    let resumed = Machine::resumed(dir.path(), &state);
    let expected = [(0, 1), (1, 0), (5, 2), (6, 0), (7, 3), (1000, 0), (2047, 4)];
    assert_eq!(expected.map(|(page, _)| resumed.get(page)), expected.map(|(_, byte)| byte));
}

#[test]
fn a_resumed_machine_writes_what_it_has_changed_into_its_own_file() {
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::booted(dir.path());
    (0..100).for_each(|page| machine.set(page, 7));
    let (state, ..) = machine.suspend();
    let machine = Machine::resumed(dir.path(), &state);
    assert_eq!(machine.get(50), 7);
    machine.set(3, 9);
    machine.set(4, 0);
    machine.set(1500, 5);
    let (state, written, plan) = machine.suspend();
    assert!(plan.in_place && plan.since_resume());
    assert_eq!(pages(&written), (3, 2));
    assert_eq!([3, 4, 5, 1500].map(|page| machine.get(page)), [9, 0, 7, 5], "it may go on");
    let machine = Machine::resumed(dir.path(), &state);
    assert_eq!([3, 4, 5, 1500].map(|page| machine.get(page)), [9, 0, 7, 5]);
    let (_, written, _) = machine.suspend();
    assert_eq!(pages(&written), (0, 0));
}

/// Four MiB that the guest has given back, but for a page that it uses again.
fn give_back(machine: &Machine) {
    let mut reclaimer = Reclaimer::new(machine.memory.clone(), Arc::clone(machine.backing.given_back()));
    reclaimer.reclaim(GuestAddress(2 * MIB), 4 * MIB as u32).unwrap();
    machine.set(600, 9);
}

#[test]
fn what_a_guest_gives_back_becomes_holes_wherever_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let expected = [(0, 7), (511, 7), (512, 0), (600, 9), (601, 0), (1535, 0), (1536, 7)];
    let check = |machine: &Machine| {
        assert_eq!(expected.map(|(page, _)| machine.get(page)), expected.map(|(_, byte)| byte));
    };
    let blocks = |dir: &Path| std::fs::metadata(dir.join(MEMORY)).unwrap().blocks() * 512;
    let machine = Machine::booted(dir.path());
    (0..2048).for_each(|page| machine.set(page, 7));
    let (state, ..) = machine.suspend();
    let first = clone(dir.path());
    // A clone: its list says that those pages are its own, and its file has nothing there.
    let machine = Machine::resumed(first.path(), &state);
    give_back(&machine);
    let (second, written, plan) = machine.suspend();
    assert_eq!((pages(&written), plan.promote), ((1, 1), true));
    assert_eq!(second.extents, Some(vec![Extent(512, 1024)]));
    check(&machine);
    check(&Machine::resumed(first.path(), &second));
    // In place, with a base.
    let machine = Machine::resumed(first.path(), &second);
    machine.set(1700, 5);
    machine.set(700, 5);
    let (third, ..) = machine.suspend();
    let machine = Machine::resumed(first.path(), &third);
    give_back(&machine);
    let (third, written, plan) = machine.suspend();
    assert!(plan.in_place && blocks(first.path()) <= 4 * PAGE, "{}", blocks(first.path()));
    // A clone's short runs are read and not mapped, and written again.
    assert_eq!(pages(&written), (2, 2));
    check(&machine);
    let machine = Machine::resumed(first.path(), &third);
    check(&machine);
    assert_eq!([700, 1700].map(|page| machine.get(page)), [0, 5]);
    // In place, without one.
    drop(first);
    let machine = Machine::resumed(dir.path(), &state);
    give_back(&machine);
    let elsewhere = tempfile::tempdir().unwrap();
    let other = Machine { dir: elsewhere.path().to_path_buf(), ..machine };
    let (fourth, written, plan) = other.suspend();
    assert!(!plan.since_resume() && pages(&written) == (1025, 1025), "{written:?}");
    check(&Machine::resumed(elsewhere.path(), &fourth));
    let machine = Machine { dir: dir.path().to_path_buf(), ..other };
    let (state, written, plan) = machine.suspend();
    assert!(plan.in_place && blocks(dir.path()) <= 4 * MIB + 2 * PAGE, "{}", blocks(dir.path()));
    assert_eq!(pages(&written), (1, 1));
    check(&Machine::resumed(dir.path(), &state));
}

#[test]
fn a_list_without_another_is_what_only_it_has() {
    for (one, other, left) in [
        (vec![0..10], vec![], vec![0..10]),
        (vec![0..10], vec![0..10], vec![]),
        (vec![0..10, 20..30], vec![5..25], vec![0..5, 25..30]),
        (vec![0..10, 20..30], vec![2..3, 4..5, 22..23, 40..50], vec![0..2, 3..4, 5..10, 20..22, 23..30]),
        (vec![5..10], vec![0..6, 9..12], vec![6..9]),
        (vec![5..6, 7..8, 9..10], vec![0..20], vec![]),
    ] {
        assert_eq!(without(one.clone(), &other), left, "{one:?} {other:?}");
    }
}

#[test]
fn clones_never_write_what_they_share() {
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::booted(dir.path());
    (0..100).for_each(|page| machine.set(page, 7));
    let (first, ..) = machine.suspend();
    let other = clone(dir.path());
    let third = clone(dir.path());
    let mut states = [first.clone(), first.clone()];
    for round in 1..4 {
        for (byte, dir) in [(1, dir.path()), (2, other.path())] {
            let state = &mut states[usize::from(byte) - 1];
            let machine = Machine::resumed(dir, state);
            for page in 0..round * 20 {
                machine.set(page, byte);
            }
            machine.set(99, 0);
            let (next, written, plan) = machine.suspend();
            assert_eq!((plan.promote, plan.in_place), (round == 1, round > 1));
            assert!(written.written_bytes / PAGE <= round * 20);
            *state = next;
            let machine = Machine::resumed(dir, state);
            let seen = [0, round * 20 - 1, round * 20, 98, 99].map(|page| machine.get(page));
            assert_eq!(seen, [byte, byte, 7, 7, 0], "round {round} of {byte}");
        }
    }
    let machine = Machine::resumed(third.path(), &first);
    assert_eq!([0, 99, 100].map(|page| machine.get(page)), [7, 7, 0]);
}

#[test]
fn a_clone_of_a_clone_gets_a_memory_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::booted(dir.path());
    machine.set(1, 1);
    let (state, ..) = machine.suspend();
    let second = clone(dir.path());
    let machine = Machine::resumed(second.path(), &state);
    machine.set(2, 2);
    let (state, ..) = machine.suspend();
    let third = clone(second.path());
    let machine = Machine::resumed(third.path(), &state);
    machine.set(3, 3);
    let (third_state, _, plan) = machine.suspend();
    assert!(!plan.in_place && !plan.promote);
    let bytes = |machine: Machine| [1, 2, 3].map(|page| machine.get(page));
    assert_eq!(bytes(Machine::resumed(third.path(), &third_state)), [1, 2, 3]);
    assert_eq!(bytes(Machine::resumed(second.path(), &state)), [1, 2, 0]);
}

#[test]
fn in_another_directory_everything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = Machine::booted(dir.path());
    (0..10).for_each(|page| machine.set(page, 7));
    let (state, ..) = machine.suspend();
    let sibling = clone(dir.path());
    for (dir, state) in [(dir.path(), state.clone()), (sibling.path(), state)] {
        machine = Machine::resumed(dir, &state);
        machine.set(2, 9);
        let elsewhere = tempfile::tempdir().unwrap();
        machine.dir = elsewhere.path().to_path_buf();
        let (state, written, plan) = machine.suspend();
        assert!(!plan.since_resume() && state.extents.is_none());
        assert_eq!(pages(&written).1, 10);
        let machine = Machine::resumed(elsewhere.path(), &state);
        assert_eq!([1, 2, 9, 10].map(|page| machine.get(page)), [7, 9, 7, 0]);
    }
}

#[test]
fn a_checksum_is_that_of_the_pages_wherever_they_lie() {
    let of = |machine: &Machine| {
        // SAFETY: nobody else knows this memory.
        let still = unsafe { Still::new(&machine.memory) };
        checksum(&machine.backing, &still, &mut || false).unwrap().unwrap()
    };
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::booted(dir.path());
    (0..50).for_each(|page| machine.set(page, 7));
    machine.set(20, 0);
    let first = of(&machine);
    let (state, ..) = machine.suspend();
    let other = clone(dir.path());
    let machine = Machine::resumed(other.path(), &state);
    assert_eq!(of(&machine), first);
    machine.set(1000, 1);
    let second = of(&machine);
    let (state, ..) = machine.suspend();
    assert_eq!(of(&Machine::resumed(other.path(), &state)), second);
    assert_ne!(first, second);
    let file = File::options().write(true).open(other.path().join(MEMORY)).unwrap();
    file.write_all_at(&[9], 1000 * PAGE + 5).unwrap();
    assert_ne!(of(&Machine::resumed(other.path(), &state)), second);
    // The same bytes on another page are other memory.
    let moved = Machine::booted(dir.path());
    (1..51).for_each(|page| moved.set(page, 7));
    moved.set(21, 0);
    assert_ne!(of(&moved), first);
}

#[test]
fn a_snapshot_that_is_given_up_stops_soon() {
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::booted(dir.path());
    (0..2048).for_each(|page| machine.set(page, 7));
    // SAFETY: nobody else knows this memory.
    let still = unsafe { Still::new(&machine.memory) };
    let plan = machine.backing.plan(&Dir::at(dir.path()).unwrap(), &still).unwrap();
    let file = tempfile::tempfile().unwrap();
    assert_eq!(plan.write(&still, &file, &mut || true).unwrap(), None);
    assert_eq!(file.metadata().unwrap().blocks() * 512, CHUNK_BYTES);
}

#[test]
fn long_and_short_runs_of_a_clones_pages_come_from_its_own_file() {
    let dir = tempfile::tempdir().unwrap();
    let (base, own) = (dir.path().join(BASE), dir.path().join(MEMORY));
    std::fs::write(&base, vec![1; 8 * MIB as usize]).unwrap();
    std::fs::write(&own, vec![2; 8 * MIB as usize]).unwrap();
    let state =
        MemoryState { extents: Some(vec![Extent(0, 1), Extent(10, 100), Extent(2047, 1)]), data: None };
    let machine = Machine::resumed(dir.path(), &state);
    let seen = [0, 1, 9, 10, 109, 110, 2046, 2047].map(|page| machine.get(page));
    assert_eq!(seen, [2, 1, 1, 2, 2, 1, 1, 2]);
}

#[test]
fn what_is_not_listed_is_zeros_and_not_looked_at() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(MEMORY), vec![1; 8 * MIB as usize]).unwrap();
    let state = MemoryState { extents: None, data: Some(vec![Extent(3, 2), Extent(1024, 1)]) };
    let machine = Machine::resumed(dir.path(), &state);
    assert_eq!([2, 3, 4, 5, 1023, 1024, 1025].map(|page| machine.get(page)), [0, 1, 1, 0, 0, 1, 0]);
    let bad = MemoryState { extents: None, data: Some(vec![Extent(2048, 1)]) };
    assert_eq!(
        Backing::restore(&MemoryFiles::open(dir.path()), &memory(), &bad).unwrap_err().name(),
        "corrupted"
    );
}

#[test]
fn the_list_of_what_is_not_zeros_goes_on_with_each_suspend() {
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::booted(dir.path());
    machine.set(1, 1);
    machine.set(3, 1);
    let (state, ..) = machine.suspend();
    assert_eq!(state.data, Some(vec![Extent(1, 3)]), "short gaps are not worth a part");
    let machine = Machine::resumed(dir.path(), &state);
    machine.set(1600, 2);
    let (state, ..) = machine.suspend();
    assert_eq!(state.data, Some(vec![Extent(1, 3), Extent(1600, 1)]));
    // A clone's list is of its base.
    let clone = clone(dir.path());
    let machine = Machine::resumed(clone.path(), &state);
    assert_eq!([1, 3, 1600, 700].map(|page| machine.get(page)), [1, 1, 2, 0]);
    machine.set(700, 3);
    let (of_clone, ..) = machine.suspend();
    assert_eq!((of_clone.data.clone(), of_clone.extents.clone()), (state.data, Some(vec![Extent(700, 1)])));
    let machine = Machine::resumed(clone.path(), &of_clone);
    assert_eq!([1, 3, 1600, 700, 701].map(|page| machine.get(page)), [1, 1, 2, 3, 0]);
}

#[test]
fn lists_of_pages_that_no_clone_has_are_refused() {
    let bytes = 8 * MIB;
    let all = bytes / PAGE;
    assert_eq!(ranges(&[Extent(0, 2), Extent(2, all - 2)], bytes).unwrap(), [0..2 * PAGE, 2 * PAGE..bytes]);
    for bad in [
        vec![Extent(0, 0)],
        vec![Extent(all, 1)],
        vec![Extent(0, all + 1)],
        vec![Extent(u64::MAX, 1)],
        vec![Extent(1, u64::MAX)],
        vec![Extent(u64::MAX / PAGE, 2)],
        vec![Extent(5, 2), Extent(6, 2)],
        vec![Extent(5, 2), Extent(1, 1)],
    ] {
        assert_eq!(ranges(&bad, bytes).unwrap_err().name(), "corrupted", "{bad:?}");
    }
}

#[test]
fn files_of_another_length_or_kind_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refused = || {
        Backing::restore(&MemoryFiles::open(dir.path()), &memory(), &MemoryState::default())
            .unwrap_err()
            .name()
    };
    assert_eq!(refused(), "missing");
    let file = File::create(dir.path().join(MEMORY)).unwrap();
    assert_eq!(refused(), "truncated");
    file.set_len(8 * MIB + 1).unwrap();
    assert_eq!(refused(), "corrupted");
    std::fs::remove_file(dir.path().join(MEMORY)).unwrap();
    std::fs::create_dir(dir.path().join(MEMORY)).unwrap();
    assert_ne!(refused(), "");
}

#[test]
fn runs_of_zero_and_other_pages_alternate() {
    let page = PAGE as usize;
    let mut bytes = vec![0; 6 * page];
    (bytes[page], bytes[3 * page - 1], bytes[5 * page + 77]) = (1, 1, 1);
    let found: Vec<_> = runs(&bytes).map(|run| (run.zero, run.bytes.len() / page)).collect();
    assert_eq!(found, [(true, 1), (false, 2), (true, 2), (false, 1)]);
    assert_eq!(runs(&[]).count(), 0);
}
