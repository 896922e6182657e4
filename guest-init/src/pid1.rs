//! What every PID 1 needs: it reads its configuration, never returns, and ends by resetting the machine.

use std::{fs::File, io::Read, os::fd::OwnedFd, panic};

use protocol::{BootConfig, FailureKind};
use rustix::{
    fs::{CWD, Mode, OFlags},
    io::Errno,
    mount::{MountFlags, MoveMountFlags, OpenTreeFlags, mount, move_mount, open_tree},
    system::{RebootCommand, reboot},
};

use crate::{
    control::Control,
    failure::{Failure, OrSetup},
};

/// No configuration that the host writes is longer; the file is read into memory.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// Runs `body` as PID 1 and resets the machine when it is done, whichever way that is.
///
/// Called once, first thing in `main`. A failure is reported to the host if it can be reached, else on the console.
pub fn run(body: fn(BootConfig, &mut Control) -> Result<(), Failure>) -> ! {
    if rustix::process::getpid().as_raw_nonzero().get() != 1 {
        console("this program is PID 1 of a flyrun machine and does nothing elsewhere\n");
        std::process::exit(2);
    }
    panic::set_hook(Box::new(|info| {
        console(&format!("guest-init: {info}\n"));
        restart();
    }));
    if let Err(failure) = boot(body) {
        console(&format!("guest-init: {failure}\n"));
    }
    restart()
}

fn boot(body: fn(BootConfig, &mut Control) -> Result<(), Failure>) -> Result<(), Failure> {
    mount_at("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID | MountFlags::NOEXEC, "")?;
    let mut control = Control::connect()?;
    let outcome = read_config().and_then(|config| body(config, &mut control));
    match outcome {
        Ok(()) => Ok(()),
        Err(failure) => {
            control.report(&failure)?;
            Ok(())
        }
    }
}

fn read_config() -> Result<BootConfig, Failure> {
    let bad = |message: String| Failure::new(FailureKind::BadConfig, message);
    let path = protocol::CONFIG_PATH;
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_CONFIG_BYTES).read_to_end(&mut bytes))
        .map_err(|error| bad(format!("cannot read the boot configuration {path}: {error}")))?;
    // It holds the seed of the random generator and the environment's secrets, and nobody needs it again.
    let _ = rustix::fs::unlink(path);
    protocol::decode_config(&bytes).map_err(|error| bad(error.to_string()))
}

/// Mounts a filesystem, making the mount point if it is missing.
///
/// # Errors
/// [`FailureKind::Setup`] with the kernel's reason.
pub fn mount_at(
    source: &str,
    target: &str,
    kind: &str,
    flags: MountFlags,
    options: &str,
) -> Result<(), Failure> {
    let options = std::ffi::CString::new(options).map_err(|_| Errno::INVAL);
    let attempt = || match &options {
        Ok(options) => mount(source, target, kind, flags, Some(options.as_c_str())),
        Err(errno) => Err(*errno),
    };
    let result = match attempt() {
        Err(Errno::NOENT) if ensure_directory(target).is_ok() => attempt(),
        other => other,
    };
    result.or_setup(|| format!("mount {kind} at {target}"))
}

/// What is mounted at a path, kept for another root.
#[derive(Debug)]
pub struct Kept {
    path: &'static str,
    mount: OwnedFd,
}

impl Kept {
    /// What this process sees mounted there now.
    ///
    /// # Errors
    /// [`FailureKind::Setup`] with the kernel's reason.
    pub fn of(path: &'static str) -> Result<Self, Failure> {
        let mount = open_tree(CWD, path, OpenTreeFlags::OPEN_TREE_CLOEXEC);
        Ok(Self { path, mount: mount.or_setup(|| format!("keep {path}"))? })
    }

    /// Moves it, with all that is mounted in it, to that path as this process sees it now. The directory is made if it is missing.
    ///
    /// # Errors
    /// [`FailureKind::Setup`] naming the mount.
    pub fn show(self) -> Result<(), Failure> {
        let Self { path, mount } = &self;
        let attempt = || move_mount(mount, "", CWD, *path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH);
        let result = match attempt() {
            Err(Errno::NOENT) => ensure_directory(path).and_then(|()| attempt()),
            other => other,
        };
        result.or_setup(|| format!("mount {path}"))
    }
}

/// Makes a directory and its missing parents (mode 0755, owned by root), unless it is there.
///
/// # Errors
/// The kernel's reason, `ENOTDIR` when something else is in the place.
pub fn ensure_directory(path: &str) -> rustix::io::Result<()> {
    let mode = Mode::from_raw_mode(0o755);
    match rustix::fs::mkdir(path, mode) {
        Err(Errno::EXIST) => {
            rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
            Ok(())
        }
        Err(Errno::NOENT) => {
            let (parent, _) = path.trim_end_matches('/').rsplit_once('/').ok_or(Errno::NOENT)?;
            if parent.is_empty() {
                return Err(Errno::NOENT);
            }
            ensure_directory(parent)?;
            match rustix::fs::mkdir(path, mode) {
                Err(Errno::EXIST) => Ok(()),
                other => other,
            }
        }
        other => other,
    }
}

/// Writes to the kernel's console, which is what PID 1 starts with as its standard error.
pub fn console(text: &str) {
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        match rustix::io::write(rustix::stdio::stderr(), rest) {
            Ok(count) if count > 0 => rest = rest.get(count..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            _ => return,
        }
    }
}

/// Writes dirty data back and resets the machine, which ends the VMM's process.
pub fn restart() -> ! {
    rustix::fs::sync();
    let _ = reboot(RebootCommand::Restart);
    // Only reached where the kernel refuses to reboot, as in a container: PID 1 must still not return.
    loop {
        std::thread::sleep(std::time::Duration::from_secs(3600));
    }
}
