//! Reads tar archives: ustar, pax, GNU, star and version 7, with their sparse files, from a stream that may be
//! hostile. Knows nothing of files; what an entry may do is decided by its caller.
//!
//! Written here and not taken from the crate `tar` because that one knows neither the pax forms of sparse files nor a
//! bound for long names. Where formats disagree with each other, the reading is that of Go's archive/tar, since that
//! is what images are made with and tested against.

use std::io::{self, BufRead};

use thiserror::Error;

use header::{BLOCK, Header};
pub use sparse::Segment;

pub mod header;
pub mod pax;
pub mod sparse;

/// The longest extended header or long name that is read into memory.
pub const MAX_METADATA_BYTES: u64 = 1 << 20;

/// Why an archive cannot be read on.
#[derive(Debug, Error)]
pub enum TarError {
    /// The stream behind it failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The archive ends within an entry.
    #[error("the archive is truncated")]
    Truncated,
    /// A header does not have the sum that it says.
    #[error("a header's checksum is wrong")]
    Checksum,
    /// A number of a header is none, or out of range.
    #[error("the {0} of a header is not a valid number")]
    Number(&'static str),
    /// An extended header is not valid.
    #[error("an extended header is not valid: {0}")]
    Pax(&'static str),
    /// The map of a sparse file is not valid.
    #[error("the map of a sparse file is not valid")]
    Sparse,
    /// An extended header or long name exceeds [`MAX_METADATA_BYTES`].
    #[error("an extended header has {0} bytes, {MAX_METADATA_BYTES} are allowed")]
    TooLong(u64),
    /// The type of an entry is not one of a filesystem.
    #[error("an entry has the unknown type {0:?}")]
    Type(char),
}

impl PartialEq for TarError {
    fn eq(&self, other: &Self) -> bool {
        self.to_string() == other.to_string()
    }
}

/// A point in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Time {
    /// Seconds since 1970, negative before.
    pub seconds: i64,
    /// 0 to 999,999,999, counting forward.
    pub nanoseconds: i64,
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A hard link to the entry's `link`.
    HardLink,
    /// A symbolic link to the entry's `link`.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
}

/// One entry. Its paths are as the archive has them: nothing has been checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its path.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Target of a link.
    pub link: Vec<u8>,
    /// Permission bits, the lowest twelve.
    pub mode: u32,
    /// Owner.
    pub uid: i64,
    /// Group.
    pub gid: i64,
    /// Modification time.
    pub mtime: Time,
    /// Access time, where the archive has one.
    pub atime: Option<Time>,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Extended attributes.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// The size of a regular file, holes included, in bytes.
    pub size: u64,
    /// The runs of data of a regular file in their order, validated.
    pub segments: Vec<Segment>,
}

/// An archive that is read entry by entry.
#[derive(Debug)]
pub struct Archive<R> {
    reader: R,
    /// Data of the current entry that has not been read.
    data_left: u64,
    /// What fills the last block of the data.
    padding: u64,
    is_over: bool,
}

/// What came before the header of an entry and belongs to it.
#[derive(Default)]
struct Prelude {
    pax: Option<pax::Records>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl<R: BufRead> Archive<R> {
    /// Reads an archive from the start of this stream.
    pub fn new(reader: R) -> Self {
        Self { reader, data_left: 0, padding: 0, is_over: false }
    }

    /// Gives the stream back, behind the last block that was read.
    pub fn into_inner(self) -> R {
        self.reader
    }

    /// Goes to the next entry, skipping unread data of this one; `None` at the end.
    ///
    /// # Errors
    /// [`TarError`]; after any, the archive cannot be read on.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        self.skip_data()?;
        let mut prelude = Prelude::default();
        while let Some(header) = self.read_header()? {
            match header.type_flag() {
                b'x' | b'X' => prelude.pax = Some(pax::parse(&self.read_metadata(&header)?)?),
                b'L' => prelude.long_name = Some(self.read_long(&header)?),
                b'K' => prelude.long_link = Some(self.read_long(&header)?),
                // Go's reader does not apply global headers to entries either; 'V' is the label of a tape.
                b'g' | b'V' => self.skip_metadata(&header)?,
                flag => return self.entry(&header, flag, prelude).map(Some),
            }
        }
        Ok(None)
    }

