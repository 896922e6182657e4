//! Where things are: the store, the directory of sockets, and flyrun's own parts.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Context, Error, Result};

/// Short, as the address of a socket is.
const SOCKETS: &str = "j/s";
/// No machine's name.
const TEXT: &str = "kernel-text";

/// The directories that a command works on.
#[derive(Clone, Debug)]
pub struct Paths {
    /// Images, machines, snapshots and volumes; survives a reboot.
    pub root: PathBuf,
    /// Sockets and what else does not survive a reboot.
    pub run: PathBuf,
}

impl Paths {
    pub fn machines(&self) -> PathBuf {
        self.root.join("machines")
    }

    pub fn volumes(&self) -> PathBuf {
        self.root.join("volumes")
    }

    pub fn snapshots(&self) -> PathBuf {
        self.root.join("snapshots")
    }

    /// Base snapshots, a cache.
    pub fn bases(&self) -> PathBuf {
        self.root.join("bases")
    }

    /// Encrypted secrets of apps.
    pub fn secrets(&self) -> PathBuf {
        self.root.join("secrets")
    }

    /// What was said of apps beside their files.
    pub fn apps(&self) -> PathBuf {
        self.root.join("apps")
    }

    pub fn usage(&self) -> PathBuf {
        self.root.join("usage")
    }

    /// Where a running machine's sockets are.
    pub fn run_dir(&self, name: &str) -> PathBuf {
        self.run.join(name)
    }

    /// The text of kernels, in memory ([`crate::kernel_text`]).
    pub fn kernel_text(&self) -> PathBuf {
        self.run.join(TEXT)
    }

    /// A new, private directory for one virtual machine's sockets and start files.
    pub fn make_run_dir(&self, name: &str) -> Result<RunDir> {
        let path = self.run_dir(name);
        // A sweep by another process may take the directory in the moment before it is locked.
        for _ in 0..8 {
            // Nobody has left anything in one that was not there. The first start of all makes those above it too.
            let is_new = private_dirs().create(&path).is_ok();
            if !is_new {
                make_private_dir(&path)?;
            }
            let lock = File::open(&path).context(format!("cannot open {}", path.display()))?;
            lock.lock().context(format!("cannot lock {}", path.display()))?;
            if is_same_file(&lock, &path) {
                if !is_new {
                    empty(&path);
                }
                make_sockets_dir(&path.join(SOCKETS))?;
                return Ok(RunDir { path, has_sockets: AtomicBool::new(!is_new), _lock: lock });
            }
        }
        Err(Error::new(format!("{} is removed again and again", path.display())))
    }

    /// Removes the directories whose owners died.
    pub fn sweep_run_dirs(&self) {
        for entry in std::fs::read_dir(&self.run).into_iter().flatten().flatten() {
            let path = entry.path();
            if entry.file_name() != TEXT
                && let Ok(directory) = File::open(&path)
                && directory.metadata().is_ok_and(|metadata| metadata.is_dir())
                && directory.try_lock().is_ok()
            {
                let _ = std::fs::remove_dir_all(&path);
            }
        }
    }
}

/// The directory of the guest's sockets, which is the root of its jailed flyrun-vmm, another user.
fn make_sockets_dir(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let told = || format!("cannot make the directory {}", path.display());
    let mut parts: Vec<_> = path.ancestors().take(Path::new(SOCKETS).components().count()).collect();
    parts.reverse();
    for path in parts {
        match std::fs::create_dir(path) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(error).context(told());
            }
            _ => {}
        }
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o711)).context(told())?;
    }
    Ok(())
}

/// Removes what an owner that was killed left in a directory.
fn empty(path: &Path) {
    for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
        let _ = std::fs::remove_file(entry.path());
    }
}

