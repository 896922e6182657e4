//! What a machine is given beside its configuration, over a connection of its own that is read once: secrets, and files.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The longest encoded delivery, in bytes.
pub const MAX_DELIVERY_BYTES: usize = 4 << 20;

/// All that is delivered. It is shown by nothing but its sizes.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delivery {
    /// `KEY=VALUE` entries of the environment, which win over those of the configuration.
    pub env: Vec<String>,
    /// Files, which are in memory and not on the machine's disk.
    pub files: Vec<File>,
}

/// One file.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// Absolute path in the root filesystem; directories above it are made.
    pub path: String,
    /// Whose it is.
    pub owner: Owner,
    /// What it contains.
    #[serde(with = "serde_bytes")]
    pub contents: Vec<u8>,
}

/// Whose a file is, and who may read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Owner {
    /// Root's, and everybody reads it: mode 0644.
    Root,
    /// The workload's user's, and nobody else reads it: mode 0400.
    Workload,
}

/// Why a delivery was refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum DeliveryError {
    /// It is longer than [`MAX_DELIVERY_BYTES`].
    #[error("a delivery of {0} bytes is longer than the {MAX_DELIVERY_BYTES} that are allowed")]
    TooLong(usize),
    /// It ended early.
    #[error("the host has sent {got} of {wanted} bytes")]
    Short {
        /// The bytes that came.
        got: usize,
        /// The bytes that were announced.
        wanted: usize,
    },
    /// It does not parse. The contents are not told.
    #[error("the delivery is damaged")]
    Damaged,
}

impl std::fmt::Debug for Delivery {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Delivery").field("env", &self.env.len()).field("files", &self.files).finish()
    }
}

impl std::fmt::Debug for File {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("File").field("path", &self.path).field("bytes", &self.contents.len()).finish()
    }
}

/// Encodes a delivery, with its length in front: four bytes, little-endian.
///
/// # Errors
/// [`DeliveryError::TooLong`].
pub fn encode_delivery(delivery: &Delivery) -> Result<Vec<u8>, DeliveryError> {
    let mut bytes = vec![0; 4];
    bytes = postcard::to_extend(delivery, bytes).map_err(|_| DeliveryError::Damaged)?;
    let length = bytes.len() - 4;
    if length > MAX_DELIVERY_BYTES {
        return Err(DeliveryError::TooLong(length));
    }
    if let Some(head) = bytes.first_chunk_mut::<4>() {
        *head = (length as u32).to_le_bytes();
    }
    Ok(bytes)
}

/// Decodes all that came over the connection.
///
/// # Errors
/// [`DeliveryError`] says what is wrong with it.
pub fn decode_delivery(bytes: &[u8]) -> Result<Delivery, DeliveryError> {
    let (head, body) = bytes.split_first_chunk::<4>().ok_or(DeliveryError::Short { got: 0, wanted: 4 })?;
    let wanted = u32::from_le_bytes(*head) as usize;
    if wanted > MAX_DELIVERY_BYTES {
        return Err(DeliveryError::TooLong(wanted));
    }
    if body.len() != wanted {
        return Err(DeliveryError::Short { got: body.len(), wanted });
    }
    postcard::from_bytes(body).map_err(|_| DeliveryError::Damaged)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delivery() -> Delivery {
        let contents = b"s3cret".to_vec();
        let file = File { path: "/etc/key".into(), owner: Owner::Workload, contents };
        Delivery { env: vec!["TOKEN=s3cret".into()], files: vec![file] }
    }

    #[test]
    fn a_delivery_comes_back_as_it_was_or_not_at_all() {
        let bytes = encode_delivery(&delivery()).unwrap();
        assert_eq!(decode_delivery(&bytes), Ok(delivery()));
        for length in 0..bytes.len() {
            assert!(matches!(decode_delivery(&bytes[..length]), Err(DeliveryError::Short { .. })));
        }
        let mut longer = bytes;
        longer.push(0);
        assert!(decode_delivery(&longer).is_err());
    }

    #[test]
    fn one_that_is_too_long_is_refused_on_both_sides() {
        let mut long = delivery();
        long.files[0].contents = vec![0; MAX_DELIVERY_BYTES];
        assert!(matches!(encode_delivery(&long), Err(DeliveryError::TooLong(_))));
        assert_eq!(decode_delivery(&[0xff; 4]), Err(DeliveryError::TooLong(u32::MAX as usize)));
    }

    #[test]
    fn what_is_printed_of_one_has_no_secret_in_it() {
        let told = format!("{:?}", delivery());
        assert!(told.contains("/etc/key") && !told.contains("s3cret"), "{told}");
    }
}