    /// The next data of the current entry, empty at its end. [`Archive::consume`] says how much of it was used.
    ///
    /// # Errors
    /// [`TarError::Truncated`] and what the stream fails with.
    pub fn fill_data(&mut self) -> Result<&[u8], TarError> {
        if self.data_left == 0 {
            return Ok(&[]);
        }
        let available = self.reader.fill_buf()?;
        if available.is_empty() {
            return Err(TarError::Truncated);
        }
        let length = available.len().min(usize::try_from(self.data_left).unwrap_or(usize::MAX));
        Ok(available.get(..length).unwrap_or_default())
    }

    /// Marks data of [`Archive::fill_data`] as used.
    pub fn consume(&mut self, count: usize) {
        let count = count.min(usize::try_from(self.data_left).unwrap_or(usize::MAX));
        self.reader.consume(count);
        self.data_left -= count as u64;
    }

    fn skip_data(&mut self) -> Result<(), TarError> {
        // The sum cannot overflow: begin_data has checked it.
        let mut left = self.data_left + self.padding;
        while left > 0 {
            let available = self.reader.fill_buf()?.len();
            if available == 0 {
                return Err(TarError::Truncated);
            }
            let step = available.min(usize::try_from(left).unwrap_or(usize::MAX));
            self.reader.consume(step);
            left -= step as u64;
        }
        (self.data_left, self.padding) = (0, 0);
        Ok(())
    }

    fn begin_data(&mut self, size: u64) -> Result<(), TarError> {
        let padding = size.wrapping_neg() % BLOCK as u64;
        size.checked_add(padding).ok_or(TarError::Number("size"))?;
        (self.data_left, self.padding) = (size, padding);
        Ok(())
    }