/// Whether an open file is the one that now has this name.
pub fn is_same_file(open: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (open.metadata(), std::fs::metadata(path)) {
        (Ok(open), Ok(named)) => (open.dev(), open.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

/// A directory of one virtual machine below [`Paths::run`], removed when dropped. Its lock says that the owner lives.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    /// Whether there may be sockets of an earlier life.
    has_sockets: AtomicBool,
    _lock: File,
}

impl RunDir {
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The unix socket that stands for the guest's vsock device.
    pub fn vsock(&self) -> PathBuf {
        vsock(&self.path)
    }

    /// The directory of that socket and those of [`Self::vsock_port`], which holds nothing else.
    pub fn sockets(&self) -> PathBuf {
        self.path.join(SOCKETS)
    }

    /// Removes the sockets of an earlier life of the machine, so that the next can make its own. Before each life.
    pub fn clear_sockets(&self) {
        if !self.has_sockets.swap(true, Ordering::Relaxed) {
            return;
        }
        for entry in std::fs::read_dir(self.sockets()).into_iter().flatten().flatten() {
            if entry.file_name().to_str().is_some_and(|name| name == "v" || name.starts_with("v_")) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }

    /// The unix socket that a guest's connection to `port` arrives at.
    pub fn vsock_port(&self, port: u32) -> PathBuf {
        self.sockets().join(format!("v_{port}"))
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// The unix socket of a guest's vsock device, in its machine's directory of sockets.
pub fn vsock(run_dir: &Path) -> PathBuf {
    run_dir.join(SOCKETS).join("v")
}

fn private_dirs() -> std::fs::DirBuilder {
    use std::os::unix::fs::DirBuilderExt;
    let mut builder = std::fs::DirBuilder::new();
    builder.mode(0o700);
    builder
}

/// Makes a directory, and those above it, that only its owner may enter.
pub fn make_private_dir(path: &Path) -> Result<()> {
    private_dirs()
        .recursive(true)
        .create(path)
        .context(format!("cannot make the directory {}", path.display()))
        .map_err(|error| {
            error.advice(
                "Run as a user who may write there, or choose another place with --root and FLYRUN_RUN.",
            )
        })
}

/// One of the files that come with flyrun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Vmm,
    /// What owns a machine in the background.
    Monitor,
    /// The kernel for one vCPU.
    Kernel,
    /// The kernel for several.
    KernelSmp,
    InitramfsRun,
    InitramfsUnpack,
}

impl Part {
    pub const ALL: [Part; 6] =
        [Part::Vmm, Part::Monitor, Part::Kernel, Part::KernelSmp, Part::InitramfsRun, Part::InitramfsUnpack];

    pub fn file_name(self) -> &'static str {
        match self {
            Part::Vmm => "flyrun-vmm",
            Part::Monitor => "flyrun-monitor",
            Part::Kernel => "vmlinux",
            Part::KernelSmp => "vmlinux-smp",
            Part::InitramfsRun => "initramfs-run.cpio",
            Part::InitramfsUnpack => "initramfs-unpack.cpio",
        }
    }
}

/// The variable that names the [`Library`].
pub const LIBRARY: &str = "FLYRUN_LIB";

/// The directory with flyrun's parts.
#[derive(Clone, Debug)]
pub struct Library {
    directory: PathBuf,
}

impl Library {
    /// `FLYRUN_LIB` alone if it is set; otherwise beside the program, then where packages install.
    ///
    /// # Errors
    /// No directory holds flyrun-vmm.
    pub fn find() -> Result<Library> {
        let candidates = match std::env::var_os(LIBRARY) {
            Some(own) => vec![PathBuf::from(own)],
            None => Self::usual_places(),
        };
        match candidates.iter().find(|directory| directory.join(Part::Vmm.file_name()).exists()) {
            Some(directory) => Ok(Library { directory: directory.clone() }),
            None => {
                let tried: Vec<_> = candidates.iter().map(|path| path.display().to_string()).collect();
                Err(Error::new(format!("flyrun-vmm is not in {}", tried.join(", "))).advice(
                    "Install flyrun with `make install`, or name the directory of its parts in FLYRUN_LIB.",
                ))
            }
        }
    }

    fn usual_places() -> Vec<PathBuf> {
        let own = std::env::current_exe().ok();
        // Of flyrun-monitor, which is one of the parts.
        let among =
            own.as_ref().and_then(|exe| exe.parent()).filter(|directory| directory.ends_with("flyrun"));
        let beside = own.as_ref().and_then(|exe| Some(exe.parent()?.parent()?.join("lib/flyrun")));
        let installed = ["/usr/local/lib/flyrun".into(), "/usr/lib/flyrun".into()];
        among.map(PathBuf::from).into_iter().chain(beside).chain(installed).collect()
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    pub fn path(&self, part: Part) -> PathBuf {
        self.directory.join(part.file_name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_owner_left_is_not_in_the_next_ones_way() {
        let directory = tempfile::tempdir().unwrap();
        let paths = Paths { root: directory.path().join("root"), run: directory.path().join("run") };
        std::fs::create_dir_all(paths.run_dir("m")).unwrap();
        std::fs::write(paths.run_dir("m").join("monitor"), "").unwrap();
        let run_dir = paths.make_run_dir("m").unwrap();
        assert!(!run_dir.path().join("monitor").exists());
        assert_eq!(std::fs::read_dir(run_dir.sockets()).unwrap().count(), 0);
    }

    #[test]
    fn each_life_finds_no_socket_of_another() {
        let directory = tempfile::tempdir().unwrap();
        let paths = Paths { root: directory.path().join("root"), run: directory.path().join("run") };
        for is_left in [false, true] {
            let run_dir = paths.make_run_dir("m").unwrap();
            let count = || std::fs::read_dir(run_dir.sockets()).unwrap().count();
            for life in 0..3 {
                run_dir.clear_sockets();
                assert_eq!(count(), 0, "{is_left} {life}");
                std::fs::write(run_dir.vsock_port(1), "").unwrap();
            }
            // As when its owner was killed.
            let RunDir { _lock: lock, .. } = &*std::mem::ManuallyDrop::new(run_dir);
            lock.unlock().unwrap();
        }
    }

    #[test]
    fn a_sweep_takes_what_the_dead_left_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let paths = Paths { root: directory.path().join("root"), run: directory.path().join("run") };
        let living = paths.make_run_dir("living").unwrap();
        std::fs::create_dir(paths.run.join("dead")).unwrap();
        paths.sweep_run_dirs();
        assert!(living.path().exists() && !paths.run.join("dead").exists());
        let path = living.path().to_path_buf();
        drop(living);
        assert!(!path.exists());
    }
}
