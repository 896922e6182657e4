//! The digest of a file with holes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use images::Digest;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

const BLOCK: usize = 4096;
/// Bytes read at a time, in whole blocks.
const CHUNK: usize = 64 * BLOCK;

/// The digest of a file, as the archive's description has it.
///
/// # Errors
/// The system's.
pub fn digest(file: &File) -> io::Result<Digest> {
    let bytes = file.metadata()?.len();
    let mut hash = Sha256::new();
    let mut chunk = vec![0; CHUNK];
    let mut at = 0;
    while at < bytes {
        // A filesystem that knows no holes says that all is data.
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let hole = seek(file, SeekFrom::Hole(data))?;
        at = at.max(data / BLOCK as u64 * BLOCK as u64);
        let end = hole.next_multiple_of(BLOCK as u64).min(bytes);
        if end <= at {
            return Err(io::ErrorKind::InvalidData.into());
        }
        while at < end {
            let count = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
            let part = chunk.get_mut(..count).unwrap_or_default();
            file.read_exact_at(part, at)?;
            for (block, number) in part.chunks(BLOCK).zip(at / BLOCK as u64..) {
                if block.iter().any(|byte| *byte != 0) {
                    hash.update(number.to_le_bytes());
                    hash.update(block);
                }
            }
            at += count as u64;
        }
    }
    hash.update(bytes.to_le_bytes());
    Ok(Digest::from_bytes(hash.finalize().into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: u64, parts: &[(u64, &[u8])]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        parts.iter().for_each(|(at, part)| file.write_all_at(part, *at).unwrap());
        file
    }

    #[test]
    fn it_is_the_same_wherever_the_holes_are() {
        let sparse = file(1 << 20, &[(5000, b"data"), ((1 << 20) - 3, b"end")]);
        let mut all = vec![0; 1 << 20];
        all[5000..5004].copy_from_slice(b"data");
        all[(1 << 20) - 3..].copy_from_slice(b"end");
        assert_eq!(digest(&sparse).unwrap(), digest(&file(1 << 20, &[(0, &all)])).unwrap());
        let mut hash = Sha256::new();
        hash.update(1u64.to_le_bytes());
        hash.update(&all[4096..8192]);
        hash.update(255u64.to_le_bytes());
        hash.update(&all[255 * 4096..]);
        hash.update((1u64 << 20).to_le_bytes());
        assert_eq!(digest(&sparse).unwrap(), Digest::from_bytes(hash.finalize().into()));
    }

    #[test]
    fn another_length_place_or_content_is_another_digest() {
        let files = [
            file(0, &[]),
            file(10_000, &[]),
            file(10_001, &[]),
            file(10_000, &[(0, b"a")]),
            file(10_000, &[(4096, b"a")]),
            file(10_000, &[(9999, b"a")]),
        ];
        let digests: std::collections::BTreeSet<_> = files.iter().map(|file| digest(file).unwrap()).collect();
        assert_eq!(digests.len(), files.len());
    }

    #[test]
    fn a_file_of_many_gigabytes_of_holes_costs_nothing() {
        digest(&file(1 << 42, &[(1 << 41, b"data")])).unwrap();
    }
}
