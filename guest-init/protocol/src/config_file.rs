//! The boot configuration as a file: magic, version, length-delimited postcard.

use thiserror::Error;

use crate::{BootConfig, PROTOCOL_VERSION};

/// The first bytes of an encoded configuration; the version follows as four bytes, little-endian.
pub const MAGIC: [u8; 8] = *b"flyrun\0c";

/// Why a configuration was refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// The file does not start with [`MAGIC`].
    #[error("the boot configuration does not start with flyrun's magic")]
    NotAConfig,
    /// Host and guest-init come from different versions of flyrun.
    #[error(
        "the boot configuration has version {found}, this guest-init reads version {PROTOCOL_VERSION}: install flyrun and its guest-init from one build"
    )]
    Version {
        /// The version found in the file.
        found: u32,
    },
    /// The contents do not parse.
    #[error("the boot configuration is damaged: {0}")]
    Damaged(postcard::Error),
}

/// Encodes a configuration for [`crate::CONFIG_PATH`].
///
/// # Errors
/// [`ConfigError::Damaged`] if it cannot be serialized, which no value of the type causes short of lack of memory.
pub fn encode_config(config: &BootConfig) -> Result<Vec<u8>, ConfigError> {
    let mut bytes = Vec::with_capacity(512);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&PROTOCOL_VERSION.to_le_bytes());
    bytes.extend_from_slice(&postcard::to_allocvec(config).map_err(ConfigError::Damaged)?);
    Ok(bytes)
}

/// Decodes what [`encode_config`] made.
///
/// # Errors
/// [`ConfigError`] says whether it is no configuration, one of another version, or a damaged one.
pub fn decode_config(bytes: &[u8]) -> Result<BootConfig, ConfigError> {
    let rest = bytes.strip_prefix(&MAGIC).ok_or(ConfigError::NotAConfig)?;
    let (version, body) = rest.split_first_chunk::<4>().ok_or(ConfigError::NotAConfig)?;
    let found = u32::from_le_bytes(*version);
    if found != PROTOCOL_VERSION {
        return Err(ConfigError::Version { found });
    }
    postcard::from_bytes(body).map_err(ConfigError::Damaged)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RunConfig;

    fn config() -> BootConfig {
        BootConfig::Run(Box::new(RunConfig { argv: vec!["sh".into()], ..RunConfig::default() }))
    }

    #[test]
    fn a_config_comes_back_as_it_was() {
        let config = config();
        assert_eq!(decode_config(&encode_config(&config).unwrap()).unwrap(), config);
    }

    #[test]
    fn another_version_is_named() {
        let mut bytes = encode_config(&config()).unwrap();
        bytes[8] = 99;
        let error = decode_config(&bytes).unwrap_err();
        assert_eq!(error, ConfigError::Version { found: 99 });
        assert!(error.to_string().contains("version 99"));
    }

    #[test]
    fn every_truncation_is_refused() {
        let bytes = encode_config(&config()).unwrap();
        for length in 0..bytes.len() {
            assert!(decode_config(&bytes[..length]).is_err(), "{length} bytes were accepted");
        }
    }
}
