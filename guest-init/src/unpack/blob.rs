//! The stream of a layer: decompressed, bounded, and checked against its digest.

use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::MultiGzDecoder;
use protocol::{Compression, FailureKind};
use sha2::{Digest, Sha256};

use super::layer::io_failure;
use crate::failure::Failure;

/// Reads of the device and of the decompressor: large enough that neither's overhead shows.
const BUFFER_BYTES: usize = 128 * 1024;

/// The uncompressed bytes of a layer blob.
pub struct Blob<'a> {
    stream: BufReader<Checked<Box<dyn Read + 'a>>>,
}

struct Checked<R> {
    inner: R,
    digest: Sha256,
    left: u64,
}

impl<R: Read> Read for Checked<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.left = self.left.checked_sub(count as u64).ok_or_else(|| {
            let message = "the layers unpack to more bytes than the limit allows";
            io::Error::other(Failure::new(FailureKind::LimitExceeded, message))
        })?;
        self.digest.update(buffer.get(..count).unwrap_or_default());
        Ok(count)
    }
}

impl<'a> Blob<'a> {
    /// Reads this compressed stream, of which at most `limit` uncompressed bytes are allowed.
    ///
    /// # Errors
    /// [`FailureKind::Setup`] when the decompressor cannot be set up for want of memory.
    pub fn new(raw: impl Read + 'a, compression: Compression, limit: u64) -> Result<Self, Failure> {
        let mut raw = BufReader::with_capacity(BUFFER_BYTES, raw);
        let head = raw.fill_buf().map_err(io_failure)?;
        let inner: Box<dyn Read + 'a> = match recognize(head, compression) {
            Compression::None => Box::new(raw),
            Compression::Gzip => Box::new(MultiGzDecoder::new(raw)),
            Compression::Zstd => {
                let setup = |error| Failure::new(FailureKind::Setup, format!("cannot set zstd up: {error}"));
                Box::new(zstd::Decoder::with_buffer(raw).map_err(setup)?)
            }
        };
        let checked = Checked { inner, digest: Sha256::new(), left: limit };
        Ok(Self { stream: BufReader::with_capacity(BUFFER_BYTES, checked) })
    }

    /// Reads to the end and compares the digest of all bytes; returns how many of the limit are left.
    ///
    /// # Errors
    /// [`FailureKind::BadLayer`] when they are not what was promised.
    pub fn finish(mut self, diff_id: &[u8; 32]) -> Result<u64, Failure> {
        loop {
            let count = match self.stream.fill_buf() {
                Ok([]) => break,
                Ok(chunk) => chunk.len(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => return Err(io_failure(error)),
            };
            self.stream.consume(count);
        }
        let Checked { digest, left, .. } = self.stream.into_inner();
        let found: [u8; 32] = digest.finalize().into();
        if &found == diff_id {
            return Ok(left);
        }
        let message =
            format!("its content has the digest sha256:{}, not sha256:{}", hex(&found), hex(diff_id));
        Err(Failure::new(FailureKind::BadLayer, message))
    }
}

/// The compression that a blob has, by its first bytes. Tools mislabel layers (skopeo 1.9 calls plain ones gzip), and
/// the digest of the content decides in the end.
fn recognize(head: &[u8], declared: Compression) -> Compression {
    match head {
        [0x1f, 0x8b, ..] => Compression::Gzip,
        // A frame, or a skippable one (RFC 8878, section 3.1).
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Compression::Zstd,
        // Too short to be a tar.
        [] | [_] | [_, _] | [_, _, _] => declared,
        _ => Compression::None,
    }
}

impl Read for Blob<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.read(buffer)
    }
}

impl BufRead for Blob<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.stream.fill_buf()
    }

    fn consume(&mut self, amount: usize) {
        self.stream.consume(amount);
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression as Level, write::GzEncoder};

    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Level::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn a_mislabelled_blob_is_recognized() {
        let tar = b"plain bytes that are no tar";
        for declared in [Compression::None, Compression::Gzip, Compression::Zstd] {
            assert_eq!(read(tar, declared, 1000).unwrap(), tar);
            assert_eq!(read(&gzip(tar), declared, 1000).unwrap(), tar);
        }
    }

    fn digest(bytes: &[u8]) -> [u8; 32] {
        Sha256::digest(bytes).into()
    }

    fn read(raw: &[u8], compression: Compression, limit: u64) -> Result<Vec<u8>, Failure> {
        let mut blob = Blob::new(raw, compression, limit)?;
        let mut bytes = Vec::new();
        blob.read_to_end(&mut bytes).map_err(io_failure)?;
        blob.finish(&digest(&bytes))?;
        Ok(bytes)
    }

    #[test]
    fn every_compression_gives_the_same_bytes() {
        let bytes: Vec<u8> = (0..500_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        let zstd = zstd::encode_all(&bytes[..], 3).unwrap();
        for (raw, compression) in
            [(bytes.clone(), Compression::None), (gzip(&bytes), Compression::Gzip), (zstd, Compression::Zstd)]
        {
            assert!(read(&raw, compression, u64::MAX).unwrap() == bytes, "{compression:?}");
        }
    }

    #[test]
    fn several_members_and_frames_are_one_stream() {
        assert_eq!(read(&[gzip(b"ab"), gzip(b"cd")].concat(), Compression::Gzip, 9).unwrap(), b"abcd");
        let frame = |bytes: &[u8]| zstd::encode_all(bytes, 3).unwrap();
        // A skippable frame, as zstd:chunked puts its table of contents into.
        let skippable = [0x50, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 9, 9].to_vec();
        let raw = [frame(b"ab"), frame(b"cd"), skippable].concat();
        assert_eq!(read(&raw, Compression::Zstd, 9).unwrap(), b"abcd");
    }

    #[test]
    fn a_truncated_stream_is_an_error_wherever_it_ends() {
        let bytes = vec![7; 10_000];
        for (raw, compression) in
            [(gzip(&bytes), Compression::Gzip), (zstd::encode_all(&bytes[..], 3).unwrap(), Compression::Zstd)]
        {
            for length in 1..raw.len() {
                let failure = read(&raw[..length], compression, u64::MAX).unwrap_err();
                assert_eq!(failure.kind, FailureKind::BadLayer, "{compression:?} {length}");
            }
        }
    }

    #[test]
    fn a_bomb_is_stopped_at_the_limit() {
        let failure = read(&gzip(&vec![0; 1 << 20]), Compression::Gzip, 1 << 19).unwrap_err();
        assert_eq!(failure.kind, FailureKind::LimitExceeded);
    }

    #[test]
    fn another_digest_is_refused_with_both_named() {
        let blob = Blob::new(&b"abc"[..], Compression::None, 10).unwrap();
        let failure = blob.finish(&[0x11; 32]).unwrap_err();
        assert_eq!(failure.kind, FailureKind::BadLayer);
        assert!(failure.message.contains("ba7816bf") && failure.message.contains("1111"), "{failure}");
    }

    #[test]
    fn bytes_behind_the_archive_belong_to_the_digest() {
        let mut blob = Blob::new(&b"abc"[..], Compression::None, 10).unwrap();
        blob.consume(0);
        blob.read_exact(&mut [0]).unwrap();
        assert_eq!(blob.finish(&digest(b"abc")), Ok(7));
    }
}