    /// The next block; `None` at the end of the stream.
    fn read_block(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while let Some(rest) = block.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.reader.read(rest) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(TarError::Truncated),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Some(block))
    }

    /// The next header; `None` at the two blocks of zeros, or where the stream ends between entries.
    fn read_header(&mut self) -> Result<Option<Header>, TarError> {
        self.skip_data()?;
        if self.is_over {
            return Ok(None);
        }
        let Some(header) = self.read_block()?.map(Header) else { return Ok(None) };
        if !header.is_zero() {
            header.check()?;
            return Ok(Some(header));
        }
        match self.read_block()?.map(Header) {
            Some(second) if !second.is_zero() => Err(TarError::Checksum),
            _ => {
                self.is_over = true;
                Ok(None)
            }
        }
    }

    fn read_metadata(&mut self, header: &Header) -> Result<Vec<u8>, TarError> {
        let size = header.size()?;
        if size > MAX_METADATA_BYTES {
            return Err(TarError::TooLong(size));
        }
        self.begin_data(size)?;
        let mut bytes = Vec::new();
        loop {
            let chunk = self.fill_data()?;
            if chunk.is_empty() {
                return Ok(bytes);
            }
            bytes.extend_from_slice(chunk);
            let count = chunk.len();
            self.consume(count);
        }
    }

    fn skip_metadata(&mut self, header: &Header) -> Result<(), TarError> {
        self.begin_data(header.size()?)
    }

    fn read_long(&mut self, header: &Header) -> Result<Vec<u8>, TarError> {
        Ok(header::text(&self.read_metadata(header)?).to_vec())
    }

    fn entry(&mut self, header: &Header, flag: u8, prelude: Prelude) -> Result<Entry, TarError> {
        let pax = prelude.pax.unwrap_or_default();
        let path = pax.path.or(prelude.long_name).unwrap_or_else(|| header.path());
        let kind = kind_of(flag, &path)?;
        let stored = match pax.size {
            Some(size) => size,
            None => header.size()?,
        };
        let device = match kind {
            Kind::CharDevice | Kind::BlockDevice => header.device()?,
            _ => (0, 0),
        };
        let mut entry = Entry {
            path,
            kind,
            link: pax.link.or(prelude.long_link).unwrap_or_else(|| header.link()),
            mode: header.mode()?,
            uid: pax.uid.map_or_else(|| header.uid(), Ok)?,
            gid: pax.gid.map_or_else(|| header.gid(), Ok)?,
            mtime: pax
                .mtime
                .map_or_else(|| header.mtime().map(|seconds| Time { seconds, nanoseconds: 0 }), Ok)?,
            atime: pax.atime,
            device,
            xattrs: pax.xattrs,
            size: 0,
            segments: Vec::new(),
        };
        match kind {
            Kind::File => self.file_data(header, flag, pax.sparse, stored, &mut entry)?,
            // Only the dump of a directory (GNU 'D') has data; for the others the size means something else or
            // nothing, and Go's reader takes it for 0.
            Kind::Directory if flag == b'D' => self.begin_data(stored)?,
            _ => {}
        }
        Ok(entry)
    }

    /// Finds out where the data belongs, and reads the maps that stand before it.
    fn file_data(
        &mut self,
        header: &Header,
        flag: u8,
        sparse: pax::SparseRecords,
        stored: u64,
        entry: &mut Entry,
    ) -> Result<(), TarError> {
        let has_size = sparse.size.is_some();
        if flag == b'S' && !has_size {
            let (mut more, size) = header.gnu_sparse_rest()?;
            sparse::add_gnu(&mut entry.segments, header.gnu_sparse())?;
            while more {
                let block = self.read_block()?.ok_or(TarError::Truncated)?;
                let before = entry.segments.len();
                sparse::add_gnu(&mut entry.segments, block.get(..504).unwrap_or_default())?;
                // A chain of empty blocks would be read for ever.
                more = block.get(504).is_some_and(|flag| *flag != 0) && entry.segments.len() > before;
            }
            entry.size = size;
            self.begin_data(stored)?;
        } else if let (Some(1), Some(0)) = sparse.version {
            entry.size = sparse.size.ok_or(TarError::Sparse)?;
            self.begin_data(stored)?;
            entry.segments = self.read_sparse_map()?;
        } else if let Some(size) = sparse.size {
            entry.size = size;
            entry.segments = sparse::from_pairs(&sparse.map)?;
            self.begin_data(stored)?;
        } else {
            entry.size = stored;
            entry.segments = vec![Segment { offset: 0, length: stored }];
            self.begin_data(stored)?;
        }
        if let Some(name) = sparse.name.filter(|_| has_size) {
            entry.path = name;
        }
        sparse::validate(&entry.segments, entry.size, self.data_left)
    }

    fn read_sparse_map(&mut self) -> Result<Vec<Segment>, TarError> {
        let mut map = sparse::MapReader::default();
        loop {
            let Some(block) = self.read_data_block()? else { return Err(TarError::Sparse) };
            if map.push(&block)? {
                return map.finish();
            }
        }
    }

    /// A whole block of the current entry's data; `None` when less is left.
    fn read_data_block(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let Some(left) = self.data_left.checked_sub(BLOCK as u64) else { return Ok(None) };
        let block = self.read_block()?.ok_or(TarError::Truncated)?;
        self.data_left = left;
        Ok(Some(block))
    }
}

fn kind_of(flag: u8, path: &[u8]) -> Result<Kind, TarError> {
    Ok(match flag {
        // Version 7 has no other directories.
        b'\0' if path.ends_with(b"/") => Kind::Directory,
        b'\0' | b'0' | b'7' | b'S' => Kind::File,
        b'1' => Kind::HardLink,
        b'2' => Kind::Symlink,
        b'3' => Kind::CharDevice,
        b'4' => Kind::BlockDevice,
        b'5' | b'D' => Kind::Directory,
        b'6' => Kind::Fifo,
        other => return Err(TarError::Type(char::from(other))),
    })
}
