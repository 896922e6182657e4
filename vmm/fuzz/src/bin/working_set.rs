//! The file `working-set` with any bytes, as they are and with a right checksum: what is read ahead lies in memory, and is bounded.
#![no_main]
#![allow(clippy::expect_used, reason = "only fuzzers run this")]

use std::{fs::File, io::Write, ops::Range, sync::LazyLock};

use devices::virtio::Memory;
use libfuzzer_sys::fuzz_target;
use vmm::{
    memory::reserve,
    snapshot::{
        pages::discard,
        working_set::{Pages, WorkingSet},
    },
};

const MIB: u32 = 4;
/// Once: guest memory lives as long as its process.
static MEMORY: LazyLock<Memory> = LazyLock::new(|| reserve(MIB).expect("there is memory"));
/// Of the checksum, which the head ends with.
const CHECKSUM: usize = 4;
/// Of a list of nothing: four lists without an element.
const NOTHING: usize = 4;
const MAPPED: [Range<u64>; 2] = [0..1 << 20, 2 << 20..3 << 20];

fuzz_target!(|data: &[u8]| {
    read(data);
    let mut file = written(&WorkingSet { first: Pages::default(), rest: Pages::default() });
    file.truncate(file.len() - NOTHING - CHECKSUM);
    file.extend(crc32fast::hash(data).to_le_bytes());
    file.extend(data);
    read(&file);
});

fn read(bytes: &[u8]) {
    let mut file = tempfile::tempfile().expect("there is room for a file");
    file.write_all(bytes).expect("it can be written");
    let Some(set) = WorkingSet::read_from(&from_start(&file)) else { return };
    assert_eq!(WorkingSet::read_from(&from_start(&reopened(&written(&set)))).as_ref(), Some(&set));
    let _ = (set.first.count(), set.rest.count(), set.is_outdated(&set.first));
    let memory = &*MEMORY;
    discard(memory, 0..u64::from(MIB) << 20, false).expect("its pages can be given back");
    let (first, rest) = set.ahead(memory, &MAPPED);
    first.make();
    let (soon, later) = rest.ahead(&set).split();
    soon.make();
    later.make();
    let again = WorkingSet::new(set.first.clone(), &set.rest).all_first();
    assert_eq!(again.rest.count(), 0);
}

fn written(set: &WorkingSet) -> Vec<u8> {
    let mut file = tempfile::tempfile().expect("there is room for a file");
    set.write_to(&mut file).expect("it can be written");
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut from_start(&file), &mut bytes).expect("it can be read");
    bytes
}

fn reopened(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().expect("there is room for a file");
    file.write_all(bytes).expect("it can be written");
    file
}

fn from_start(file: &File) -> File {
    let mut file = file.try_clone().expect("there are descriptors");
    std::io::Seek::rewind(&mut file).expect("a file has a start");
    file
}
