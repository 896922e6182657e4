//! The kernel's text that machines have in common: of all that run the same kernel on the same CPU it is the same, and the host holds
//! it once, in huge pages, whatever else their snapshots have.
//!
//! A kernel without jump labels changes its text while it boots and never again. So it is with its read-only data. A resume needs some hundred
//! pages of both, scattered over all: one by one each is a fault of the host, or 7 µs of virtual time where it is read ahead. In a file in
//! memory that the host's kernel has in huge pages, all of it is five.
//!
//! A base snapshot's header says where whole huge pages of text lie, and the SHA-256 of what they hold. A snapshot of a machine that has
//! not written to them says so again. The owner of the host's machines keeps files of that name and content in one directory
//! ([`copy`]), which `flyrun-vmm` is told of (`--text`). Whose name is the header's is mapped over the snapshot's own memory, privately as
//! that: what a guest writes to it stays its own. Without such a file nothing is different but for time.

use std::{
    fs::{self, File},
    io::{self, Write},
    ops::Range,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::Path,
};

use devices::virtio::Memory;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{
    MEMORY,
    files::open_to_read,
    header::Header,
    identity::hex,
    pages::{self, Still},
};
use crate::boot::KernelText;
use crate::memory::{HUGE_PAGE, LOW_END, PAGE};

/// No kernel's text is longer.
const MAX_BYTES: u64 = 64 << 20;
/// As many files are looked at, each of another kernel: there are no more bases.
const MAX_FILES: usize = 16;
const DIGEST_DIGITS: usize = 64;
/// linux/mman.h.
const MADV_COLLAPSE: libc::c_int = 25;
/// How much is copied at once.
const CHUNK_BYTES: usize = 1 << 20;

/// Where the text lies, and what it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextId {
    /// The number of its first page of 4096 bytes.
    pub first: u64,
    /// How many there are.
    pub pages: u64,
    /// SHA-256 of all of them, in hexadecimal digits.
    pub sha256: String,
}

/// What is known of a machine's text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Text {
    /// Nothing.
    #[default]
    Unknown,
    /// The kernel was loaded, and this is its text.
    Loaded(KernelText),
    /// What the snapshot says that the machine was resumed from.
    Resumed(TextId),
}

/// Files of text, named by what they hold, opened before anybody knows which is needed.
#[derive(Debug, Default)]
pub struct Texts(Vec<(String, File)>);

/// The text of one machine in a file, and where it belongs.
#[derive(Debug)]
pub struct SharedText {
    file: File,
    range: Range<u64>,
}

impl TextId {
    /// Where it is; `None` if no kernel's text can be there.
    pub fn range(&self) -> Option<Range<u64>> {
        let start = self.first.checked_mul(PAGE)?;
        let bytes = self.pages.checked_mul(PAGE).filter(|bytes| (1..=MAX_BYTES).contains(bytes))?;
        let end = start.checked_add(bytes).filter(|end| *end <= LOW_END)?;
        (start.is_multiple_of(HUGE_PAGE) && bytes.is_multiple_of(HUGE_PAGE)).then_some(start..end)
    }

    /// Whether it can be what it says: a part of memory, and a digest, which as the name of a file leads nowhere else.
    pub fn is_sound(&self) -> bool {
        is_digest(&self.sha256) && self.range().is_some()
    }
}

impl Text {
    /// What a snapshot is to say of it. `base`: the guest has only booted, so that its text is as it is to stay.
    ///
    /// # Errors
    /// The host does not let this process see its page tables.
    pub fn id(
        &self,
        memory: &Still<'_>,
        given_back: &[Range<u64>],
        base: bool,
    ) -> io::Result<Option<TextId>> {
        match self {
            Self::Loaded(text) if base => {
                let range = unused(text, memory);
                let mut hash = Sha256::new();
                memory.bytes(range.clone()).for_each(|(_, bytes)| hash.update(bytes));
                let (first, pages) = (range.start / PAGE, (range.end - range.start) / PAGE);
                let id = TextId { first, pages, sha256: hex(&hash.finalize()) };
                Ok(id.is_sound().then_some(id))
            }
            Self::Resumed(id) => {
                let Some(range) = id.range() else { return Ok(None) };
                let meets = |other: &Range<u64>| other.start < range.end && range.start < other.end;
                let is_changed =
                    given_back.iter().any(meets) || !memory.anonymous_within(range.clone())?.is_empty();
                Ok((!is_changed).then(|| id.clone()))
            }
            Self::Unknown | Self::Loaded(_) => Ok(None),
        }
    }
}

