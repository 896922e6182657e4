//! The file `state` with any bytes: as they are, as one of its sections with a right checksum, as the parts of memory that it says
//! files hold, and as a device's state that a device goes on from.
#![no_main]
#![allow(clippy::expect_used, reason = "only fuzzers run this")]

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::{Arc, LazyLock, Mutex},
};

use devices::{
    testing::Guest,
    virtio::{
        Memory, VirtioDevice,
        balloon::{Balloon, Reclaim},
        block::{Backend, Block},
        rng::Rng,
        vsock::Vsock,
    },
};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;
use vm_memory::GuestAddress;
use vmm::{
    memory::reserve,
    snapshot::{
        BASE, MEMORY,
        files::MemoryFiles,
        format::{Section, decode, encode},
        identity::OpenFiles,
        image::Backing,
        restore::check,
        save,
        sections::State,
    },
};

/// Snapshots that guests were really resumed from.
const GOOD: [&[u8]; 3] = [
    include_bytes!("../../../tests/fixtures/state-1"),
    include_bytes!("../../../tests/fixtures/state-2"),
    include_bytes!("../../../tests/fixtures/state-3"),
];
const MIB: u32 = 16;

/// Once: guest memory lives as long as its process.
static GUEST: LazyLock<Memory> = LazyLock::new(|| reserve(MIB).expect("there is memory"));
/// A snapshot's files of memory, a disk, and a place for sockets.
static DIRECTORY: LazyLock<TempDir> = LazyLock::new(|| {
    let directory = tempfile::tempdir().expect("there is room for files");
    for name in [MEMORY, BASE] {
        let file = File::create(directory.path().join(name)).expect("it can be made");
        file.set_len(u64::from(MIB) << 20).expect("it can be long");
        file.write_all_at(&[7; 8192], 512 << 10).expect("it can be written");
    }
    std::fs::write(directory.path().join("disk"), [1; 4096]).expect("it can be written");
    directory
});

fuzz_target!(|data: &[u8]| {
    let _ = decode(data);
    let Some((which, bytes)) = data.split_first() else { return };
    let good = GOOD[usize::from(which % 3)];
    let Ok((header, mut sections)) = decode(good) else { return };
    let index = usize::from(which & 0x7f) / 3 % sections.len();
    // With the upper bit the section is changed from there on, else it is replaced.
    let changed = match (which & 0x80, bytes) {
        (0x80, [low, high, rest @ ..]) => {
            let mut payload = sections[index].payload.to_vec();
            let at = usize::from(u16::from_le_bytes([*low, *high])) % payload.len();
            payload.iter_mut().skip(at).zip(rest).for_each(|(place, byte)| *place = *byte);
            payload
        }
        _ => bytes.to_vec(),
    };
    sections[index].payload = &changed;
    let Ok(json) = header.to_json() else { return };
    let file = encode(&json, &sections);
    if let Ok((header, sections)) = decode(&file)
        && let Ok(state) = State::decode(&sections)
    {
        let again = save::encode(&header, &state).expect("what was read can be written");
        let (_, sections) = decode(&again).expect("what was written can be read");
        let once_more = State::decode(&sections).expect("what was written can be read");
        assert!(save::encode(&header, &once_more).is_ok_and(|twice| twice == again), "read in two ways");
        let _ = Backing::restore(&MemoryFiles::open(DIRECTORY.path()), &GUEST, &state.memory);
        go_on(&state);
        let nothing = OpenFiles { kernel: None, disks: vec![] };
        let _ = check(&header, &state, &header.spec, &nothing);
    }
    // And a header that says what it likes.
    let _ = decode(&encode(bytes, &[Section { id: 1, version: 1, payload: bytes }]));
});

/// The devices go on from what was read, and the guest uses them.
fn go_on(state: &State) {
    for saved in state.devices.iter().take(4) {
        let Some(first) = device(saved.device_type) else { continue };
        let mut guest = Guest::with_shared(first);
        guest.start(0, 8);
        let Some(next) = device(saved.device_type) else { return };
        if let Ok(mut guest) = guest.continued(next, saved) {
            guest.run();
            guest.kick(0);
            guest.start(0, 8);
        }
    }
}

/// Virtio 1.2, section 5: by its number.
fn device(kind: u32) -> Option<Arc<Mutex<dyn VirtioDevice>>> {
    let path = |name: &str| -> PathBuf { DIRECTORY.path().join(name) };
    Some(match kind {
        2 => {
            let disk = Backend::open(&[path("disk")], false).expect("it is there");
            Arc::new(Mutex::new(Block::new(disk, "fuzz", Box::new(|_| {})).ok()?))
        }
        5 => Arc::new(Mutex::new(Balloon::new(Box::new(Nothing)).ok()?)),
        19 => {
            let socket = path("v");
            let _ = std::fs::remove_file(&socket);
            Arc::new(Mutex::new(Vsock::new(3, &socket).ok()?))
        }
        _ => Arc::new(Mutex::new(Rng::new().ok()?)),
    })
}

struct Nothing;

impl Reclaim for Nothing {
    fn reclaim(&mut self, _: GuestAddress, _: u32) -> std::io::Result<()> {
        Ok(())
    }
}
