//! Files that several flyruns share: locks, and small files that are replaced whole.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Opens a lock's file, made if it is not there. Its content means nothing.
///
/// # Errors
/// The system's.
pub fn open_lock(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create(true).truncate(false).open(path)
}

/// What a replaced file survives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lasting {
    /// The end of this process.
    Process,
    /// A power cut too.
    PowerCut,
}

/// Puts a new file, which only its owner reads, in an old one's place: whoever reads finds the one or the other.
///
/// # Errors
/// The system's. The old file is still there then.
pub fn replace(directory: &Path, name: &str, contents: &[u8], lasting: Lasting) -> io::Result<()> {
    let draft = directory.join(format!(".{name}.new"));
    let mut options = File::options();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
    file.write_all(contents)?;
    if lasting == Lasting::PowerCut {
        file.sync_all()?;
    }
    fs::rename(&draft, directory.join(name))?;
    if lasting == Lasting::PowerCut {
        File::open(directory)?.sync_all()?;
    }
    Ok(())
}