/// The huge pages of the text up to the first whose padding is not as it was: where a kernel has taken that for other memory, as those do
/// that have no patch of ours, it will write to it again.
fn unused(text: &KernelText, memory: &Still<'_>) -> Range<u64> {
    let used = text.padding.iter().cloned().flat_map(|piece| memory.bytes(piece)).find_map(|(at, bytes)| {
        let first = bytes.iter().position(|byte| *byte != 0)?;
        Some(at + first as u64)
    });
    text.range.start..used.map_or(text.range.end, |used| used - used % HUGE_PAGE)
}

impl Texts {
    /// Opens those in the directory. One that is not there has none.
    pub fn open(dir: &Path) -> Self {
        let named = |entry: fs::DirEntry| entry.file_name().into_string().ok().filter(|name| is_digest(name));
        let names = fs::read_dir(dir).into_iter().flatten().flatten().filter_map(named);
        let open = |name: String| Some((open_to_read(&dir.join(&name)).ok()?, name));
        Self(names.filter_map(open).take(MAX_FILES).map(|(file, name)| (name, file)).collect())
    }

    /// That of a machine with so many bytes of memory, if it is there and can be mapped.
    pub fn find(self, id: &TextId, bytes: u64) -> Option<SharedText> {
        let range = id.range().filter(|range| range.end <= bytes)?;
        let (_, file) = self.0.into_iter().find(|(name, _)| *name == id.sha256)?;
        let metadata = file.metadata().ok()?;
        (metadata.is_file() && metadata.len() == range.end - range.start)
            .then_some(SharedText { file, range })
    }
}

impl SharedText {
    /// Where it belongs.
    pub fn range(&self) -> &Range<u64> {
        &self.range
    }

    /// Puts it in the place of guest memory.
    ///
    /// # Errors
    /// The host's.
    pub fn map(&self, memory: &Memory) -> io::Result<()> {
        pages::map_from(memory, &self.file, self.range.clone(), 0)
    }
}

/// Writes the text of a base snapshot to an empty file in memory, if it is what the header says, and has the host's kernel put it into huge
/// pages, if it can (Linux 6.1); `false` if it is not, and the file is of no use.
///
/// # Errors
/// The host's, or the snapshot's memory ends before.
pub fn copy(dir: &Path, header: &Header, to: &mut File) -> io::Result<bool> {
    let Some((id, range)) =
        header.text.as_ref().filter(|id| id.is_sound()).and_then(|id| Some((id, id.range()?)))
    else {
        return Ok(false);
    };
    let memory = open_to_read(&dir.join(MEMORY))?;
    let (mut hash, mut chunk, mut at) = (Sha256::new(), vec![0; CHUNK_BYTES], range.start);
    while at < range.end {
        let length = usize::try_from(range.end - at).map_or(chunk.len(), |left| left.min(chunk.len()));
        let part = chunk.get_mut(..length).unwrap_or_default();
        memory.read_exact_at(part, at)?;
        hash.update(&*part);
        to.write_all(part)?;
        at += length as u64;
    }
    if hex(&hash.finalize()) != id.sha256 {
        return Ok(false);
    }
    // In small pages it is as good, but for time.
    let _ = collapse(to, usize::try_from(range.end - range.start).map_err(io::Error::other)?);
    Ok(true)
}

/// Has the kernel put a file in memory into huge pages.
fn collapse(file: &File, length: usize) -> io::Result<()> {
    let huge = HUGE_PAGE as usize;
    let span = length.checked_add(huge).ok_or(io::ErrorKind::InvalidInput)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice aliases nothing.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), span, libc::PROT_NONE, flags, -1, 0) };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let start = base.cast::<u8>().wrapping_add(base.align_offset(huge)).cast();
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED);
    // SAFETY: the range is in the mapping made above, which nobody else knows.
    let mapped = unsafe { libc::mmap(start, length, prot, flags, file.as_raw_fd(), 0) };
    let collapsed = match mapped {
        libc::MAP_FAILED => -1,
        // SAFETY: as before; the advice changes no content.
        _ => unsafe { libc::madvise(start, length, MADV_COLLAPSE) },
    };
    let result = if collapsed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    // SAFETY: all of the mapping was made above, and nobody else knows it.
    unsafe { libc::munmap(base, span) };
    result
}

