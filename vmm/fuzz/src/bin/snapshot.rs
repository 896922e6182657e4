//! The file `state` with any bytes: as they are, as one of its sections with a right checksum, and as a device's state that a
//! device goes on from.
#![no_main]

use std::sync::{Arc, Mutex};

use devices::{
    testing::Guest,
    virtio::{VirtioDevice, rng::Rng},
};
use libfuzzer_sys::fuzz_target;
use vmm::snapshot::{
    format::{Section, decode, encode},
    identity::OpenFiles,
    restore::check,
    sections::State,
};

/// A snapshot that a guest was really resumed from.
const GOOD: &[u8] = include_bytes!("../../../tests/fixtures/state-1");

fuzz_target!(|data: &[u8]| {
    let _ = decode(data);
    let Some((which, bytes)) = data.split_first() else { return };
    let Ok((header, mut sections)) = decode(GOOD) else { return };
    let index = usize::from(which & 0x7f) % sections.len();
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
        go_on(&state);
        let nothing = OpenFiles { kernel: None, disks: vec![] };
        let _ = check(&header, &state, &header.spec, &nothing);
    }
    // And a header that says what it likes.
    let _ = decode(&encode(bytes, &[Section { id: 1, version: 1, payload: bytes }]));
});

/// The devices go on from what was read, and the guest uses them.
fn go_on(state: &State) {
    let device =
        || Rng::new().ok().map(|device| Arc::new(Mutex::new(device)) as Arc<Mutex<dyn VirtioDevice>>);
    let Some(first) = device() else { return };
    let mut guest = Guest::with_shared(first);
    guest.start(0, 8);
    for state in &state.devices {
        let Some(next) = device() else { return };
        if let Ok(mut guest) = guest.continued(next, state) {
            guest.run();
            guest.kick(0);
            guest.start(0, 8);
        }
    }
}
