//! The code and FORMAT.md say the same, and no file makes the reader do more than refuse it.

use proptest::prelude::*;

use devices::virtio::state::Detail;

use super::*;
use crate::snapshot::{
    save::encode as encode_state,
    sections::{KNOWN, State},
};

const SPECIFICATION: &str = include_str!("../FORMAT.md");
/// A machine of one vCPU with a console and a random number generator, suspended in the test host.
const FIXTURE_1: &[u8] = include_bytes!("../../../tests/fixtures/state-1");

/// Linux on one vCPU with a console, vsock, a random number generator and a balloon.
const FIXTURE_2: &[u8] = include_bytes!("../../../tests/fixtures/state-2");

/// The same, with a list of what is not zeros.
const FIXTURE_3: &[u8] = include_bytes!("../../../tests/fixtures/state-3");

fn header_json() -> Vec<u8> {
    decode(FIXTURE_1).unwrap().0.to_json().unwrap()
}

fn sections_1() -> Vec<Section<'static>> {
    decode(FIXTURE_1).unwrap().1
}

/// The rows of the table whose head begins with these columns, as trimmed cells.
fn table(under: &str, columns: &str) -> Vec<Vec<String>> {
    let from = SPECIFICATION.find(under).unwrap();
    let from = from + SPECIFICATION[from..].find(columns).unwrap();
    let rows = SPECIFICATION[from..].lines().skip(2).take_while(|line| line.starts_with('|'));
    rows.map(|row| row.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect()).collect()
}

/// Offset and length of each row, which follow one another.
fn layout(under: &str) -> Vec<(usize, usize)> {
    let rows = table(under, "| offset | bytes | what |");
    let fields: Vec<(usize, usize)> =
        rows.iter().map(|row| (row[0].parse().unwrap(), row[1].parse().unwrap())).collect();
    for pair in fields.windows(2) {
        assert_eq!(pair[0].0 + pair[0].1, pair[1].0, "{under}");
    }
    fields
}

/// The field's bytes as a number.
fn field(bytes: &[u8], (offset, length): (usize, usize)) -> u64 {
    let mut word = [0; 8];
    word[..length].copy_from_slice(&bytes[offset..offset + length]);
    u64::from_le_bytes(word)
}

#[test]
fn the_specified_checksum_is_the_one_used() {
    assert!(SPECIFICATION.contains("0xcbf43926"));
    assert_eq!(crc32fast::hash(b"123456789"), 0xcbf4_3926);
}

#[test]
fn the_prelude_is_as_specified() {
    let file = encode(&header_json(), &[]);
    let fields = layout("### Prelude");
    assert_eq!(fields.iter().map(|field| field.1).sum::<usize>(), PRELUDE_BYTES);
    let [magic, version, header, length, header_crc, crc] = fields.try_into().unwrap();
    assert_eq!(file[magic.0..magic.1], *b"flysnap\x1a");
    assert_eq!(field(&file, version), u64::from(VERSION));
    assert_eq!(field(&file, header), header_json().len() as u64);
    assert_eq!(field(&file, length), file.len() as u64);
    assert_eq!(field(&file, header_crc), u64::from(crc32fast::hash(&header_json())));
    assert_eq!(field(&file, crc), u64::from(crc32fast::hash(&file[..crc.0])));
}

#[test]
fn a_sections_head_is_as_specified() {
    let file = encode(&header_json(), &[Section { id: 77, version: 9, payload: b"hello" }]);
    let head = &file[PRELUDE_BYTES + header_json().len()..];
    let fields = layout("### Sections");
    assert_eq!(fields.iter().map(|field| field.1).sum::<usize>(), HEAD_BYTES);
    let [id, version, length, payload_crc, crc] = fields.try_into().unwrap();
    assert_eq!([field(head, id), field(head, version), field(head, length)], [77, 9, 5]);
    assert_eq!(field(head, payload_crc), u64::from(crc32fast::hash(b"hello")));
    assert_eq!(field(head, crc), u64::from(crc32fast::hash(&head[..crc.0])));
    assert_eq!(head[HEAD_BYTES..], *b"hello");
}

#[test]
fn the_header_has_the_specified_fields() {
    let value: serde_json::Value = serde_json::from_slice(&header_json()).unwrap();
    let mut there: Vec<String> = value.as_object().unwrap().keys().map(|key| format!("`{key}`")).collect();
    let mut specified: Vec<String> =
        table("### Header", "| field | what |").into_iter().map(|row| row[0].clone()).collect();
    there.sort();
    specified.sort();
    assert_eq!(there, specified);
}

#[test]
fn the_sections_and_their_versions_are_the_specified_ones() {
    let rows = table("### Sections", "| id | name | version |");
    let specified: Vec<(u32, String, u32)> =
        rows.iter().map(|row| (row[0].parse().unwrap(), row[1].clone(), row[2].parse().unwrap())).collect();
    let known: Vec<(u32, String, u32)> =
        crate::snapshot::sections::KNOWN.iter().map(|it| (it.0, it.1.to_owned(), it.2)).collect();
    assert_eq!(specified, known);
}

