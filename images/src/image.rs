//! An image in the store, and the words to speak of it.

use std::{fmt, path::PathBuf, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{Digest, Error, ImageConfig};

/// An image whose manifest, configuration and layers are in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The canonical name it was pulled by: [`Reference::canonical_name`](crate::Reference::canonical_name).
    pub name: String,
    /// Digest of the manifest of this platform (not of the index above it).
    pub manifest_digest: Digest,
    /// Digest of the configuration blob: docker's image id.
    pub config_digest: Digest,
    /// What to run, and how.
    pub config: ImageConfig,
    /// The layers, lowest first. At least one.
    pub layers: Vec<Layer>,
    /// Name of the unpacked root filesystem: the layers' chain id (OCI image spec, config.md).
    pub chain_id: Digest,
}

impl Image {
    /// Bytes of the layer blobs as they are stored.
    pub fn layer_bytes(&self) -> u64 {
        self.layers.iter().fold(0, |sum, layer| sum.saturating_add(layer.size))
    }
}

/// One layer of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Digest of the blob as it is stored.
    pub digest: Digest,
    /// Bytes of the blob as it is stored.
    pub size: u64,
    /// How the blob is compressed.
    pub compression: Compression,
    /// Digest of the uncompressed tar, as the configuration promises it; whoever unpacks checks it.
    pub diff_id: Digest,
    /// Where the blob is.
    pub path: PathBuf,
}

/// Compression of a layer blob, by its media type (OCI image spec, layer.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// A plain tar.
    None,
    /// gzip (RFC 1952).
    Gzip,
    /// Zstandard (RFC 8878).
    Zstd,
}

/// An operating system and a processor, by Go's names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// Such as `linux`.
    pub os: String,
    /// Such as `amd64`.
    pub architecture: String,
    /// Such as `v8`; none matches every variant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl Default for Platform {
    /// The one that flyrun's machines are: `linux/amd64`.
    fn default() -> Self {
        Self { os: "linux".into(), architecture: "amd64".into(), variant: None }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.os, self.architecture)?;
        self.variant.as_ref().map_or(Ok(()), |variant| write!(formatter, "/{variant}"))
    }
}

impl FromStr for Platform {
    type Err = Error;

    /// Parses `os/architecture[/variant]`.
    fn from_str(text: &str) -> Result<Self, Error> {
        let valid = |part: &&str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric());
        let parts: Vec<&str> = text.splitn(4, '/').collect();
        match parts.as_slice() {
            [os, architecture] if parts.iter().all(valid) => {
                Ok(Self { os: (*os).into(), architecture: (*architecture).into(), variant: None })
            }
            [os, architecture, variant] if parts.iter().all(valid) => Ok(Self {
                os: (*os).into(),
                architecture: (*architecture).into(),
                variant: Some((*variant).into()),
            }),
            _ => Err(Error::Platform { text: text.chars().take(100).collect() }),
        }
    }
}
