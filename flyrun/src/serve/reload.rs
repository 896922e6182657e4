//! When files of apps have changed: SIGHUP, or a change that the kernel tells of.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::sync::mpsc;

/// Who changes files often changes several, or one in several steps.
const CALM: Duration = Duration::from_millis(300);

/// Tells of changes to a file or to those in a directory.
#[derive(Debug)]
pub struct Changes {
    noticed: mpsc::Receiver<()>,
}

impl Changes {
    /// Of a file, its directory is watched: an editor puts another file in its place. That a file of the directory changes which is
    /// none of the app's costs nothing but a look. A thread waits for the kernel, as long as the process lives.
    ///
    /// # Errors
    /// The kernel's.
    pub fn watch(path: &Path) -> io::Result<Changes> {
        let watch = inotify::init(CreateFlags::CLOEXEC)?;
        let flags =
            WatchFlags::CLOSE_WRITE | WatchFlags::MOVED_TO | WatchFlags::MOVED_FROM | WatchFlags::DELETE;
        inotify::add_watch(&watch, directory(path), flags)?;
        let (notice, noticed) = mpsc::channel(1);
        crate::vm::spawn("changes", move || {
            while rustix::io::read(&watch, &mut [0_u8; 4096][..]).is_ok() && !notice.is_closed() {
                // One that is not told of yet tells of this too.
                let _ = notice.try_send(());
            }
        })?;
        Ok(Changes { noticed })
    }

    /// Returns when something has changed, and no more changes for a moment.
    pub async fn next(&mut self) {
        self.wait().await;
        while tokio::time::timeout(CALM, self.wait()).await.is_ok() {}
    }

    async fn wait(&mut self) {
        if self.noticed.recv().await.is_none() {
            std::future::pending().await
        }
    }
}

fn directory(path: &Path) -> PathBuf {
    if path.is_dir() {
        return path.to_path_buf();
    }
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_file_that_is_replaced_or_written_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("fly.toml");
        std::fs::write(&file, "1").unwrap();
        let mut changes = Changes::watch(&file).unwrap();
        std::fs::write(&file, "2").unwrap();
        changes.next().await;
        std::fs::write(directory.path().join("new"), "3").unwrap();
        std::fs::rename(directory.path().join("new"), &file).unwrap();
        changes.next().await;
        let quiet = tokio::time::timeout(CALM * 2, changes.next()).await;
        assert!(quiet.is_err(), "nothing more has changed");
    }
}