#[test]
fn the_refusals_are_the_specified_ones() {
    let text = String::new;
    let all = [
        Refusal::Missing(text()),
        Refusal::Truncated { what: text(), wanted: 0, found: 0 },
        Refusal::Corrupted(text()),
        Refusal::TooNew(text()),
        Refusal::OtherCpu(text()),
        Refusal::OtherKernel(text()),
        Refusal::ChangedDisk(text()),
        Refusal::OtherMachine(text()),
        Refusal::Host(text()),
    ];
    let specified = table("## Refusals", "| name | when |").into_iter().map(|row| row[0].clone());
    assert_eq!(all.map(|refusal| refusal.name().to_owned()).to_vec(), specified.collect::<Vec<_>>());
    assert!(all_names_in_help());
}

fn all_names_in_help() -> bool {
    table("## Refusals", "| name | when |").iter().all(|row| crate::args::HELP.contains(&row[0]))
}

#[test]
fn a_snapshot_of_version_1_is_understood() {
    let (header, sections) = decode(FIXTURE_1).unwrap();
    let state = State::decode(&sections).unwrap();
    assert_eq!((header.flyrun.as_str(), header.spec.cpus, header.memory.bytes), ("0.1.0", 1, 16 << 20));
    assert_eq!(header.cpu.vendor, "AuthenticAMD");
    assert_eq!((state.vcpus.len(), state.devices.len(), state.devices[0].device_type), (1, 1, 4));
    let vcpu = &state.vcpus[0];
    assert_eq!(vcpu.sregs.cr3, 0x9000, "the boot code's page tables");
    assert!(vcpu.regs.rip >= 0x20_0000 && vcpu.msrs.len() > 40 && vcpu.tsc_khz > 1000);
    assert!(state.console.is_some() && state.machine.clock_ns > 0);
    assert_eq!(state.memory.extents, None);
    // And written again, the sections are the same bytes.
    let again = encode_state(&header, &state).unwrap();
    let (header_again, sections_again) = decode(&again).unwrap();
    assert_eq!(header_again, header);
    assert!(sections_again == sections, "the sections have changed");
}

#[test]
fn a_balloon_is_understood_from_version_2_on() {
    let (header, sections) = decode(FIXTURE_2).unwrap();
    assert!(header.spec.balloon);
    let versions: Vec<u32> = sections.iter().filter(|it| it.id == 3).map(|it| it.version).collect();
    assert_eq!(versions, [1, 1, 2]);
    let state = State::decode(&sections).unwrap();
    let balloon = state.devices[2].active.as_ref().unwrap();
    assert_eq!((state.devices[2].device_type, balloon.rings.len()), (5, 3));
    assert_eq!(balloon.detail, Detail::Balloon { actual: 0, poison: None });
    let again = encode_state(&header, &state).unwrap();
    assert!(decode(&again).unwrap().1 == sections, "the sections have changed");
}

#[test]
fn where_memory_is_not_zeros_is_told_from_version_2_on() {
    let versions = |sections: &[Section<'_>]| -> Vec<u32> {
        sections.iter().filter(|it| it.id == 5).map(|it| it.version).collect()
    };
    let (_, old) = decode(FIXTURE_2).unwrap();
    assert_eq!((versions(&old), State::decode(&old).unwrap().memory.data), (vec![1], None));
    let (header, sections) = decode(FIXTURE_3).unwrap();
    assert_eq!(versions(&sections), [2]);
    let state = State::decode(&sections).unwrap();
    let parts = state.memory.data.clone().unwrap();
    let pages: u64 = parts.iter().map(|part| part.1).sum();
    assert!(pages > 1000 && pages < header.memory.bytes / 4096, "{parts:?}");
    let again = encode_state(&header, &state).unwrap();
    assert!(decode(&again).unwrap().1 == sections, "the sections have changed");
}

#[test]
fn newer_versions_are_refused_as_such() {
    let known = sections_1();
    let refused = |sections: &[Section<'_>]| {
        let file = encode(&header_json(), sections);
        let (_, sections) = decode(&file).unwrap();
        State::decode(&sections).unwrap_err()
    };
    for index in 0..known.len() {
        let mut sections = known.clone();
        let newest = KNOWN.iter().find(|known| known.0 == sections[index].id).unwrap().2;
        sections[index].version = newest + 1;
        let refusal = refused(&sections);
        assert!(
            refusal.name() == "too-new"
                && refusal.to_string().contains(&format!("has version {}", newest + 1)),
            "{refusal}"
        );
        sections[index].version = 0;
        assert_eq!(refused(&sections).name(), "corrupted");
        sections[index].id = 99;
        assert_eq!(refused(&sections).name(), "too-new");
    }
    let mut file = FIXTURE_1.to_vec();
    file[8] = 2;
    repair(&mut file, 0);
    assert_eq!(decode(&file).unwrap_err().name(), "too-new");
    let mut header: serde_json::Value = serde_json::from_slice(&header_json()).unwrap();
    header["flyrun"] = "9.9".into();
    header["a_new_fact"] = 1.into();
    assert!(decode(&encode(header.to_string().as_bytes(), &known)).is_ok(), "new facts are ignored");
    header["spec"]["a_new_part"] = 1.into();
    let refusal = decode(&encode(header.to_string().as_bytes(), &known)).unwrap_err();
    assert!(refusal.name() == "too-new" && refusal.to_string().contains("flyrun 9.9"), "{refusal}");
}

