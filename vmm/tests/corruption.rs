//! Snapshots that nobody has written, by the thousand, through all that reads them: each is refused by name, or is read as what
//! it says. FLYRUN_CORRUPTION_CASES and FLYRUN_CORRUPTION_SEED say how many (default 4000) and which; a failure names the seed
//! and the case. What KVM makes of what is not refused here is tested in snapshot.rs.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on panics")]

mod mutate;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    fs::File,
    os::unix::fs::FileExt,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use devices::{
    testing::Guest,
    virtio::{
        Memory, VirtioDevice,
        balloon::{Balloon, Reclaim},
        rng::Rng,
    },
};
use mutate::{Random, damaged, forged};
use vm_memory::GuestAddress;
use vmm::{
    memory::reserve,
    snapshot::{
        MEMORY, STATE,
        files::MemoryFiles,
        format,
        identity::OpenFiles,
        image::Backing,
        refusal::Refusal,
        restore::{self, Snapshot},
        save,
        sections::State,
    },
};

const FIXTURES: [&[u8]; 3] = [
    include_bytes!("fixtures/state-1"),
    include_bytes!("fixtures/state-2"),
    include_bytes!("fixtures/state-3"),
];
const MIB: u64 = 1 << 20;
/// What reading a file of some 20 KB may take: lists of a length that is only said take no memory.
const MOST_MEMORY: usize = 8 << 20;
const NAMES: [&str; 9] = [
    "missing",
    "truncated",
    "corrupted",
    "too-new",
    "other-cpu",
    "other-kernel",
    "changed-disk",
    "other-machine",
    "host",
];

/// Counts what is allocated.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all is the system's allocator's; the counters do not touch memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().unwrap())
}

/// A snapshot's directory, and guest memory that is mapped again and again.
struct Bench {
    dir: tempfile::TempDir,
    memory: Memory,
    refused: usize,
    read: usize,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join(MEMORY)).unwrap();
        file.set_len(16 * MIB).unwrap();
        for page in [0, 7, 512, 4095] {
            file.write_all_at(&[7; 4096], page * 4096).unwrap();
        }
        std::fs::hard_link(dir.path().join(MEMORY), dir.path().join("base")).unwrap();
        Self { dir, memory: reserve(16).unwrap(), refused: 0, read: 0 }
    }

    /// All that `--inspect` and `--restore` do with it before KVM is asked.
    fn read(&mut self, file: &[u8]) -> Result<Snapshot, Refusal> {
        std::fs::write(self.dir.path().join(STATE), file).unwrap();
        let header = restore::header(self.dir.path());
        let snapshot = Snapshot::open(self.dir.path())?;
        assert_eq!(header.as_ref(), Ok(&snapshot.header), "the header read alone is the same");
        Ok(snapshot)
    }

    fn case(&mut self, file: &[u8], good: &[u8], has_checksums: bool) {
        let before = NOW.load(Ordering::Relaxed);
        PEAK.store(before, Ordering::Relaxed);
        let read = self.read(file);
        let took = PEAK.load(Ordering::Relaxed) - before;
        assert!(took < MOST_MEMORY, "reading it took {took} bytes of memory");
        match read {
            Err(refusal) => self.is_refused(&refusal),
            Ok(snapshot) => {
                assert!(has_checksums || file == good, "what was changed is not noticed");
                self.read += 1;
                means_what_it_says(&snapshot, file);
                self.goes_on(snapshot);
            }
        }
    }

    fn is_refused(&mut self, refusal: &Refusal) {
        self.refused += 1;
        let (name, told) = (refusal.name(), refusal.to_string());
        assert!(NAMES.contains(&name) && !told.is_empty() && told.len() < 20_000, "{name}: {told}");
    }

    fn goes_on(&mut self, snapshot: Snapshot) {
        let spec = snapshot.header.spec.clone();
        let open = OpenFiles { kernel: None, disks: vec![] };
        if let Err(refusal) = snapshot.check(&spec, &open) {
            self.is_refused(&refusal);
        }
        match Backing::restore(&snapshot.files, &self.memory, &snapshot.state.memory) {
            Ok(_) => {}
            Err(refusal) => self.is_refused(&refusal),
        }
        devices_go_on(&snapshot.state);
    }
}

