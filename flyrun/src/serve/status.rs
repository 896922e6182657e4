//! The socket that `flyrun status` asks: whoever connects is told all, as JSON.

use std::io::Read as _;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixListener;

use super::engine::Engine;
use super::group::View;
use crate::error::{Context, Error, Result};
use crate::paths::{Paths, RunDir};

/// What the directories of sockets of `flyrun serve` are called, with its process id behind it.
const PREFIX: &str = "serve-";
const SOCKET: &str = "status";
const CONTROL: &str = "control";
const PATIENCE: Duration = Duration::from_secs(10);
/// More than any host's apps have to tell.
const MAX_STATUS: u64 = 64 << 20;

/// What one `flyrun serve` tells of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub pid: u32,
    pub memory_in_use_mib: u64,
    pub groups: Vec<View>,
}

/// Makes the directory of this process's sockets; it goes when it is dropped.
///
/// # Errors
/// The system's.
pub fn make_run_dir(paths: &Paths) -> Result<RunDir> {
    paths.make_run_dir(&format!("{PREFIX}{}", std::process::id()))
}

/// Listens. The answers are given by [`answer`].
///
/// # Errors
/// The socket cannot be made.
pub fn listen(run_dir: &RunDir) -> Result<UnixListener> {
    let path = run_dir.path().join(SOCKET);
    UnixListener::bind(&path).context(format!("cannot listen on {}", path.display()))
}

/// Listens for those who want something done.
///
/// # Errors
/// The socket cannot be made.
pub fn listen_for_control(run_dir: &RunDir) -> Result<UnixListener> {
    let path = run_dir.path().join(CONTROL);
    UnixListener::bind(&path).context(format!("cannot listen on {}", path.display()))
}

/// Where the `flyrun serve` that has this process id listens for them.
pub fn control_of(paths: &Paths, pid: u32) -> PathBuf {
    paths.run.join(format!("{PREFIX}{pid}")).join(CONTROL)
}

/// Tells whoever connects.
pub async fn answer(listener: UnixListener, engine: Arc<Engine>) {
    loop {
        let Ok((mut stream, _)) = listener.accept().await else {
            // Out of descriptors, for instance.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let status = Status {
            pid: std::process::id(),
            memory_in_use_mib: engine.shared().limits.memory_in_use_mib(),
            groups: engine.views(),
        };
        tokio::spawn(tokio::time::timeout(PATIENCE, async move {
            let bytes = serde_json::to_vec(&status).unwrap_or_default();
            let _ = stream.write_all(&bytes).await;
        }));
    }
}

/// Asks each `flyrun serve` of this host.
///
/// # Errors
/// None runs.
pub fn ask_all(paths: &Paths) -> Result<Vec<Status>> {
    let mut all: Vec<_> = sockets(&paths.run).iter().filter_map(|path| ask(path)).collect();
    all.sort_by_key(|status| status.pid);
    if all.is_empty() {
        return Err(Error::new("no flyrun serve runs here").advice("Start one: `flyrun serve fly.toml`."));
    }
    Ok(all)
}

fn sockets(run: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(run).into_iter().flatten().flatten();
    let ours =
        entries.filter(|entry| entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX)));
    ours.map(|entry| entry.path().join(SOCKET)).collect()
}

/// One that has been killed does not answer.
fn ask(path: &Path) -> Option<Status> {
    let stream = StdUnixStream::connect(path).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    let mut bytes = Vec::new();
    stream.take(MAX_STATUS).read_to_end(&mut bytes).ok()?;
    serde_json::from_slice(&bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_answers_is_asked_and_the_dead_are_not_missed() {
        let directory = tempfile::tempdir().unwrap();
        let paths = Paths { root: directory.path().join("root"), run: directory.path().join("run") };
        assert!(ask_all(&paths).unwrap_err().to_string().contains("flyrun serve fly.toml"));
        let run_dir = make_run_dir(&paths).unwrap();
        std::fs::create_dir_all(paths.run.join("serve-0")).unwrap();
        let listener = std::os::unix::net::UnixListener::bind(run_dir.path().join(SOCKET)).unwrap();
        let status = Status { pid: 7, memory_in_use_mib: 256, groups: vec![] };
        let told = serde_json::to_vec(&status).unwrap();
        let serving = std::thread::spawn(move || {
            std::io::Write::write_all(&mut listener.accept().unwrap().0, &told).unwrap();
        });
        assert_eq!(ask_all(&paths).unwrap(), [status]);
        serving.join().unwrap();
    }
}
