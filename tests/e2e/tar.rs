//! Writes tar archives byte by byte: a library would refuse what hostile archives hold.

/// The types of entries (POSIX.1-1988 ustar, typeflag).
pub mod kind {
    /// Regular file.
    pub const FILE: u8 = b'0';
    /// Hard link.
    pub const HARD_LINK: u8 = b'1';
    /// Symbolic link.
    pub const SYMLINK: u8 = b'2';
    /// Character device.
    pub const CHAR_DEVICE: u8 = b'3';
    /// Directory.
    pub const DIRECTORY: u8 = b'5';
    /// Named pipe.
    pub const FIFO: u8 = b'6';
    /// GNU: the next entry's long name.
    pub const GNU_LONG_NAME: u8 = b'L';
    /// Extended header of the next entry.
    pub const PAX: u8 = b'x';
}

/// One entry's header; the name is written as it is.
#[derive(Clone, Debug)]
pub struct Entry<'a> {
    /// Path, at most 100 bytes.
    pub name: &'a str,
    /// See [`kind`].
    pub kind: u8,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970.
    pub mtime: u64,
    /// Target of a link, at most 100 bytes.
    pub link: &'a str,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Contents.
    pub data: &'a [u8],
}

impl Default for Entry<'_> {
    fn default() -> Self {
        Entry {
            name: "",
            kind: kind::FILE,
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: 1,
            link: "",
            device: (0, 0),
            data: b"",
        }
    }
}

/// A tar under construction.
#[derive(Clone, Debug, Default)]
pub struct Tar {
    bytes: Vec<u8>,
}

impl Tar {
    /// An empty archive.
    pub fn new() -> Self {
        Tar::default()
    }

    /// Adds any entry.
    pub fn entry(self, entry: &Entry<'_>) -> Self {
        self.announce(entry, entry.data.len() as u64)
    }

    /// Adds an entry that announces `size` bytes, whatever it has.
    pub fn announce(mut self, entry: &Entry<'_>, size: u64) -> Self {
        let mut header = [0u8; 512];
        put(&mut header, 0, entry.name.as_bytes());
        put(&mut header, 100, format!("{:07o}", entry.mode).as_bytes());
        put(&mut header, 108, format!("{:07o}", entry.uid).as_bytes());
        put(&mut header, 116, format!("{:07o}", entry.gid).as_bytes());
        put(&mut header, 124, format!("{size:011o}").as_bytes());
        put(&mut header, 136, format!("{:011o}", entry.mtime).as_bytes());
        put(&mut header, 148, b"        ");
        put(&mut header, 156, &[entry.kind]);
        put(&mut header, 157, entry.link.as_bytes());
        put(&mut header, 257, b"ustar\x0000");
        put(&mut header, 329, format!("{:07o}", entry.device.0).as_bytes());
        put(&mut header, 337, format!("{:07o}", entry.device.1).as_bytes());
        let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
        put(&mut header, 148, format!("{sum:06o}\0 ").as_bytes());
        self.bytes.extend_from_slice(&header);
        self.bytes.extend_from_slice(entry.data);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    /// Adds a regular file.
    pub fn file(self, name: &str, mode: u32, data: &[u8]) -> Self {
        self.entry(&Entry { name, mode, data, ..Entry::default() })
    }

    /// Adds a directory.
    pub fn directory(self, name: &str) -> Self {
        self.entry(&Entry { name, kind: kind::DIRECTORY, mode: 0o755, ..Entry::default() })
    }

    /// Adds a symbolic link.
    pub fn symlink(self, name: &str, link: &str) -> Self {
        self.entry(&Entry { name, kind: kind::SYMLINK, mode: 0o777, link, ..Entry::default() })
    }

    /// Adds a hard link.
    pub fn hard_link(self, name: &str, link: &str) -> Self {
        self.entry(&Entry { name, kind: kind::HARD_LINK, link, ..Entry::default() })
    }

    /// Adds a pax header for the entry that follows (POSIX.1-2001 pax: "LENGTH KEY=VALUE\n").
    pub fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut data = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let length = (rest..).find(|length| rest + length.to_string().len() == *length).unwrap();
            data.extend_from_slice(format!("{length} {key}=").as_bytes());
            data.extend_from_slice(value);
            data.push(b'\n');
        }
        self.entry(&Entry { name: "PaxHeaders/x", kind: kind::PAX, data: &data, ..Entry::default() })
    }

    /// The archive as it is so far.
    pub fn unfinished(self) -> Vec<u8> {
        self.bytes
    }

    /// The archive with its end.
    pub fn finish(mut self) -> Vec<u8> {
        self.bytes.resize(self.bytes.len() + 1024, 0);
        self.bytes
    }
}

fn put(header: &mut [u8; 512], offset: usize, bytes: &[u8]) {
    header[offset..offset + bytes.len()].copy_from_slice(bytes);
}
