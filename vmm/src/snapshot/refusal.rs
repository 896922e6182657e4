//! Why a snapshot is not resumed. Each kind has a name that never changes, for programs; the owner boots the machine then.

use thiserror::Error;

/// Why a snapshot is not resumed here.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Refusal {
    /// There is none: no `state`, or it cannot be read.
    #[error("{0}")]
    Missing(String),
    /// A file is shorter than it was.
    #[error("{what} has {found} bytes, and should have {wanted}")]
    Truncated {
        /// The file or its part.
        what: String,
        /// Bytes that there should be.
        wanted: u64,
        /// Bytes that there are.
        found: u64,
    },
    /// What was read is not what was written.
    #[error("{0}")]
    Corrupted(String),
    /// A newer flyrun wrote it.
    #[error("{0}; use a newer flyrun")]
    TooNew(String),
    /// The guest uses what this CPU does not have.
    #[error("{0}")]
    OtherCpu(String),
    /// The machine is to run another kernel.
    #[error("{0}")]
    OtherKernel(String),
    /// A disk is not as the guest knows it.
    #[error("{0}")]
    ChangedDisk(String),
    /// The machine that is to be has other parts than the one that was.
    #[error("{0}")]
    OtherMachine(String),
    /// KVM or a device here does not take what was saved.
    #[error("{0}")]
    Host(String),
}

impl Refusal {
    /// That a part has a version which is not known here.
    pub fn version(what: &str, version: u32, known: u32) -> Self {
        Self::TooNew(format!("{what} has version {version}, and those up to {known} are known here"))
    }

    /// The name of the kind, which never changes its meaning.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Missing(_) => "missing",
            Self::Truncated { .. } => "truncated",
            Self::Corrupted(_) => "corrupted",
            Self::TooNew(_) => "too-new",
            Self::OtherCpu(_) => "other-cpu",
            Self::OtherKernel(_) => "other-kernel",
            Self::ChangedDisk(_) => "changed-disk",
            Self::OtherMachine(_) => "other-machine",
            Self::Host(_) => "host",
        }
    }
}
