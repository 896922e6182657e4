//! The text of kernels that machines have in common, in the host's memory ([`vmm::snapshot::text`]): put there when a base snapshot
//! has been made, and, as memory does not survive a reboot, when a machine runs whose snapshot's text is not there.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use vmm::snapshot::text::{self, MAX_FILES};

use crate::paths::{Paths, make_private_dir};

/// Puts the text of this snapshot there, if it is not. Without it a resume takes longer, and that is all.
pub fn keep(paths: &Paths, snapshot: &Path) {
    let _ = try_to_keep(&paths.kernel_text(), snapshot);
}

/// Whether a file was made.
fn try_to_keep(dir: &Path, snapshot: &Path) -> io::Result<bool> {
    let other = |error: vmm::snapshot::refusal::Refusal| io::Error::other(error.to_string());
    let header = vmm::snapshot::restore::header(snapshot).map_err(other)?;
    // What a hostile machine has written here is looked at by `copy` before it is believed; as a name, digits alone are.
    let Some(name) = header.text.as_ref().map(|text| &text.sha256).filter(|name| is_digest(name)) else {
        return Ok(false);
    };
    if dir.join(name).exists() {
        return Ok(false);
    }
    make_private_dir(dir).map_err(io::Error::other)?;
    let draft = dir.join(format!("{name}.{}", std::process::id()));
    let mut file = File::options().read(true).write(true).create_new(true).open(&draft)?;
    let copied = text::copy(snapshot, &header, &mut file);
    let kept = match copied {
        Ok(true) => fs::rename(&draft, dir.join(name)).map(|()| true),
        Ok(false) => Ok(false),
        Err(error) => Err(error),
    };
    if !matches!(kept, Ok(true)) {
        let _ = fs::remove_file(&draft);
    }
    trim(dir, MAX_FILES);
    kept
}

fn is_digest(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Leaves only so many, the newest. Machines that run keep what they have mapped.
fn trim(dir: &Path, most: usize) {
    let made = |entry: fs::DirEntry| {
        let made = entry.metadata().and_then(|metadata| metadata.modified());
        (made.unwrap_or(SystemTime::UNIX_EPOCH), entry.path())
    };
    let mut found: Vec<(SystemTime, PathBuf)> =
        fs::read_dir(dir).into_iter().flatten().flatten().map(made).collect();
    found.sort();
    let surplus = found.len().saturating_sub(most);
    for (_, path) in found.iter().take(surplus) {
        let _ = fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_go_first() {
        let dir = tempfile::tempdir().unwrap();
        for age in 0..4u64 {
            let path = dir.path().join(age.to_string());
            fs::write(&path, "").unwrap();
            let made = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1000 - age);
            File::options().write(true).open(&path).unwrap().set_modified(made).unwrap();
        }
        trim(dir.path(), 2);
        let mut left: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["0", "1"]);
    }

    #[test]
    fn what_is_no_snapshot_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let kept = dir.path().join("kept");
        assert!(try_to_keep(&kept, dir.path()).is_err());
        assert!(!kept.exists());
    }
}
