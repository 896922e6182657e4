//! What can be known of a snapshot by reading its beginning: JSON, so that any tool can.

use serde::{Deserialize, Serialize};

use super::{
    identity::{DiskId, KernelId},
    refusal::Refusal,
    text::TextId,
};
use crate::spec::VmSpec;

/// The header. Fields that this flyrun does not know are ignored: what must not be is in a section's version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The version of the flyrun that wrote it.
    pub flyrun: String,
    /// When, in ms since 1970.
    pub taken_unix_ms: u64,
    /// The machine, with the paths of its life before.
    pub spec: VmSpec,
    /// The CPU that the guest saw.
    pub cpu: CpuSummary,
    /// The kernel that runs in it; `None` where its file was gone when the machine started.
    pub kernel: Option<KernelId>,
    /// Its disks, in the order of the spec; `None` where the guest has not read any yet, so that they may be others.
    pub disks: Option<Vec<DiskId>>,
    /// Its memory.
    pub memory: MemorySummary,
    /// The part of its memory that other machines with this kernel have too, where it is known and was not written to.
    #[serde(default)]
    pub text: Option<TextId>,
}

/// The CPU that the guest saw.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuSummary {
    /// As CPUID has it, such as `GenuineIntel`.
    pub vendor: String,
    /// With the extended family added.
    pub family: u32,
    /// With the extended model in the upper bits.
    pub model: u32,
    /// The stepping.
    pub stepping: u32,
    /// SHA-256 of the CPUID leaves that have feature bits.
    pub features: String,
}

/// Guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemorySummary {
    /// Its size.
    pub bytes: u64,
    /// Whether `memory` holds only what differs from `base`.
    pub base: bool,
    /// CRC-32 of all pages that are not zero, each behind its number, if its writer was asked for one.
    #[serde(default)]
    pub checksum: Option<u32>,
}

impl Header {
    /// The bytes that [`Header::from_json`] reads.
    ///
    /// # Errors
    /// A path is not UTF-8.
    pub fn to_json(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec(self)
    }

    /// Reads a header whose checksum is right.
    ///
    /// # Errors
    /// It is none, or one with a machine that this flyrun cannot describe.
    pub fn from_json(bytes: &[u8]) -> Result<Self, Refusal> {
        serde_json::from_slice(bytes).map_err(|error| {
            match serde_json::from_slice::<serde_json::Value>(bytes) {
                // Whoever wrote it with a right checksum meant it: a newer flyrun's machine has parts unknown here.
                Ok(value) => {
                    let writer = value.get("flyrun").and_then(|it| it.as_str()).unwrap_or("?");
                    let writer: String = writer.chars().filter(|c| c.is_ascii_graphic()).take(40).collect();
                    Refusal::TooNew(format!("the header was written by flyrun {writer}: {error}"))
                }
                Err(error) => Refusal::Corrupted(format!("the header is no JSON: {error}")),
            }
        })
    }
}
