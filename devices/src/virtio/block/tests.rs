//! The disk as a guest sees it (virtio 1.2, section 5.2).

use std::{
    fs,
    os::unix::fs::{FileExt, MetadataExt},
    path::PathBuf,
    sync::{Mutex, mpsc},
};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::{
    testing::Guest,
    virtio::mmio::{F_EVENT_IDX, F_INDIRECT_DESC},
};

mod throttle;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// A guest with a disk, and the host's side of it.
struct Setup {
    guest: Guest,
    faults: mpsc::Receiver<BackendFault>,
    paths: Vec<PathBuf>,
    _dir: TempDir,
}

impl Setup {
    fn writable(content: &[u8]) -> Self {
        Self::new(&[content], false)
    }

    fn new(contents: &[&[u8]], read_only: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> = (0..contents.len()).map(|n| dir.path().join(n.to_string())).collect();
        for (path, content) in paths.iter().zip(contents) {
            fs::write(path, content).unwrap();
        }
        let mut setup = Self::on(paths, read_only, dir);
        setup.guest.start(F_EVENT_IDX | F_INDIRECT_DESC, 256);
        setup
    }

    fn on(paths: Vec<PathBuf>, read_only: bool, dir: TempDir) -> Self {
        let backend = Backend::open(&paths, read_only).unwrap();
        let (sender, faults) = mpsc::channel();
        let handler = Box::new(move |fault| sender.send(fault).unwrap());
        let guest = Guest::new(Block::new(backend, "a-name-that-is-too-long", handler).unwrap());
        Setup { guest, faults, paths, _dir: dir }
    }

    /// Makes a request whose parts are cut into buffers of at most `cut` bytes. Returns status, data and used length.
    fn request(&mut self, kind: u32, sector: u64, out: &[u8], data_in: u32, cut: u32) -> (u8, Vec<u8>, u32) {
        let mut readable = [kind.to_le_bytes(), [0; 4]].concat();
        readable.extend(sector.to_le_bytes());
        readable.extend(out);
        self.guest.free_memory();
        let from = self.guest.place(&readable);
        let to = self.guest.place(&vec![0xee; data_in as usize + 1]);
        let mut buffers = Vec::new();
        for (start, length, writable) in [(from, readable.len() as u32, false), (to, data_in + 1, true)] {
            let mut at = 0;
            while at < length {
                let now = cut.min(length - at);
                buffers.push((start + u64::from(at), now, writable));
                at += now;
            }
        }
        self.guest.add(0, &buffers).unwrap();
        self.guest.kick(0);
        let (_, written) = self.guest.used(0).expect("the request was not served");
        let mut data = self.guest.bytes(to, data_in as usize + 1);
        (data.pop().unwrap(), data, written)
    }

