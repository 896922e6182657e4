//! Writes archives by hand, also such as no tool would write.

/// An entry; [`Item::bytes`] makes its header and data.
#[derive(Clone, Debug)]
pub struct Item {
    pub path: Vec<u8>,
    pub flag: u8,
    pub link: Vec<u8>,
    pub mode: u32,
    pub owner: (u32, u32),
    pub mtime: u64,
    pub device: (u32, u32),
    pub data: Vec<u8>,
    pub pax: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Item {
    pub fn new(flag: u8, path: impl AsRef<[u8]>) -> Self {
        Self {
            path: path.as_ref().to_vec(),
            flag,
            link: Vec::new(),
            mode: if flag == b'5' { 0o755 } else { 0o644 },
            owner: (0, 0),
            mtime: 1_000_000_000,
            device: (0, 0),
            data: Vec::new(),
            pax: Vec::new(),
        }
    }

    pub fn pax(mut self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Self {
        self.pax.push((key.as_ref().to_vec(), value.as_ref().to_vec()));
        self
    }

    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut pax = self.pax.clone();
        if self.path.len() > 100 {
            pax.push((b"path".to_vec(), self.path.clone()));
        }
        if self.link.len() > 100 {
            pax.push((b"linkpath".to_vec(), self.link.clone()));
        }
        if !pax.is_empty() {
            let records: Vec<u8> = pax.iter().flat_map(|(key, value)| record(key, value)).collect();
            bytes.extend(header(&Item { pax: Vec::new(), ..Item::new(b'x', "pax") }, records.len()));
            pad(&mut bytes, &records);
        }
        bytes.extend(header(self, self.data.len()));
        pad(&mut bytes, &self.data);
        bytes
    }
}

fn pad(bytes: &mut Vec<u8>, data: &[u8]) {
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
}

fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length.to_string().len() + rest != length {
        length = length.to_string().len() + rest;
    }
    [format!("{length} ").as_bytes(), key, b"=", value, b"\n"].concat()
}

pub fn header(item: &Item, size: usize) -> [u8; 512] {
    let mut block = [0u8; 512];
    let mut put = |at: usize, length: usize, bytes: &[u8]| {
        let length = length.min(bytes.len());
        block[at..at + length].copy_from_slice(&bytes[..length]);
    };
    put(0, 100, &item.path);
    put(100, 8, format!("{:07o}", item.mode).as_bytes());
    put(108, 8, format!("{:07o}", item.owner.0).as_bytes());
    put(116, 8, format!("{:07o}", item.owner.1).as_bytes());
    put(124, 12, format!("{size:011o}").as_bytes());
    put(136, 12, format!("{:011o}", item.mtime).as_bytes());
    put(148, 8, b"        ");
    put(156, 1, &[item.flag]);
    put(157, 100, &item.link);
    put(257, 8, b"ustar\x0000");
    put(329, 8, format!("{:07o}", item.device.0).as_bytes());
    put(337, 8, format!("{:07o}", item.device.1).as_bytes());
    seal(&mut block);
    block
}

/// Computes the checksum of a header that was changed.
pub fn seal(block: &mut [u8; 512]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

pub fn file(path: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> Item {
    Item { data: data.as_ref().to_vec(), ..Item::new(b'0', path) }
}

pub fn dir(path: impl AsRef<[u8]>) -> Item {
    Item::new(b'5', path)
}

pub fn symlink(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Item {
    Item { link: target.as_ref().to_vec(), ..Item::new(b'2', path) }
}

pub fn hard_link(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Item {
    Item { link: target.as_ref().to_vec(), ..Item::new(b'1', path) }
}

/// A whole archive.
pub fn tar(items: &[Item]) -> Vec<u8> {
    let mut bytes: Vec<u8> = items.iter().flat_map(Item::bytes).collect();
    bytes.extend([0; 1024]);
    bytes
}