#[test]
fn a_file_cut_anywhere_is_truncated() {
    for end in (0..FIXTURE_1.len()).step_by(7).chain(FIXTURE_1.len() - 30..FIXTURE_1.len()) {
        assert_eq!(decode(&FIXTURE_1[..end]).unwrap_err().name(), "truncated", "{end}");
    }
    assert_eq!(decode(&[FIXTURE_1, b"x"].concat()).unwrap_err().name(), "corrupted");
}

#[test]
fn every_flipped_bit_is_noticed() {
    let mut file = FIXTURE_1.to_vec();
    for at in 0..file.len() {
        file[at] ^= 1 << (at % 8);
        // The lengths and versions have a checksum too, so that nothing of them is believed.
        let name = decode(&file).unwrap_err().name();
        assert!(matches!(name, "corrupted"), "{at}: {name}");
        file[at] ^= 1 << (at % 8);
    }
}

#[test]
fn sections_that_are_missing_doubled_or_too_many_are_refused() {
    let known = sections_1();
    for index in 0..known.len() {
        let mut fewer = known.clone();
        let section = fewer.remove(index);
        // A machine may have no device and no console.
        assert_eq!(State::decode(&fewer).is_err(), !matches!(section.id, 3 | 4), "{}", section.id);
        let mut more = known.clone();
        more.push(section.clone());
        assert_eq!(State::decode(&more).is_err(), !matches!(section.id, 2 | 3), "{}", section.id);
    }
    let many = vec![Section { id: 3, version: 1, payload: &[] }; MAX_SECTIONS + 1];
    assert_eq!(decode(&encode(&header_json(), &many)).unwrap_err().name(), "corrupted");
    let vcpu = known.iter().find(|section| section.id == 2).unwrap().clone();
    assert!(State::decode(&[known, vec![vcpu; 32]].concat()).is_err(), "33 vCPUs");
}

#[test]
fn sections_are_taken_in_any_order_and_never_for_one_another() {
    let mut sections = sections_1();
    sections.reverse();
    assert!(State::decode(&sections).is_ok());
    for (one, other) in [(0, 1), (1, 2), (2, 3), (3, 4), (0, 4)] {
        let mut swapped = sections.clone();
        (swapped[one].payload, swapped[other].payload) = (swapped[other].payload, swapped[one].payload);
        // Whatever comes of it, it is no panic; most is refused.
        let _ = State::decode(&swapped);
    }
}

/// Makes all checksums right again, as far as the lengths lead.
fn repair(file: &mut [u8], header_bytes: usize) {
    if header_bytes > 0 {
        let crc = crc32fast::hash(&file[PRELUDE_BYTES..PRELUDE_BYTES + header_bytes]);
        file[24..28].copy_from_slice(&crc.to_le_bytes());
    }
    let crc = crc32fast::hash(&file[..28]);
    file[28..32].copy_from_slice(&crc.to_le_bytes());
}

/// Whatever the bytes of a section are, its checksum is right.
fn with_payload(index: usize, payload: &[u8]) -> Vec<u8> {
    let mut sections = sections_1();
    sections[index].payload = payload;
    encode(&header_json(), &sections)
}

#[test]
fn tens_of_thousands_of_changes_with_right_checksums_are_refused_or_a_state() {
    let (mut refused, mut taken) = (0, 0);
    for (index, section) in sections_1().iter().enumerate() {
        let mut payload = section.payload.to_vec();
        // XSAVE areas and APIC pages are kilobytes of the same.
        let step = if section.id == 2 { 5 } else { 1 };
        for at in (0..payload.len()).step_by(step) {
            for flip in [1, 0x80, 0xff] {
                payload[at] ^= flip;
                let file = with_payload(index, &payload);
                match decode(&file).and_then(|(_, sections)| State::decode(&sections)) {
                    Ok(_) => taken += 1,
                    Err(refusal) => {
                        assert_eq!(refusal.name(), "corrupted");
                        refused += 1;
                    }
                }
                payload[at] ^= flip;
            }
        }
        for end in (0..payload.len()).step_by(3) {
            let file = with_payload(index, &payload[..end]);
            let (_, sections) = decode(&file).unwrap();
            assert!(State::decode(&sections).is_err(), "section {index} cut at {end}");
        }
    }
    assert!(refused > 100 && refused + taken > 10_000, "{refused} refused, {taken} taken");
}

proptest! {
    #[test]
    fn any_bytes_are_refused_or_a_state(bytes in prop::collection::vec(any::<u8>(), 0..400), index in 0usize..5) {
        let _ = decode(&bytes);
        let file = with_payload(index, &bytes);
        let _ = decode(&file).and_then(|(_, sections)| State::decode(&sections));
    }
}
