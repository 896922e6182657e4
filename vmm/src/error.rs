//! Why a machine could not be set up.

use std::io;

use thiserror::Error;

use crate::{
    boot::BootError, exit::VmExit, jail::NoJail, memory::MemoryError, snapshot::refusal::Refusal,
    validate::SpecError,
};

/// Why a machine could not be set up: one line, facts first, what to do last.
#[derive(Debug, Error)]
pub enum SetupError {
    /// The spec describes no machine.
    #[error("{0}")]
    Spec(#[from] SpecError),
    /// /dev/kvm does not open.
    #[error("{}", no_kvm(.0))]
    NoKvm(kvm_ioctls::Error),
    /// A KVM call failed that every usable KVM grants.
    #[error("{call}: {source}; `flyrun doctor` tells whether this host's KVM can be used")]
    Kvm {
        /// Name of the ioctl.
        call: &'static str,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel, initramfs, boot tables.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A file or another resource of the host.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, with its path.
        what: String,
        /// What the host said.
        source: io::Error,
    },
    /// The process cannot be locked up.
    #[error(transparent)]
    Jail(#[from] NoJail),
    /// A snapshot is not resumed.
    #[error("the snapshot cannot be resumed ({name}): {0}", name = .0.name())]
    Refused(#[from] Refusal),
    /// A disk does not open; the text names it.
    #[error("{0}")]
    Disk(String),
    /// More devices than interrupt lines.
    #[error("at most {0} virtio devices are possible")]
    TooManyDevices(u8),
    /// Two devices at one place: a mistake in this program.
    #[error("the range at {0:#x} is already taken by another device")]
    Overlap(u64),
}

impl SetupError {
    /// The exit code of `flyrun-vmm` for it.
    pub fn exit(&self) -> VmExit {
        match self {
            Self::Spec(_) => VmExit::Usage,
            Self::NoKvm(_) => VmExit::NoKvm,
            Self::Refused(_) => VmExit::Refused,
            _ => VmExit::Setup,
        }
    }

    /// For `map_err` behind a KVM call.
    pub fn kvm(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { call, source }
    }

    /// For `map_err` behind a call to the host.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// What a failed open of /dev/kvm means for the user.
pub fn no_kvm(error: &kvm_ioctls::Error) -> String {
    match error.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => {
            "there is no /dev/kvm: load kvm_intel or kvm_amd, enable virtualization in the firmware, or, in a virtual \
             machine, ask for nested virtualization"
                .to_owned()
        }
        libc::EACCES | libc::EPERM => {
            "no permission to open /dev/kvm: join its group (`sudo usermod -aG kvm $USER`, then log in again)".to_owned()
        }
        _ => format!("/dev/kvm does not open: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_its_exit_code_and_remedy() {
        let missing = SetupError::NoKvm(kvm_ioctls::Error::new(libc::ENOENT));
        assert_eq!(missing.exit(), VmExit::NoKvm);
        assert!(missing.to_string().contains("nested"));
        let denied = SetupError::NoKvm(kvm_ioctls::Error::new(libc::EACCES));
        assert!(denied.to_string().contains("group"));
        assert_eq!(SetupError::Spec(SpecError::Cpus(0)).exit(), VmExit::Usage);
    }
}
