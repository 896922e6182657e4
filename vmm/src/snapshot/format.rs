//! The file `state`: a prelude, a header, sections. FORMAT.md is its specification; the tests hold the two together.
//!
//! Nothing here knows what a section means: that is [`super::sections`].

use super::{header::Header, refusal::Refusal};

/// The file's first bytes.
pub const MAGIC: [u8; 8] = *b"flysnap\x1a";
/// The version of prelude and section heads.
pub const VERSION: u32 = 1;
/// Length of the prelude in bytes.
pub const PRELUDE_BYTES: usize = 32;
/// Length of a section's head in bytes.
pub const HEAD_BYTES: usize = 24;
/// The longest file, in bytes: 32 vCPUs need half a MiB, and the list of a clone's pages is the rest.
pub const MAX_FILE_BYTES: u64 = 64 << 20;
/// The longest header, in bytes.
pub const MAX_HEADER_BYTES: usize = 1 << 20;
/// The most sections.
pub const MAX_SECTIONS: usize = 256;

/// One section: an id and a version, which say how to read the bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section<'a> {
    /// What it holds.
    pub id: u32,
    /// In which form.
    pub version: u32,
    /// The bytes.
    pub payload: &'a [u8],
}

/// What the first 32 bytes say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prelude {
    /// Length of the header in bytes.
    pub header_bytes: usize,
    /// Length of the file in bytes.
    pub file_bytes: u64,
    header_crc: u32,
}

/// Puts a file together.
pub fn encode(header: &[u8], sections: &[Section<'_>]) -> Vec<u8> {
    let payloads: usize = sections.iter().map(|section| HEAD_BYTES + section.payload.len()).sum();
    let length = PRELUDE_BYTES + header.len() + payloads;
    let mut file = Vec::with_capacity(length);
    file.extend(MAGIC);
    file.extend(VERSION.to_le_bytes());
    file.extend((header.len() as u32).to_le_bytes());
    file.extend((length as u64).to_le_bytes());
    file.extend(crc32fast::hash(header).to_le_bytes());
    file.extend(crc32fast::hash(&file).to_le_bytes());
    file.extend(header);
    for section in sections {
        let mut head = Vec::with_capacity(HEAD_BYTES);
        head.extend(section.id.to_le_bytes());
        head.extend(section.version.to_le_bytes());
        head.extend((section.payload.len() as u64).to_le_bytes());
        head.extend(crc32fast::hash(section.payload).to_le_bytes());
        head.extend(crc32fast::hash(&head).to_le_bytes());
        file.extend(head);
        file.extend(section.payload);
    }
    file
}

/// Reads the first 32 bytes.
///
/// # Errors
/// They are no prelude, or one of a newer version.
pub fn prelude(bytes: &[u8; PRELUDE_BYTES]) -> Result<Prelude, Refusal> {
    if !bytes.starts_with(&MAGIC) {
        return Err(Refusal::Corrupted("state does not begin as a snapshot does".into()));
    }
    // The version comes first: what a newer flyrun writes behind it is not ours to judge.
    let version = u32_at(bytes, 8);
    if version > VERSION && checked(bytes) {
        return Err(Refusal::version("state", version, VERSION));
    }
    if version != VERSION || !checked(bytes) {
        return Err(Refusal::Corrupted("the prelude's checksum is wrong".into()));
    }
    let prelude = Prelude {
        header_bytes: u32_at(bytes, 12) as usize,
        file_bytes: u64_at(bytes, 16),
        header_crc: u32_at(bytes, 24),
    };
    let least = (PRELUDE_BYTES as u64).saturating_add(prelude.header_bytes as u64);
    if prelude.header_bytes > MAX_HEADER_BYTES || !(least..=MAX_FILE_BYTES).contains(&prelude.file_bytes) {
        return Err(Refusal::Corrupted(format!("the prelude tells impossible lengths: {prelude:?}")));
    }
    Ok(prelude)
}

/// Reads the header, given the bytes behind the prelude.
///
/// # Errors
/// They are not what was written, or a newer flyrun wrote them.
pub fn header(prelude: &Prelude, behind: &[u8]) -> Result<Header, Refusal> {
    let Some(bytes) = behind.get(..prelude.header_bytes) else {
        return Err(short("the header", prelude.header_bytes, behind.len()));
    };
    if crc32fast::hash(bytes) != prelude.header_crc {
        return Err(Refusal::Corrupted("the header's checksum is wrong".into()));
    }
    Header::from_json(bytes)
}

/// Reads a whole file.
///
/// # Errors
/// It is not what was written, or a newer flyrun wrote it.
pub fn decode(file: &[u8]) -> Result<(Header, Vec<Section<'_>>), Refusal> {
    let Some((first, behind)) = file.split_first_chunk::<PRELUDE_BYTES>() else {
        return Err(short("state", PRELUDE_BYTES, file.len()));
    };
    let prelude = prelude(first)?;
    let length = file.len() as u64;
    if length < prelude.file_bytes {
        return Err(Refusal::Truncated { what: "state".into(), wanted: prelude.file_bytes, found: length });
    }
    if length > prelude.file_bytes {
        return Err(Refusal::Corrupted(format!(
            "state is {} bytes longer than it says",
            length - prelude.file_bytes
        )));
    }
    let header = header(&prelude, behind)?;
    let mut rest = behind.get(prelude.header_bytes..).unwrap_or_default();
    let mut sections = Vec::new();
    while !rest.is_empty() {
        if sections.len() == MAX_SECTIONS {
            return Err(Refusal::Corrupted(format!("state has more than {MAX_SECTIONS} sections")));
        }
        let (section, behind) = section(rest, sections.len())?;
        sections.push(section);
        rest = behind;
    }
    Ok((header, sections))
}

fn section(bytes: &[u8], index: usize) -> Result<(Section<'_>, &[u8]), Refusal> {
    let what = || format!("section {index}");
    let Some((head, behind)) = bytes.split_first_chunk::<HEAD_BYTES>() else {
        return Err(short(&what(), HEAD_BYTES, bytes.len()));
    };
    if !checked(head) {
        return Err(Refusal::Corrupted(format!("the checksum of the head of section {index} is wrong")));
    }
    let length = u64_at(head, 8);
    let split = usize::try_from(length).ok().and_then(|length| behind.split_at_checked(length));
    let Some((payload, rest)) = split else {
        return Err(Refusal::Truncated { what: what(), wanted: length, found: behind.len() as u64 });
    };
    if crc32fast::hash(payload) != u32_at(head, 16) {
        return Err(Refusal::Corrupted(format!("the checksum of section {index} is wrong")));
    }
    Ok((Section { id: u32_at(head, 0), version: u32_at(head, 4), payload }, rest))
}

/// Whether the last four bytes are the checksum of those before.
fn checked(bytes: &[u8]) -> bool {
    bytes.split_last_chunk::<4>().is_some_and(|(rest, crc)| crc32fast::hash(rest) == u32::from_le_bytes(*crc))
}

fn short(what: &str, wanted: usize, found: usize) -> Refusal {
    Refusal::Truncated { what: what.to_owned(), wanted: wanted as u64, found: found as u64 }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests;
