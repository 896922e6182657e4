//! Frames on the control connection: a length of four bytes, little-endian, then that many bytes of postcard.

use std::io::{self, Read, Write};

use serde::{Serialize, de::DeserializeOwned};
use thiserror::Error;

/// The largest body of a frame in bytes. A longer one is an attack or an error, never a message.
pub const MAX_FRAME_BYTES: usize = 64 * 1024;

/// Why a frame could not be read or written.
#[derive(Debug, Error)]
pub enum FrameError {
    /// The connection failed, or ended within a frame.
    #[error("the control connection failed: {0}")]
    Io(#[from] io::Error),
    /// The peer announced a frame beyond the bound.
    #[error("a frame of {0} bytes was announced, {MAX_FRAME_BYTES} are allowed")]
    TooLong(usize),
    /// The body is not a message of this protocol version.
    #[error("a frame does not parse: {0}")]
    Damaged(#[from] postcard::Error),
}

/// Encodes one message with its length in front.
///
/// # Errors
/// [`FrameError::TooLong`] if the message exceeds [`MAX_FRAME_BYTES`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let body = postcard::to_allocvec(message)?;
    if body.len() > MAX_FRAME_BYTES {
        return Err(FrameError::TooLong(body.len()));
    }
    let mut frame = Vec::with_capacity(4 + body.len());
    frame.extend_from_slice(&(body.len() as u32).to_le_bytes());
    frame.extend_from_slice(&body);
    Ok(frame)
}

/// Writes one message.
///
/// # Errors
/// As [`encode`], and whatever the writer fails with.
pub fn write<T: Serialize>(writer: &mut impl Write, message: &T) -> Result<(), FrameError> {
    writer.write_all(&encode(message)?)?;
    Ok(())
}

/// Reads one message; `None` at a clean end between two frames. Blocks until a whole frame is there.
///
/// # Errors
/// [`FrameError`]; after any, the connection is out of step and must be closed.
pub fn read<T: DeserializeOwned>(reader: &mut impl Read) -> Result<Option<T>, FrameError> {
    let mut decoder = Decoder::default();
    loop {
        if let Some(message) = decoder.decode()? {
            return Ok(Some(message));
        }
        let wanted = decoder.wanted();
        let mut chunk = vec![0; wanted];
        match reader.read(&mut chunk) {
            Ok(0) if decoder.is_empty() => return Ok(None),
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(count) => decoder.push(&chunk[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Takes bytes as they arrive and gives whole messages, for a reader that must not block.
#[derive(Clone, Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
}

impl Decoder {
    /// Adds bytes from the connection.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Whether no frame has been begun.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// How many bytes have arrived that are not yet taken as messages.
    pub fn len(&self) -> usize {
        self.buffer.len()
    }

    /// How many bytes are missing for the next step (the length, or the whole frame); at least 1 and bounded.
    pub fn wanted(&self) -> usize {
        let total = match self.buffer.first_chunk::<4>() {
            None => 4,
            Some(length) => 4 + (u32::from_le_bytes(*length) as usize).min(MAX_FRAME_BYTES),
        };
        total.saturating_sub(self.buffer.len()).max(1)
    }

    /// The next whole message, if one has arrived.
    ///
    /// # Errors
    /// [`FrameError::TooLong`] and [`FrameError::Damaged`].
    pub fn decode<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        let Some(length) = self.buffer.first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_le_bytes(*length) as usize;
        if length > MAX_FRAME_BYTES {
            return Err(FrameError::TooLong(length));
        }
        let Some(body) = self.buffer.get(4..4 + length) else { return Ok(None) };
        let message = postcard::from_bytes(body)?;
        self.buffer.drain(..4 + length);
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{FromGuest, ToGuest, TtySize};

    #[test]
    fn frames_pass_through_a_connection_that_delivers_single_bytes() {
        struct OneByte<'a>(&'a [u8]);
        impl Read for OneByte<'_> {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                let Some((first, rest)) = self.0.split_first() else { return Ok(0) };
                buffer[0] = *first;
                self.0 = rest;
                Ok(1)
            }
        }
        let mut bytes = Vec::new();
        write(&mut bytes, &ToGuest::Signal { signal: 15 }).unwrap();
        write(&mut bytes, &ToGuest::Resize(TtySize { rows: 24, cols: 80 })).unwrap();
        let mut reader = OneByte(&bytes);
        assert_eq!(read(&mut reader).unwrap(), Some(ToGuest::Signal { signal: 15 }));
        assert_eq!(read(&mut reader).unwrap(), Some(ToGuest::Resize(TtySize { rows: 24, cols: 80 })));
        assert_eq!(read::<ToGuest>(&mut reader).unwrap(), None);
    }

    #[test]
    fn a_length_beyond_the_bound_is_refused_before_its_body_arrives() {
        let mut decoder = Decoder::default();
        decoder.push(&u32::MAX.to_le_bytes());
        assert!(matches!(decoder.decode::<FromGuest>(), Err(FrameError::TooLong(_))));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic_or_grow(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let mut decoder = Decoder::default();
            for chunk in bytes.chunks(7) {
                decoder.push(chunk);
                while let Ok(Some(_)) = decoder.decode::<FromGuest>() {}
                prop_assert!(decoder.wanted() <= MAX_FRAME_BYTES + 4);
            }
        }
    }
}