fn is_digest(name: &str) -> bool {
    name.len() == DIGEST_DIGITS && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::reserve;

    const TEXT: Range<u64> = 2 << 20..6 << 20;

    fn memory() -> Memory {
        let memory = reserve(8).unwrap();
        for page in (TEXT.start..TEXT.end).step_by(PAGE as usize) {
            memory.write_obj(page, GuestAddress(page)).unwrap();
        }
        memory
    }

    fn loaded(padding: Vec<Range<u64>>) -> Text {
        Text::Loaded(KernelText { range: TEXT, padding })
    }

    #[test]
    fn a_huge_page_whose_padding_is_used_is_no_text() {
        let memory = memory();
        let (first, last) = (TEXT.start + 8..TEXT.start + PAGE, TEXT.end - 3 * PAGE..TEXT.end);
        memory.write_slice(&[0; 3 * PAGE as usize], GuestAddress(last.start)).unwrap();
        let pages = || {
            // SAFETY: nobody else knows this memory.
            let still = unsafe { Still::new(&memory) };
            loaded(vec![first.clone(), last.clone()]).id(&still, &[], true).unwrap().map(|id| id.pages)
        };
        assert_eq!(pages(), Some(1024));
        memory.write_obj(1u8, GuestAddress(last.end - 1)).unwrap();
        assert_eq!(pages(), Some(512));
        memory.write_obj(1u8, GuestAddress(first.start)).unwrap();
        assert_eq!(pages(), None);
    }

    fn id(memory: &Memory) -> TextId {
        // SAFETY: nobody else knows this memory.
        let still = unsafe { Still::new(memory) };
        loaded(vec![]).id(&still, &[], true).unwrap().unwrap()
    }

    /// The directory of files, with that of this text.
    fn dir(memory: &Memory, id: &TextId) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = vec![0; (TEXT.end - TEXT.start) as usize];
        memory.read_slice(&mut bytes, GuestAddress(TEXT.start)).unwrap();
        fs::write(dir.path().join(&id.sha256), &bytes).unwrap();
        dir
    }

    #[test]
    fn only_whole_huge_pages_below_the_gap_are_text() {
        let range = |first, pages| TextId { first, pages, sha256: String::new() }.range();
        assert_eq!(range(512, 1024), Some(TEXT));
        for (first, pages) in [(513, 512), (512, 511), (512, 0), (u64::MAX, 512), (512, u64::MAX)] {
            assert_eq!(range(first, pages), None, "{first} {pages}");
        }
        assert_eq!(range(LOW_END / PAGE - 512, 1024), None);
        assert_eq!(range(0, MAX_BYTES / PAGE + 512), None);
    }

    #[test]
    fn what_was_loaded_is_told_by_a_base_snapshot_alone() {
        let memory = memory();
        // SAFETY: nobody else knows this memory.
        let still = unsafe { Still::new(&memory) };
        assert_eq!(loaded(vec![]).id(&still, &[], false).unwrap(), None);
        assert_eq!(Text::Unknown.id(&still, &[], true).unwrap(), None);
        let told = id(&memory);
        assert_eq!((told.first, told.pages, told.is_sound()), (512, 1024, true));
    }

    #[test]
    fn it_is_mapped_where_it_belongs_and_told_again_until_it_is_written_to() {
        let loaded = memory();
        let id = id(&loaded);
        let dir = dir(&loaded, &id);
        let memory = reserve(8).unwrap();
        let found = Texts::open(dir.path()).find(&id, 8 << 20).unwrap();
        found.map(&memory).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(TEXT.start + PAGE)).unwrap(), TEXT.start + PAGE);
        // SAFETY: nobody else knows this memory.
        let still = unsafe { Still::new(&memory) };
        let text = Text::Resumed(id.clone());
        assert_eq!(text.id(&still, &[0..PAGE, 6 << 20..7 << 20], false).unwrap(), Some(id.clone()));
        let part = TEXT.end - PAGE..7 << 20;
        assert_eq!(text.id(&still, std::slice::from_ref(&part), false).unwrap(), None);
        memory.write_obj(1u8, GuestAddress(TEXT.end - 1)).unwrap();
        assert_eq!(text.id(&still, &[], false).unwrap(), None);
        let kept = fs::read(dir.path().join(&id.sha256)).unwrap();
        assert_eq!(hex(&Sha256::digest(kept)), id.sha256);
    }

    #[test]
    fn files_of_other_names_lengths_and_kinds_are_none() {
        let memory = memory();
        let id = id(&memory);
        let dir = dir(&memory, &id);
        let path = dir.path().join(&id.sha256);
        let find = |id: &TextId, bytes| Texts::open(dir.path()).find(id, bytes).is_some();
        assert!(find(&id, 6 << 20) && !find(&id, (6 << 20) - PAGE));
        assert!(!find(&TextId { sha256: "0".repeat(64), ..id.clone() }, 8 << 20));
        assert!(!find(&TextId { pages: 512, ..id.clone() }, 8 << 20));
        let elsewhere = dir.path().join("elsewhere");
        fs::rename(&path, &elsewhere).unwrap();
        symlink(&elsewhere, &path).unwrap();
        assert!(!find(&id, 8 << 20));
        assert!(Texts::open(&dir.path().join("missing")).find(&id, 8 << 20).is_none());
    }
}
