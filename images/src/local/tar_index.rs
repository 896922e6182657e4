//! Where the files of a tar are, without unpacking it: nothing is written to a path that an archive names.
//!
//! Only what image archives use is understood: ustar with pax headers (path, linkpath, size) and GNU long names. The
//! archive is hostile: names are keys of a map and nothing else, and everything that an archive can make large is bounded.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{Error, Result};

const BLOCK: u64 = 512;
/// Most entries that are looked at. An archive of 512 layers has about 1,600.
const MAX_ENTRIES: usize = 65_536;
/// Most bytes of one extended header or long name.
const MAX_HEADER_BYTES: u64 = 64 * 1024;
/// Most links that are followed from one name.
const MAX_LINKS: usize = 8;

/// The index of a tar.
#[derive(Debug)]
pub(crate) struct TarIndex {
    file: Arc<File>,
    path: PathBuf,
    entries: BTreeMap<String, Entry>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Entry {
    File {
        offset: u64,
        size: u64,
    },
    /// Symbolic or hard link to the entry of this name.
    Link(String),
}

/// What an extended header says about the next entry.
#[derive(Default)]
struct Extended {
    path: Option<String>,
    link: Option<String>,
    size: Option<u64>,
}

impl TarIndex {
    /// Reads the headers of the tar at `path`.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = super::open_regular(path)?;
        let length = file.metadata().map_err(|error| Error::io("stat", path, error))?.len();
        let mut index = Self { file: Arc::new(file), path: path.into(), entries: BTreeMap::new() };
        index.scan(length)?;
        Ok(index)
    }

    /// Where the tar is.
    pub(crate) fn location(&self) -> &Path {
        &self.path
    }

    /// A reader of the file of this name, following links, and its size. None if the archive has none.
    pub(crate) fn file(&self, name: &str) -> Option<(Section, u64)> {
        let mut name = normalize("", name)?;
        for _ in 0..=MAX_LINKS {
            match self.entries.get(&name)? {
                Entry::File { offset, size } => {
                    let section = Section { file: Arc::clone(&self.file), offset: *offset, left: *size };
                    return Some((section, *size));
                }
                Entry::Link(target) => name.clone_from(target),
            }
        }
        None
    }

    fn scan(&mut self, length: u64) -> Result<()> {
        let mut offset = 0;
        let mut extended = Extended::default();
        let mut seen = 0;
        while length.saturating_sub(offset) >= BLOCK {
            let mut header = [0; BLOCK as usize];
            self.read_at(&mut header, offset)?;
            if header.iter().all(|&byte| byte == 0) {
                return Ok(());
            }
            if seen == 0 {
                self.refuse_compressed(&header)?;
            }
            seen += 1;
            if seen > MAX_ENTRIES {
                let what = format!("{} (number of entries)", self.path.display());
                return Err(Error::TooLarge { what, limit: MAX_ENTRIES as u64, got: seen as u64 });
            }
            let header =
                Header::parse(&header).ok_or_else(|| self.malformed(offset, "is not a tar header"))?;
            let data = offset + BLOCK;
            let kind = header.kind;
            let size = if header.has_data() { extended.size.unwrap_or(header.size) } else { 0 };
            let end = data.checked_add(size).filter(|&end| end <= length);
            let end = end.ok_or_else(|| {
                self.malformed(offset, "announces more bytes than the file has: it is truncated")
            })?;
            match kind {
                b'x' => extended.read_pax(&self.read_small(data, size)?),
                b'L' => extended.path = Some(until_nul(&self.read_small(data, size)?)),
                b'K' => extended.link = Some(until_nul(&self.read_small(data, size)?)),
                b'g' => {}
                _ => self.add(header, std::mem::take(&mut extended), data, size),
            }
            offset = end.next_multiple_of(BLOCK);
        }
        Ok(())
    }

    /// Later entries replace earlier ones of the same name, as unpacking would. Names that lead out of the archive are
    /// names of nothing.
    fn add(&mut self, header: Header, extended: Extended, offset: u64, size: u64) {
        let name = extended.path.unwrap_or(header.name);
        let Some(name) = normalize("", &name) else { return };
        let target = extended.link.unwrap_or(header.link);
        let entry = match header.kind {
            b'0' | b'7' | 0 => Some(Entry::File { offset, size }),
            b'1' => normalize("", &target).map(Entry::Link),
            b'2' => {
                let directory = name.rsplit_once('/').map_or("", |(directory, _)| directory);
                normalize(directory, &target).map(Entry::Link)
            }
            _ => None,
        };
        match entry {
            Some(entry) => self.entries.insert(name, entry),
            None => self.entries.remove(&name),
        };
    }

