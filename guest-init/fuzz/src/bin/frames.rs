//! The control connection and sessions, in both directions: bytes in any pieces give messages or an error, within bounds.
#![no_main]
#![allow(clippy::expect_used)]

use libfuzzer_sys::fuzz_target;
use protocol::{
    FromGuest, ToGuest, frame,
    session::{FromSession, Request, ToSession},
};

fn decode<T>(data: &[u8], piece: usize)
where
    T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let mut decoder = frame::Decoder::default();
    for piece in data.chunks(piece) {
        decoder.push(piece);
        loop {
            assert!(decoder.wanted() <= frame::MAX_FRAME_BYTES + 4);
            match decoder.decode::<T>() {
                Ok(Some(message)) => {
                    let mut again = frame::Decoder::default();
                    again.push(&frame::encode(&message).expect("what was decoded can be encoded"));
                    assert_eq!(again.decode::<T>().expect("it decodes"), Some(message));
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
    let _ = frame::read::<T>(&mut &data[..]);
}

fuzz_target!(|data: &[u8]| {
    let Some((piece, data)) = data.split_first() else { return };
    let piece = usize::from(*piece).max(1);
    decode::<FromGuest>(data, piece);
    decode::<ToGuest>(data, piece);
    decode::<Request>(data, piece);
    decode::<ToSession>(data, piece);
    decode::<FromSession>(data, piece);
});
