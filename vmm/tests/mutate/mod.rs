//! Files `state` that nobody has written: a good one with a few changes, drawn by a number.
#![allow(dead_code, reason = "each test binary uses some of it")]

use serde_json::Value;
use vmm::snapshot::format::{self, PRELUDE_BYTES, Section};

/// SplitMix64: the same numbers from the same seed, everywhere.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is not zero.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        (0..self.below(most) + 1).map(|_| self.next() as u8).collect()
    }

    fn range(&mut self, end: usize) -> std::ops::Range<usize> {
        let (one, other) = (self.below(end + 1), self.below(end + 1));
        one.min(other)..one.max(other)
    }
}

/// The file with a few changes that leave the checksums wrong.
pub fn damaged(good: &[u8], random: &mut Random) -> Vec<u8> {
    let mut file = good.to_vec();
    for _ in 0..random.below(3) + 1 {
        if file.is_empty() {
            break;
        }
        let at = random.below(file.len());
        match random.below(8) {
            0 | 1 => file[at] ^= 1 << random.below(8),
            2 => file.truncate(at),
            3 => {
                let more = random.bytes(64);
                file.extend(more);
            }
            4 => {
                let end = file.len().min(at + 512);
                file[at..end].fill(0);
            }
            5 => {
                let bytes = random.bytes(32);
                file.splice(at..at, bytes);
            }
            6 => {
                let range = random.range(file.len());
                file.drain(range);
            }
            _ => swap_parts(&mut file, random),
        }
    }
    file
}

/// Two sections, or what is where they could be, change places.
fn swap_parts(file: &mut Vec<u8>, random: &mut Random) {
    let mut cuts = [0; 4].map(|_: usize| random.below(file.len() + 1));
    cuts.sort_unstable();
    let [a, b, c, d] = cuts;
    *file = [&file[..a], &file[c..d], &file[b..c], &file[a..b], &file[d..]].concat();
}

/// The file with a few changes and right checksums.
pub fn forged(good: &[u8], random: &mut Random) -> Vec<u8> {
    let prelude = format::prelude(good.first_chunk().unwrap()).unwrap();
    let mut header = good[PRELUDE_BYTES..][..prelude.header_bytes].to_vec();
    let (_, sections) = format::decode(good).unwrap();
    let mut sections: Vec<(u32, u32, Vec<u8>)> =
        sections.iter().map(|it| (it.id, it.version, it.payload.to_vec())).collect();
    for _ in 0..random.below(3) + 1 {
        let index = random.below(sections.len().max(1));
        match random.below(12) {
            0 => header = other_header(&header, random),
            1 if !header.is_empty() => {
                let at = random.below(header.len());
                header[at] ^= 1 << random.below(8);
            }
            2 if !sections.is_empty() => {
                let other = random.below(sections.len());
                sections.swap(index, other);
            }
            3 if !sections.is_empty() => {
                let again = sections[index].clone();
                sections.push(again);
            }
            4 if !sections.is_empty() => {
                sections.remove(index);
            }
            5 if !sections.is_empty() => match random.below(3) {
                0 => sections[index].0 = random.below(8) as u32,
                1 => sections[index].1 = random.below(4) as u32,
                _ => sections[index].0 = random.next() as u32,
            },
            _ if !sections.is_empty() => other_payload(&mut sections[index].2, random),
            _ => {}
        }
    }
    let sections: Vec<_> = sections
        .iter()
        .map(|(id, version, payload)| Section { id: *id, version: *version, payload })
        .collect();
    format::encode(&header, &sections)
}

/// Only what a payload says is changed, and its length only if that is `true`.
pub fn other_payloads(good: &[u8], random: &mut Random) -> Vec<u8> {
    let (header, sections) = format::decode(good).unwrap();
    let mut payloads: Vec<Vec<u8>> = sections.iter().map(|it| it.payload.to_vec()).collect();
    for _ in 0..random.below(3) + 1 {
        let index = random.below(payloads.len());
        let (payload, at) = (&mut payloads[index], random.next() as usize);
        if let Some(at) = at.checked_rem(payload.len()) {
            payload[at] = match random.below(3) {
                0 => payload[at] ^ (1 << random.below(7)),
                1 => 0,
                _ => random.next() as u8 & 0x7f,
            };
        }
    }
    let sections: Vec<_> = sections
        .iter()
        .zip(&payloads)
        .map(|(it, payload)| Section { id: it.id, version: it.version, payload })
        .collect();
    format::encode(&header.to_json().unwrap(), &sections)
}

fn other_payload(payload: &mut Vec<u8>, random: &mut Random) {
    let at = random.below(payload.len() + 1);
    let byte = payload.get_mut(at);
    match (random.below(8), byte) {
        (0..=2, Some(byte)) => *byte ^= 1 << random.below(8),
        (3, Some(byte)) => *byte = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
        // A varint of 2^64 - 1: the length of a list, perhaps.
        (4, _) => drop(payload.splice(at..at, [0xff; 9].into_iter().chain([1]))),
        (5, _) => {
            let bytes = random.bytes(16);
            payload.splice(at..at, bytes);
        }
        (6, _) => {
            let range = random.range(payload.len());
            payload.drain(range);
        }
        _ => payload.truncate(at),
    }
}

fn other_header(header: &[u8], random: &mut Random) -> Vec<u8> {
    let Ok(mut value) = serde_json::from_slice::<Value>(header) else { return random.bytes(200) };
    change(&mut value, random);
    serde_json::to_vec(&value).unwrap()
}

/// Changes one value somewhere inside.
fn change(value: &mut Value, random: &mut Random) {
    let deeper = random.below(5) > 0;
    match value {
        Value::Object(fields) if deeper && !fields.is_empty() => {
            let index = random.below(fields.len());
            let key = fields.keys().nth(index).cloned().unwrap();
            match random.below(8) {
                0 => drop(fields.remove(&key)),
                1 => drop(fields.insert("unknown".into(), 1.into())),
                _ => change(&mut fields[&key], random),
            }
        }
        Value::Array(items) if deeper && !items.is_empty() => {
            let index = random.below(items.len());
            match random.below(6) {
                0 => drop(items.remove(index)),
                1 => items.push(items[index].clone()),
                _ => change(&mut items[index], random),
            }
        }
        _ => {
            *value = match random.below(9) {
                0 => 0.into(),
                1 => (-1).into(),
                2 => u64::MAX.into(),
                3 => 1e300.into(),
                4 => "x".into(),
                5 => "\0../".repeat(2000).into(),
                6 => Value::Null,
                7 => Value::Array(vec![]),
                _ => random.next().into(),
            }
        }
    }
}
