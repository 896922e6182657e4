//! Secrets as a file: pure.
//!
//! ```text
//! "flyrun\0s" | version, u32 | key id, 8 bytes | nonce, 12 bytes | ChaCha20-Poly1305 (RFC 8439) of the contents
//! ```
//! Numbers are little-endian. The app's name and all before the nonce are authenticated too: no file passes for another app's.

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use thiserror::Error;
use zeroize::Zeroizing;

use super::key::{ID_BYTES, Key};

const MAGIC: [u8; 8] = *b"flyrun\0s";
const VERSION: u32 = 1;
const HEADER: usize = MAGIC.len() + 4 + ID_BYTES;
const PURPOSE: &str = "flyrun secrets: encryption 1";

/// Why a file was refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Refused {
    #[error("it is truncated: it has {0} bytes")]
    Truncated(usize),
    #[error("it is not a file of flyrun's secrets")]
    NotSecrets,
    #[error("it has version {0}, and this flyrun reads version {VERSION}")]
    Version(u32),
    #[error("it was encrypted with another key")]
    AnotherKey,
    #[error("it is damaged, or somebody has changed it")]
    Damaged,
}

/// Encrypts the contents for an app. The nonce is random, and never used twice with one key.
pub fn seal(key: &Key, app: &str, nonce: [u8; NONCE_LEN], contents: &[u8]) -> Result<Vec<u8>, Refused> {
    let header = header(key);
    let mut body = Zeroizing::new(contents.to_vec());
    let tag = cipher(key)?
        .seal_in_place_separate_tag(
            Nonce::assume_unique_for_key(nonce),
            authenticated(&header, app),
            &mut body,
        )
        .map_err(|_| Refused::Damaged)?;
    Ok([&header[..], &nonce, &body, tag.as_ref()].concat())
}

/// Decrypts what [`seal`] made for this app.
///
/// # Errors
/// [`Refused`] says what is wrong with it.
pub fn open(key: &Key, app: &str, file: &[u8]) -> Result<Zeroizing<Vec<u8>>, Refused> {
    let truncated = || Refused::Truncated(file.len());
    if MAGIC.starts_with(file) {
        return Err(truncated());
    }
    if !file.starts_with(&MAGIC) {
        return Err(Refused::NotSecrets);
    }
    let (head, rest) = file.split_at_checked(HEADER).ok_or_else(truncated)?;
    let (nonce, sealed) = rest.split_first_chunk::<NONCE_LEN>().ok_or_else(truncated)?;
    if sealed.len() < CHACHA20_POLY1305.tag_len() {
        return Err(truncated());
    }
    let version = head.get(MAGIC.len()..).and_then(|rest| rest.first_chunk::<4>());
    let version = u32::from_le_bytes(*version.ok_or_else(truncated)?);
    if version != VERSION {
        return Err(Refused::Version(version));
    }
    if head != header(key) {
        return Err(Refused::AnotherKey);
    }
    let mut body = Zeroizing::new(sealed.to_vec());
    let length = cipher(key)?
        .open_in_place(Nonce::assume_unique_for_key(*nonce), authenticated(head, app), &mut body)
        .map_err(|_| Refused::Damaged)?
        .len();
    body.truncate(length);
    Ok(body)
}

fn header(key: &Key) -> Vec<u8> {
    [&MAGIC[..], &VERSION.to_le_bytes(), &key.id()].concat()
}

fn authenticated(header: &[u8], app: &str) -> Aad<Vec<u8>> {
    Aad::from([header, app.as_bytes()].concat())
}

fn cipher(key: &Key) -> Result<LessSafeKey, Refused> {
    let key = UnboundKey::new(&CHACHA20_POLY1305, &*key.derive(PURPOSE)).map_err(|_| Refused::Damaged)?;
    Ok(LessSafeKey::new(key))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sealed() -> Vec<u8> {
        seal(&Key::example(1), "shop", [7; NONCE_LEN], b"contents").unwrap()
    }

    #[test]
    fn what_was_sealed_is_opened_with_the_same_key_for_the_same_app() {
        let file = sealed();
        assert_eq!(open(&Key::example(1), "shop", &file).unwrap().as_slice(), b"contents");
        assert_eq!(open(&Key::example(2), "shop", &file), Err(Refused::AnotherKey));
        assert_eq!(open(&Key::example(1), "shop2", &file), Err(Refused::Damaged));
        assert!(!file.windows(8).any(|window| window == b"contents"));
    }

    #[test]
    fn each_truncation_is_refused() {
        let file = sealed();
        for length in 0..file.len() {
            let refused = open(&Key::example(1), "shop", &file[..length]).unwrap_err();
            let short = length < HEADER + NONCE_LEN + 16;
            assert_eq!(refused, if short { Refused::Truncated(length) } else { Refused::Damaged });
        }
        assert_eq!(open(&Key::example(1), "shop", b"something else"), Err(Refused::NotSecrets));
    }

    proptest! {
        #[test]
        fn each_changed_bit_is_refused(at in 0usize..1000, bit in 0u8..8) {
            let mut file = sealed();
            let at = at % file.len();
            file[at] ^= 1 << bit;
            prop_assert!(open(&Key::example(1), "shop", &file).is_err());
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80), real in any::<bool>()) {
            let mut file = bytes;
            if real {
                file.splice(..0, header(&Key::example(1)));
            }
            prop_assert!(open(&Key::example(1), "shop", &file).is_err());
        }
    }
}
