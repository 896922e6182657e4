//! Directories of the host, by virtiofs.

use protocol::ShareConfig;
use rustix::mount::MountFlags;

use super::volumes::check_path;
use crate::{failure::Failure, pid1::mount_at};

/// Mounts one. Its driver is in the kernel and has found the device before PID 1 began.
///
/// # Errors
/// [`protocol::FailureKind::BadConfig`] for a path that is none, [`protocol::FailureKind::Setup`] naming the mount.
pub fn mount_share(share: &ShareConfig) -> Result<(), Failure> {
    check_path(&share.path)?;
    let flags = if share.read_only { MountFlags::RDONLY } else { MountFlags::empty() };
    mount_at(&share.tag, &share.path, "virtiofs", flags, "")
}

#[cfg(test)]
mod tests {
    use protocol::FailureKind;

    use super::*;

    #[test]
    fn a_path_must_lead_somewhere_below_the_root() {
        for path in ["", "data", "/", "/a/../b"] {
            let share = ShareConfig { tag: "fs0".into(), path: path.into(), read_only: false };
            assert_eq!(mount_share(&share).unwrap_err().kind, FailureKind::BadConfig, "{path}");
        }
    }
}
