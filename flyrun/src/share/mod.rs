//! Directories of the host in a machine: virtiofs, served by one virtiofsd for each.
//!
//! virtiofsd is a program of its own (in Rust, or in older distributions QEMU's in C), started by the machine's monitor
//! and ended with the machine. [`daemon`] finds it and knows how it is called, [`serve`] starts and ends it, and
//! [`become_daemon`] is what the process in between does before it becomes virtiofsd.

mod become_daemon;
mod daemon;
mod serve;

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use become_daemon::{Order, become_daemon};
pub use daemon::{Daemon, is_root};
pub use serve::Served;

use crate::error::{Error, Result};
use crate::mounts::Place;

/// As many as the VMM takes.
pub const MAX_SHARES: usize = vmm::validate::MAX_SHARES;

/// A directory of the host in a machine. The same one may be in any number of machines.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Use {
    /// The directory: an absolute path.
    pub source: PathBuf,
    /// Where it is mounted: an absolute path.
    pub path: String,
    pub read_only: bool,
}

impl Use {
    /// Whether the source of a `--volume` is a directory of the host, and not a volume's name.
    pub fn is_meant(source: &str) -> bool {
        source.starts_with(['/', '.', '~'])
    }

    /// `current` is the directory that a relative source counts from.
    ///
    /// # Errors
    /// The source does not name a directory in a way that others could follow.
    pub fn new(source: &str, place: Place, current: &Path) -> Result<Use> {
        let relative = matches!(source, "." | "..") || source.starts_with("./") || source.starts_with("../");
        if !relative && !source.starts_with('/') {
            return Err(Error::new(format!("'{source}' is no directory of the host"))
                .advice("Write an absolute path, or one that begins with ./ or ../."));
        }
        let source = clean(&current.join(source));
        Ok(Use { source, path: place.path, read_only: place.read_only })
    }

    /// Whether the directory is there.
    ///
    /// # Errors
    /// It is not, or is something else.
    pub fn check(&self) -> Result<()> {
        let path = self.source.display();
        match std::fs::metadata(&self.source) {
            Ok(metadata) if metadata.is_dir() => Ok(()),
            Ok(_) => {
                Err(Error::new(format!("{path} is not a directory, and only directories can be shared"))
                    .advice("Share the directory that holds it, or copy it with `flyrun cp`."))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Err(Error::new(format!("there is no directory {path} on this host"))
                    .advice(format!("Make it with `mkdir -p {path}`, or give a volume's name in its place.")))
            }
            Err(error) => Err(Error::caused(format!("cannot share {path}"), &error)),
        }
    }
}

/// What all directories of a machine need, before anything is made for it. None without directories.
///
/// # Errors
/// A directory is missing, there are too many, or there is no virtiofsd that can serve them.
pub fn prepare(shares: &[Use]) -> Result<Option<Daemon>> {
    if shares.is_empty() {
        return Ok(None);
    }
    if shares.len() > MAX_SHARES {
        return Err(Error::new(format!("{} directories of the host are too many", shares.len()))
            .advice(format!("A machine can have {MAX_SHARES}; share a directory above them.")));
    }
    shares.iter().try_for_each(Use::check)?;
    let daemon = Daemon::find()?;
    daemon.check_rights(shares.iter().any(|share| share.read_only))?;
    Ok(Some(daemon))
}

/// Takes `.` and `..` out of an absolute path by its words, as docker does.
fn clean(path: &Path) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(source: &str) -> Result<Use> {
        let place = Place { path: "/x".into(), read_only: false };
        Use::new(source, place, Path::new("/home/me"))
    }

    #[test]
    fn a_directory_is_absolute_or_counts_from_here() {
        for (source, expected) in
            [("/srv//a/./b/../c/", "/srv/a/c"), (".", "/home/me"), ("./a", "/home/me/a"), ("../..", "/")]
        {
            assert_eq!(parse(source).unwrap().source, Path::new(expected), "{source}");
        }
        for bad in ["a", "~/a", ".a", "..b", ""] {
            assert!(parse(bad).unwrap_err().to_string().contains("./"), "{bad}");
        }
    }

    #[test]
    fn what_is_no_directory_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, "").unwrap();
        let told = |path: &Path| {
            let checked = parse(path.to_str().unwrap()).unwrap().check();
            checked.err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert_eq!(told(directory.path()), "");
        assert!(told(&file).contains("is not a directory"));
        assert!(told(&directory.path().join("none")).contains("mkdir -p"));
    }

    #[test]
    fn too_many_directories_are_refused_before_virtiofsd_is_looked_for() {
        let many = vec![parse("/").unwrap(); MAX_SHARES + 1];
        assert!(prepare(&many).unwrap_err().to_string().contains("too many"));
        assert_eq!(prepare(&[]).unwrap(), None);
    }
}