    fn file(&self) -> Vec<u8> {
        fs::read(&self.paths[0]).unwrap()
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|n| (n % 251) as u8 + 1).collect()
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

#[test]
fn s5_2_4_the_configuration_describes_the_disk() {
    let setup = Setup::writable(&[0; 5 * 512]);
    let word = |at: u64| setup.guest.read(0x100 + at);
    assert_eq!((word(0), word(4)), (5, 0), "capacity in sectors");
    assert_eq!((word(8), word(12), word(20)), (256 << 10, 254, 512));
    assert_eq!((word(36), word(40), word(44)), (1 << 22, 32, 8));
    assert_eq!((word(48), word(52), word(56)), (1 << 15, 32, 1));
    assert_eq!(word(60), 0);
    let mut wide = [0xff; 8];
    setup.guest.transport.read(0x100 + 56, &mut wide);
    assert_eq!(wide, [1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn s5_2_3_features_follow_the_disk() {
    let mut writable = Setup::writable(&[0; 512]);
    let mut read_only = Setup::new(&[&[0; 512]], true);
    let both = F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH;
    let low = u64::from(u16::MAX);
    assert_eq!(writable.guest.offered_features() & low, both | F_DISCARD | F_WRITE_ZEROES);
    assert_eq!(read_only.guest.offered_features() & low, both | F_RO);
}

#[test]
fn s5_2_6_what_is_written_is_read_back_and_in_the_file() {
    let mut setup = Setup::writable(&pattern(8 * 512));
    let data = vec![0xab; 1024];
    assert_eq!(setup.request(OUT, 3, &data, 0, 4096), (OK, vec![], 1));
    assert_eq!(setup.request(IN, 3, &[], 1024, 4096), (OK, data.clone(), 1025));
    let mut expected = pattern(8 * 512);
    expected[3 * 512..5 * 512].copy_from_slice(&data);
    assert_eq!(setup.file(), expected);
    assert_eq!(setup.request(IN, 0, &[], 4096, 4096).1, expected);
}

#[test]
fn s2_7_4_3_requests_do_not_depend_on_their_framing() {
    let mut setup = Setup::writable(&pattern(8 * 512));
    for cut in [7, 16, 17, 100, 513] {
        let data = vec![cut as u8; 512];
        assert_eq!(setup.request(OUT, 1, &data, 0, cut).0, OK);
        assert_eq!(setup.request(IN, 1, &[], 512, cut), (OK, data, 513));
    }
}

#[test]
fn s5_2_6_2_requests_beyond_the_disk_are_io_errors() {
    let mut setup = Setup::writable(&pattern(4 * 512));
    for sector in [3, 4, u64::MAX / 512, u64::MAX] {
        assert_eq!(setup.request(IN, sector, &[], 1024, 4096).0, IOERR, "read at sector {sector}");
        assert_eq!(setup.request(OUT, sector, &[1; 1024], 0, 4096).0, IOERR, "write at sector {sector}");
    }
    assert_eq!(setup.request(IN, 0, &[], 100, 4096).0, IOERR, "not a whole sector");
    assert_eq!(setup.request(OUT, 0, &[1; 100], 0, 4096).0, IOERR, "not a whole sector");
    assert_eq!(setup.file(), pattern(4 * 512));
    assert!(setup.faults.try_recv().is_err(), "that is the guest's fault and not the host's");
}

#[test]
fn s5_2_6_2_unknown_requests_are_unsupported() {
    let mut setup = Setup::writable(&[0; 512]);
    for kind in [2, 3, 5, 14, u32::MAX] {
        assert_eq!(setup.request(kind, 0, &[], 512, 4096).0, UNSUPP);
    }
}

#[test]
fn s5_2_6_2_a_read_only_disk_refuses_writes() {
    let mut setup = Setup::new(&[&pattern(512)], true);
    assert_eq!(setup.request(OUT, 0, &[0; 512], 0, 4096).0, IOERR);
    assert_eq!(setup.request(DISCARD, 0, &range(0, 1, 0), 0, 4096).0, IOERR);
    assert_eq!(setup.request(WRITE_ZEROES, 0, &range(0, 1, 0), 0, 4096).0, IOERR);
    assert_eq!(setup.request(FLUSH, 0, &[], 0, 4096).0, OK);
    assert_eq!(setup.file(), pattern(512));
}

#[test]
fn s5_2_6_get_id_gives_twenty_bytes() {
    let mut setup = Setup::writable(&[0; 512]);
    assert_eq!(setup.request(GET_ID, 0, &[], 20, 4096), (OK, b"a-name-that-is-too-l".to_vec(), 21));
    assert_eq!(setup.request(GET_ID, 0, &[], 6, 4096), (OK, b"a-name".to_vec(), 7));
}

#[test]
fn s5_2_6_write_zeroes_zeroes_with_and_without_unmap() {
    for flags in [0, 1] {
        let mut setup = Setup::writable(&pattern(64 * 512));
        let ranges = [range(1, 2, flags), range(8, 16, flags)].concat();
        assert_eq!(setup.request(WRITE_ZEROES, 0, &ranges, 0, 4096).0, OK);
        let mut expected = pattern(64 * 512);
        expected[512..3 * 512].fill(0);
        expected[8 * 512..24 * 512].fill(0);
        assert_eq!(setup.file(), expected);
    }
}

#[test]
fn s5_2_6_discard_gives_storage_back_and_keeps_the_length() {
    let mut setup = Setup::writable(&pattern(1 << 20));
    let before = fs::metadata(&setup.paths[0]).unwrap().blocks();
    assert_eq!(setup.request(DISCARD, 0, &range(0, 1024, 0), 0, 4096).0, OK);
    let after = fs::metadata(&setup.paths[0]).unwrap();
    assert_eq!(after.len(), 1 << 20);
    // A filesystem of the host that punches no holes (discard is a hint there) keeps its blocks.
    assert!(after.blocks() <= before);
    assert_eq!(setup.file()[1024 * 512..], pattern(1 << 20)[1024 * 512..]);
}

#[test]
fn s5_2_6_2_bad_ranges_change_nothing() {
    let mut setup = Setup::writable(&pattern(8 * 512));
    let good = range(0, 1, 0);
    let many = good.repeat(33);
    let cases: [(&str, u32, Vec<u8>, u8); 7] = [
        ("beyond the disk", WRITE_ZEROES, range(7, 2, 0), IOERR),
        ("overflow", WRITE_ZEROES, range(u64::MAX, 1, 0), IOERR),
        ("too long", WRITE_ZEROES, range(0, 1 << 16, 0), IOERR),
        ("not a whole range", WRITE_ZEROES, good[..15].to_vec(), IOERR),
        ("too many", WRITE_ZEROES, many, IOERR),
        ("reserved flag", WRITE_ZEROES, range(0, 1, 2), UNSUPP),
        ("unmap on a discard", DISCARD, range(0, 1, 1), UNSUPP),
    ];
    for (what, kind, bad, status) in cases {
        assert_eq!(setup.request(kind, 0, &bad, 0, 4096).0, status, "{what}");
        if bad.len() % 16 == 0 {
            assert_eq!(
                setup.request(kind, 0, &[good.clone(), bad].concat(), 0, 4096).0,
                status,
                "{what}, second"
            );
        }
    }
    assert_eq!(setup.file(), pattern(8 * 512));
}

#[test]
fn several_files_are_one_disk_each_padded_to_a_sector() {
    let (a, b, c) = (pattern(700), pattern(0), pattern(1024));
    let mut setup = Setup::new(&[&a, &b, &c, &[9]], true);
    let mut expected = a.clone();
    expected.resize(1024, 0);
    expected.extend(&c);
    expected.push(9);
    expected.resize(5 * 512, 0);
    assert_eq!(setup.guest.read(0x100), 5);
    assert_eq!(setup.request(IN, 0, &[], 5 * 512, 4096), (OK, expected.clone(), 5 * 512 + 1));
    for sector in 0..5 {
        let at = sector as usize * 512;
        assert_eq!(setup.request(IN, sector, &[], 512, 100).1, expected[at..at + 512]);
    }
}

#[test]
fn disks_that_cannot_be_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let odd = dir.path().join("odd");
    fs::write(&odd, [0; 513]).unwrap();
    assert!(matches!(Backend::open(&[&odd], false), Err(OpenError::Length { length: 513, .. })));
    assert!(matches!(Backend::open(&[&odd, &odd], false), Err(OpenError::FileCount(2))));
    assert!(matches!(Backend::open::<PathBuf>(&[], true), Err(OpenError::FileCount(0))));
    assert!(matches!(Backend::open(&[dir.path()], true), Err(OpenError::Kind { .. })));
    let missing = Backend::open(&[dir.path().join("missing")], true).unwrap_err();
    assert!(missing.to_string().contains("missing"), "{missing}");
}

#[test]
fn a_full_host_disk_is_an_io_error_and_is_told_to_the_machine() {
    // /dev/full takes no byte. Its length is 0, so the disk is a file that is exchanged for it after the start.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    fs::write(&path, [0; 512]).unwrap();
    let mut backend = Backend::open(&[&path], false).unwrap();
    backend.replace_file_for_test(fs::File::options().read(true).write(true).open("/dev/full").unwrap());
    let faults = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&faults);
    let handler = Box::new(move |fault| seen.lock().unwrap().push(fault));
    let mut guest = Guest::new(Block::new(backend, "", handler).unwrap());
    guest.start(0, 16);
    let (sender, receiver) = mpsc::channel();
    drop(sender);
    let mut setup = Setup { guest, faults: receiver, paths: vec![path.clone()], _dir: dir };
    assert_eq!(setup.request(OUT, 0, &[1; 512], 0, 4096).0, IOERR);
    let expected = BackendFault { errno: libc::ENOSPC, operation: "write", path, offset: 0 };
    assert_eq!(*faults.lock().unwrap(), [expected]);
    assert_eq!(setup.guest.status(), 15, "the device itself is well");
}

#[test]
fn a_file_shortened_below_the_machine_is_an_io_error_and_not_zeros() {
    let mut setup = Setup::writable(&pattern(8 * 512));
    fs::File::options().write(true).open(&setup.paths[0]).unwrap().set_len(512).unwrap();
    assert_eq!(setup.request(IN, 0, &[], 512, 4096).0, OK);
    assert_eq!(setup.request(IN, 0, &[], 1024, 4096).0, IOERR);
    assert_eq!(setup.faults.try_recv().unwrap().offset, 512);
}

#[test]
fn s2_1_2_a_request_without_header_or_status_stops_the_device() {
    for buffers in [vec![(0x20_0000, 15, false), (0x20_1000, 1, true)], vec![(0x20_0000, 16, false)]] {
        let mut setup = Setup::writable(&[0; 512]);
        setup.guest.add(0, &buffers).unwrap();
        setup.guest.kick(0);
        assert_eq!(setup.guest.status(), 15 | 64);
    }
}

#[test]
fn many_requests_are_served_by_one_kick() {
    let mut setup = Setup::writable(&pattern(80 * 512));
    let guest = &mut setup.guest;
    for sector in 0..80u64 {
        let header = guest.place(&[[0; 8], sector.to_le_bytes()].concat());
        let data = guest.allocate(513);
        guest.add(0, &[(header, 16, false), (data, 513, true)]).unwrap();
    }
    guest.kick(0);
    assert_eq!(std::iter::from_fn(|| guest.used(0)).count(), 80);
    assert_eq!(guest.take_interrupt(), 1);
}

#[test]
fn guest_pages_that_a_read_fills_are_marked_dirty() {
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, bitmap::Bitmap};
    let mut setup = Setup::writable(&pattern(8 * 512));
    setup.request(IN, 0, &[], 4096, 4096);
    let memory = &setup.guest.memory;
    let region = memory.find_region(vm_memory::GuestAddress(0x10_0000)).unwrap();
    assert!(region.bitmap().dirty_at(0x10_0010));
    assert!(!region.bitmap().dirty_at(0x20_0000));
}

/// One step of the random test.
#[derive(Clone, Debug)]
enum Step {
    Write(u64, u32, u8),
    Read(u64, u32),
    Zero(u64, u32, bool),
    Flush,
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0u64..20, 0u32..8, any::<u8>()).prop_map(|(at, n, byte)| Step::Write(at, n, byte)),
        (0u64..20, 0u32..8).prop_map(|(at, n)| Step::Read(at, n)),
        (0u64..20, 0u32..8, any::<bool>()).prop_map(|(at, n, unmap)| Step::Zero(at, n, unmap)),
        Just(Step::Flush),
        Just(Step::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The disk is an array of sectors, whatever is asked in whatever framing.
    #[test]
    fn a_disk_is_an_array_of_sectors(steps in prop::collection::vec((step(), 40u32..5000), 1..40)) {
        let mut model = pattern(16 * 512);
        let mut setup = Setup::writable(&model);
        for (step, cut) in steps {
            let place = |at: u64, n: u32| {
                let (from, to) = (at as usize * 512, (at as usize + n as usize) * 512);
                (to <= 16 * 512).then_some(from..to)
            };
            match step {
                Step::Write(at, n, byte) => {
                    let data = vec![byte; n as usize * 512];
                    let status = setup.request(OUT, at, &data, 0, cut).0;
                    match place(at, n) {
                        Some(place) => { prop_assert_eq!(status, OK); model[place].fill(byte); }
                        None => prop_assert_eq!(status, IOERR),
                    }
                }
                Step::Read(at, n) => {
                    let (status, data, _) = setup.request(IN, at, &[], n * 512, cut);
                    match place(at, n) {
                        Some(place) => prop_assert_eq!((status, &data[..]), (OK, &model[place])),
                        None => prop_assert_eq!(status, IOERR),
                    }
                }
                Step::Zero(at, n, unmap) => {
                    let status = setup.request(WRITE_ZEROES, 0, &range(at, n, unmap.into()), 0, cut).0;
                    match place(at, n) {
                        Some(place) => { prop_assert_eq!(status, OK); model[place].fill(0); }
                        None => prop_assert_eq!(status, IOERR),
                    }
                }
                Step::Flush => prop_assert_eq!(setup.request(FLUSH, 0, &[], 0, cut).0, OK),
                Step::Reset => setup.guest.start(F_EVENT_IDX, 256),
            }
        }
        prop_assert_eq!(setup.file(), model);
    }
}

#[test]
fn writes_are_in_the_file_before_their_status_says_so() {
    let mut setup = Setup::writable(&[0; 4096]);
    let file = fs::File::open(&setup.paths[0]).unwrap();
    for byte in 1..50 {
        setup.request(OUT, 0, &[byte; 512], 0, 512);
        let mut seen = [0; 512];
        file.read_exact_at(&mut seen, 0).unwrap();
        assert_eq!(seen, [byte; 512]);
    }
}

#[test]
fn a_round_of_requests_ends_when_much_was_moved() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    fs::File::create(&path).unwrap().set_len(64 << 20).unwrap();
    let backend = Backend::open(&[path], false).unwrap();
    let device = Arc::new(Mutex::new(Block::new(backend, "disk", Box::new(|_| {})).unwrap()));
    let mut guest = Guest::with_shared(Arc::clone(&device) as Arc<Mutex<dyn VirtioDevice>>);
    guest.start(0, 256);
    // Each zeroes 16 MiB, the most that one range may have.
    let mut request = [WRITE_ZEROES.to_le_bytes(), [0; 4]].concat();
    request.extend([0; 8]);
    request.extend(range(0, 1 << 15, 1));
    let (request, status) = (guest.place(&request), guest.place(&[0xee]));
    for _ in 0..20 {
        guest.add(0, &[(request, 32, false), (status, 1, true)]).unwrap();
    }
    device.lock().unwrap().process_queue();
    let served = std::iter::from_fn(|| guest.used(0)).count() as u64;
    assert_eq!(served, BYTES_PER_ROUND / (16 << 20));
    guest.run();
    assert_eq!(std::iter::from_fn(|| guest.used(0)).count() as u64, 20 - served, "the rest comes by itself");
}