    fn read_small(&self, offset: u64, size: u64) -> Result<Vec<u8>> {
        if size > MAX_HEADER_BYTES {
            let what = format!("{} (bytes of an extended header)", self.path.display());
            return Err(Error::TooLarge { what, limit: MAX_HEADER_BYTES, got: size });
        }
        let mut bytes = vec![0; size as usize];
        self.read_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(bytes, offset).map_err(|error| Error::io("read", &self.path, error))
    }

    fn refuse_compressed(&self, header: &[u8]) -> Result<()> {
        let how = match header {
            [0x1f, 0x8b, ..] => "gzip: unpack it with gunzip first",
            [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd: unpack it with unzstd first",
            [0xfd, b'7', b'z', b'X', b'Z', ..] => "xz: unpack it with unxz first",
            [b'B', b'Z', b'h', ..] => "bzip2: unpack it with bunzip2 first",
            _ => return Ok(()),
        };
        Err(Error::Unsupported {
            what: self.path.display().to_string(),
            problem: format!("is compressed with {how}"),
        })
    }

    fn malformed(&self, offset: u64, problem: &str) -> Error {
        Error::Malformed {
            what: self.path.display().to_string(),
            problem: format!("the entry at byte {offset} {problem}"),
        }
    }
}

/// A stretch of a file, read without moving anybody else's position.
#[derive(Debug)]
pub(crate) struct Section {
    file: Arc<File>,
    offset: u64,
    left: u64,
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let Some(buffer) = buffer.get_mut(..wanted) else { return Ok(0) };
        let count = self.file.read_at(buffer, self.offset)?;
        self.offset += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}

struct Header {
    name: String,
    link: String,
    size: u64,
    kind: u8,
}

impl Header {
    /// POSIX.1-1988 ustar, with GNU's binary sizes.
    fn parse(block: &[u8; BLOCK as usize]) -> Option<Self> {
        let field = |start: usize, length: usize| block.get(start..start + length).unwrap_or_default();
        let sum: u64 = block.iter().enumerate().fold(0, |sum, (index, &byte)| {
            // The checksum counts its own field as spaces.
            sum + u64::from(if (148..156).contains(&index) { b' ' } else { byte })
        });
        if number(field(148, 8))? != sum {
            return None;
        }
        let kind = *block.get(156)?;
        let name = until_nul(field(0, 100));
        let prefix = if field(257, 6) == b"ustar\0" { until_nul(field(345, 155)) } else { String::new() };
        let name = if prefix.is_empty() { name } else { format!("{prefix}/{name}") };
        Some(Self { name, link: until_nul(field(157, 100)), size: number(field(124, 12))?, kind })
    }

    /// Links, directories and devices have no data whatever their size field says.
    fn has_data(&self) -> bool {
        !matches!(self.kind, b'1'..=b'6')
    }
}

impl Extended {
    /// Records of the form `LENGTH KEY=VALUE\n` (pax(1)). Stops at the first that is not one.
    fn read_pax(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while let Some((length, key, value)) = pax_record(rest) {
            match key {
                b"path" => self.path = Some(String::from_utf8_lossy(value).into_owned()),
                b"linkpath" => self.link = Some(String::from_utf8_lossy(value).into_owned()),
                b"size" => self.size = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()),
                _ => {}
            }
            rest = rest.get(length..).unwrap_or_default();
        }
    }
}

fn pax_record(bytes: &[u8]) -> Option<(usize, &[u8], &[u8])> {
    let space = bytes.iter().take(8).position(|&byte| byte == b' ')?;
    let length: usize = std::str::from_utf8(bytes.get(..space)?).ok()?.parse().ok()?;
    let record = bytes.get(space + 1..length)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|&byte| byte == b'=')?;
    Some((length, record.get(..equals)?, record.get(equals + 1..)?))
}

/// Octal with spaces or NUL around it, or GNU's base 256 (first bit set).
fn number(field: &[u8]) -> Option<u64> {
    if let [first, rest @ ..] = field
        && first & 0x80 != 0
    {
        let start = u64::from(first & 0x7f);
        return rest.iter().try_fold(start, |sum, &byte| sum.checked_mul(256)?.checked_add(u64::from(byte)));
    }
    let text = std::str::from_utf8(field).ok()?.trim_matches(['\0', ' ']);
    if text.is_empty() { Some(0) } else { u64::from_str_radix(text, 8).ok() }
}

fn until_nul(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
}

/// The name of an entry as a key: relative to the archive's root, without `.`, with `..` resolved. None if it is
/// absolute or leads out.
fn normalize(directory: &str, name: &str) -> Option<String> {
    if name.starts_with('/') {
        return None;
    }
    let mut parts: Vec<&str> = Vec::new();
    for part in directory.split('/').chain(name.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    if parts.is_empty() { None } else { Some(parts.join("/")) }
}

#[cfg(test)]
mod tests;
