//! Extended attributes of entries.

use protocol::FailureKind;
use rustix::{
    fs::{XattrFlags, llistxattr, lremovexattr, lsetxattr},
    io::Errno,
};

use super::tree::kernel_failure;
use crate::failure::Failure;

/// The kernel's bound of a list of names (XATTR_LIST_MAX).
const MAX_LIST_BYTES: usize = 65_536;

/// Attributes by which overlayfs itself marks its layers. Guest-init makes the image an overlay's lower layer, where
/// they would hide or redirect what the image shows.
fn belongs_to_overlayfs(name: &[u8]) -> bool {
    name.starts_with(b"trusted.overlay.")
}

/// Sets an entry's attributes. What the filesystem does not support is left out, except file capabilities, without
/// which a program would start and fail later.
///
/// # Errors
/// [`FailureKind::BadLayer`] naming the attribute, [`FailureKind::NoSpace`].
pub fn set(path: &[u8], xattrs: &[(Vec<u8>, Vec<u8>)]) -> Result<(), Failure> {
    for (name, value) in xattrs.iter().filter(|(name, _)| !belongs_to_overlayfs(name)) {
        match lsetxattr(path, name.as_slice(), value, XattrFlags::empty()) {
            Ok(()) => {}
            // EPERM: attributes of users on what is neither a file nor a directory.
            Err(Errno::OPNOTSUPP | Errno::PERM) if name != b"security.capability" => {}
            Err(errno) => {
                let kind = match errno {
                    Errno::NOSPC | Errno::DQUOT => FailureKind::NoSpace,
                    _ => FailureKind::BadLayer,
                };
                let name = String::from_utf8_lossy(name).into_owned();
                return Err(Failure::new(kind, format!("the attribute {name:?} cannot be set: {errno}")));
            }
        }
    }
    Ok(())
}

/// Removes the attributes that are not in `keep`.
///
/// # Errors
/// The kernel's reason.
pub fn remove_others(path: &[u8], keep: &[(Vec<u8>, Vec<u8>)]) -> Result<(), Failure> {
    let mut list = vec![0u8; MAX_LIST_BYTES];
    let length = match llistxattr(path, &mut list[..]) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => return Ok(()),
        Err(errno) => return Err(kernel_failure(errno)),
    };
    let names =
        list.get(..length).unwrap_or_default().split(|byte| *byte == 0).filter(|name| !name.is_empty());
    for name in names.filter(|name| !keep.iter().any(|(kept, _)| kept == name)) {
        match lremovexattr(path, name) {
            Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::PERM) => {}
            Err(errno) => return Err(kernel_failure(errno)),
        }
    }
    Ok(())
}