/// Written again, it is the same.
fn means_what_it_says(snapshot: &Snapshot, file: &[u8]) {
    let again = save::encode(&snapshot.header, &snapshot.state).unwrap();
    let (header, sections) = format::decode(&again).unwrap();
    assert_eq!(header, snapshot.header);
    let once_more = save::encode(&header, &State::decode(&sections).unwrap()).unwrap();
    assert!(again == once_more, "{} bytes were read in two ways", file.len());
}

struct Nothing;

impl Reclaim for Nothing {
    fn reclaim(&mut self, _: GuestAddress, _: u32) -> std::io::Result<()> {
        Ok(())
    }
}

fn device(kind: u32) -> Arc<Mutex<dyn VirtioDevice>> {
    match kind {
        5 => Arc::new(Mutex::new(Balloon::new(Box::new(Nothing)).unwrap())),
        _ => Arc::new(Mutex::new(Rng::new().unwrap())),
    }
}

/// Devices go on from what was read, if they can, and the guest uses them.
fn devices_go_on(state: &State) {
    for saved in state.devices.iter().take(4) {
        let mut guest = Guest::with_shared(device(saved.device_type));
        guest.start(0, 8);
        if let Ok(mut guest) = guest.continued(device(saved.device_type), saved) {
            guest.run();
            guest.kick(0);
            guest.start(0, 8);
        }
    }
}

#[test]
fn a_snapshot_that_nobody_has_written_is_refused_or_read_as_what_it_says() {
    let cases = number("FLYRUN_CORRUPTION_CASES", 4000);
    let seed = number("FLYRUN_CORRUPTION_SEED", 1);
    let mut bench = Bench::new();
    for good in FIXTURES {
        bench.case(good, good, false);
        assert_eq!(bench.read, 1, "the good one is read");
        bench.read = 0;
    }
    bench.refused = 0;
    for case in 0..cases {
        let mut random = Random::new(seed.wrapping_mul(1 << 32).wrapping_add(case));
        let good = FIXTURES[case as usize / 2 % FIXTURES.len()];
        let has_checksums = case % 2 == 1;
        let file = if has_checksums { forged(good, &mut random) } else { damaged(good, &mut random) };
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            bench.case(&file, good, has_checksums);
        }));
        assert!(result.is_ok(), "FLYRUN_CORRUPTION_SEED={seed}, case {case}");
    }
    println!("{cases} cases: {} refused, {} read as what they say", bench.refused, bench.read);
    assert!(bench.refused > cases as usize / 2 && bench.read > cases as usize / 100);
}

#[test]
fn files_of_memory_that_are_not_what_they_were_are_refused() {
    let mut bench = Bench::new();
    let mut random = Random::new(2);
    let snapshot = bench.read(FIXTURES[0]).unwrap();
    let path = bench.dir.path().join(MEMORY);
    let restore = |bench: &Bench, dir: &Path| {
        Backing::restore(&MemoryFiles::open(dir), &bench.memory, &snapshot.state.memory)
    };
    for _ in 0..200 {
        let length = random.next() % (32 * MIB);
        File::options().write(true).open(&path).unwrap().set_len(length).unwrap();
        let name = restore(&bench, bench.dir.path()).err().map(|refusal| refusal.name());
        let expected = match length {
            0..16_777_216 => Some("truncated"),
            16_777_216 => None,
            _ => Some("corrupted"),
        };
        assert_eq!(name, expected, "{length}");
    }
    std::fs::remove_file(&path).unwrap();
    assert_eq!(restore(&bench, bench.dir.path()).unwrap_err().name(), "missing");
}
