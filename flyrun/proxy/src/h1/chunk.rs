//! The chunked coding (RFC 9112, section 7.1), decoded. Pure.

use bytes::{Buf, Bytes, BytesMut};

use super::head::{self, Scan};
use crate::wire::{Broken, Frame};

/// A chunk's first line, with its extensions, which are ignored.
const MAX_LINE_BYTES: usize = 1024;
/// The fields after the last chunk.
const MAX_TRAILER_BYTES: usize = 16 << 10;

/// Where a body is.
#[derive(Debug)]
pub(crate) enum Chunks {
    /// Before a chunk's first line. ## Line => (Data | Trailers)
    Line,
    /// In a chunk of which so much is left. ## Data => (Data | After)
    Data(u64),
    /// Before the line end that closes a chunk. ## After => (Line)
    After,
    /// After the last chunk. ## Trailers => (End)
    Trailers(Scan),
    End,
}

/// What came of it.
pub(crate) enum Step {
    Frame(Frame),
    /// More bytes are wanted.
    More,
    End,
}

impl Chunks {
    pub fn new() -> Chunks {
        Chunks::Line
    }

    /// Takes the next piece from `buffer`.
    pub fn next(&mut self, buffer: &mut BytesMut) -> Result<Step, Broken> {
        loop {
            match self {
                Chunks::Line => {
                    let Some(size) = take_line(buffer)? else { return Ok(Step::More) };
                    *self = if size == 0 { Chunks::Trailers(Scan::default()) } else { Chunks::Data(size) };
                }
                Chunks::Data(left) => {
                    if buffer.is_empty() {
                        return Ok(Step::More);
                    }
                    let count = usize::try_from(*left).unwrap_or(usize::MAX).min(buffer.len());
                    let data = buffer.split_to(count).freeze();
                    let left = *left - count as u64;
                    *self = if left == 0 { Chunks::After } else { Chunks::Data(left) };
                    return Ok(Step::Frame(Frame::Data(data)));
                }
                Chunks::After => match buffer.get(..2) {
                    Some(b"\r\n") => {
                        buffer.advance(2);
                        *self = Chunks::Line;
                    }
                    None if buffer.first().is_none_or(|byte| *byte == b'\r') => return Ok(Step::More),
                    _ => return Err(Broken::Malformed("A chunk is longer than it says.")),
                },
                Chunks::Trailers(scan) => {
                    let Some(fields) = take_trailers(buffer, scan)? else { return Ok(Step::More) };
                    *self = Chunks::End;
                    if fields.len() > 2 {
                        let fields =
                            head::trailers(&fields).map_err(|refused| Broken::Malformed(refused.why))?;
                        if !fields.is_empty() {
                            return Ok(Step::Frame(Frame::Trailers(fields)));
                        }
                    }
                }
                Chunks::End => return Ok(Step::End),
            }
        }
    }
}

/// A chunk's size, if its first line is whole.
fn take_line(buffer: &mut BytesMut) -> Result<Option<u64>, Broken> {
    const BAD: Broken = Broken::Malformed("A chunk's size is not a number.");
    let start = buffer.get(..MAX_LINE_BYTES.min(buffer.len())).unwrap_or_default();
    let Some(end) = memchr::memchr(b'\n', start) else {
        // Refused as early as it can be, so that nobody waits for the rest.
        let digits = start.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
        let is_plausible =
            digits <= 16 && start.get(digits).is_none_or(|byte| digits > 0 && b"\r; \t".contains(byte));
        return if is_plausible && buffer.len() < MAX_LINE_BYTES { Ok(None) } else { Err(BAD) };
    };
    let line = start.get(..end).and_then(|line| line.strip_suffix(b"\r")).ok_or(BAD)?;
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let (size, extension) = line.split_at(digits);
    if !is_extension(extension) || !(1..=16).contains(&digits) {
        return Err(BAD);
    }
    let size =
        std::str::from_utf8(size).ok().and_then(|size| u64::from_str_radix(size, 16).ok()).ok_or(BAD)?;
    buffer.advance(end + 1);
    Ok(Some(size))
}

/// `BWS ";" …` without control characters, or nothing.
fn is_extension(text: &[u8]) -> bool {
    let begins = text.is_empty() || text.trim_ascii_start().starts_with(b";");
    begins && text.iter().all(|byte| *byte == b'\t' || !byte.is_ascii_control())
}

/// The fields after the last chunk, with the empty line.
fn take_trailers(buffer: &mut BytesMut, scan: &mut Scan) -> Result<Option<Bytes>, Broken> {
    if buffer.starts_with(b"\r\n") {
        return Ok(Some(buffer.split_to(2).freeze()));
    }
    if buffer.len() < 2 && buffer.first().is_none_or(|byte| *byte == b'\r') {
        return Ok(None);
    }
    let end = scan.end(buffer, MAX_TRAILER_BYTES).map_err(|refused| Broken::Malformed(refused.why))?;
    Ok(end.map(|end| buffer.split_to(end).freeze()))
}
