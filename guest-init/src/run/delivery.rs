//! What the host gives over a connection of its own ([`protocol::Delivery`]): secrets for the environment, and files.
//!
//! The files are in memory. Each covers its place in the root filesystem, as /etc/hosts does, so that nothing of them
//! reaches a disk, and so that they are there on a read-only root too.

use std::{
    io::Write,
    os::fd::{AsFd, OwnedFd},
};

use protocol::{Delivery, FailureKind, File, MAX_DELIVERY_BYTES, Owner, RunConfig, decode_delivery, port};
use rustix::{
    event::PollFlags,
    fs::{CWD, Gid, Mode, OFlags, Uid, fchmod, fchown, open, rmdir},
    io::{Errno, read},
    mount::{MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount},
};

use super::user::User;
use crate::{
    control::{wait, wait_connected},
    failure::{Failure, OrSetup},
    pid1::{ensure_directory, mount_at},
    sys,
};

/// How long the host may stay silent, in milliseconds.
const SILENCE_LIMIT_MS: i64 = 60_000;
const CHUNK: usize = 64 * 1024;
/// Where the files are made, until each is at its place. In memory, and gone before the workload starts.
const STAGE: &str = "/dev/.delivery";

/// A delivery whose connection was started and not yet answered.
#[derive(Debug)]
pub struct Pending {
    socket: Option<OwnedFd>,
}

impl Pending {
    /// Starts the connection, if there is something to fetch.
    ///
    /// # Errors
    /// [`FailureKind::Setup`].
    pub fn start(config: &RunConfig) -> Result<Self, Failure> {
        let connect = || {
            let port = port::DELIVERY;
            sys::vsock_connect(port).or_setup(|| format!("connect to the host on vsock port {port}"))
        };
        Ok(Self { socket: config.delivery.as_ref().map(|_| connect()).transpose()? })
    }

    /// Waits until all is there.
    ///
    /// # Errors
    /// [`FailureKind::Setup`] when the host does not give it, or gives something else.
    pub fn receive(self) -> Result<Delivery, Failure> {
        let Some(socket) = self.socket else { return Ok(Delivery::default()) };
        wait_connected(socket.as_fd(), port::DELIVERY)?;
        let bytes = read_all(&socket).or_setup(|| "read what the host delivers".into())?;
        decode_delivery(&bytes).map_err(|error| Failure::new(FailureKind::Setup, error.to_string()))
    }
}

/// To the end, but not beyond what a delivery may have.
fn read_all(socket: &OwnedFd) -> rustix::io::Result<Vec<u8>> {
    let mut all = Vec::new();
    let mut chunk = vec![0; CHUNK];
    while all.len() <= MAX_DELIVERY_BYTES + 4 {
        match read(socket, &mut chunk[..]) {
            Ok(0) => return Ok(all),
            Ok(count) => all.extend_from_slice(chunk.get(..count).unwrap_or_default()),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait(socket.as_fd(), PollFlags::IN, SILENCE_LIMIT_MS)?,
            Err(errno) => return Err(errno),
        }
    }
    Err(Errno::TOOBIG)
}

/// The configured environment with what was delivered in it and behind it.
pub fn environment(mut configured: Vec<String>, delivered: Vec<String>) -> Vec<String> {
    for entry in delivered {
        // What is no assignment is nothing.
        let Some(length) = entry.find('=').filter(|length| *length > 0) else { continue };
        let is_same = |other: &&mut String| other.get(..=length) == entry.get(..=length);
        match configured.iter_mut().find(is_same) {
            Some(other) => *other = entry,
            None => configured.push(entry),
        }
    }
    configured
}

/// Puts each file at its place.
///
/// # Errors
/// [`FailureKind::Setup`] naming the place.
pub fn place(files: &[File], user: &User) -> Result<(), Failure> {
    if files.is_empty() {
        return Ok(());
    }
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount_at("tmpfs", STAGE, "tmpfs", flags, "mode=700")?;
    let placed = files.iter().enumerate().try_for_each(|(index, file)| {
        if !is_place(&file.path) {
            let message = format!("a file cannot be put at {:?}", file.path);
            return Err(Failure::new(FailureKind::BadConfig, message));
        }
        place_one(&format!("{STAGE}/{index}"), file, user).or_setup(|| format!("put a file at {}", file.path))
    });
    // The files live on where they are mounted.
    let _ = unmount(STAGE, UnmountFlags::DETACH);
    let _ = rmdir(STAGE);
    placed
}

fn place_one(staged: &str, file: &File, user: &User) -> rustix::io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let fd = open(staged, flags, Mode::from_raw_mode(0o600))?;
    let (mode, owner) = match file.owner {
        Owner::Root => (0o644, (0, 0)),
        Owner::Workload => (0o400, (user.uid, user.gid)),
    };
    let mut content = std::fs::File::from(fd);
    content.write_all(&file.contents).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    fchown(&content, Some(Uid::from_raw(owner.0)), Some(Gid::from_raw(owner.1)))?;
    fchmod(&content, Mode::from_raw_mode(mode))?;
    drop(content);
    let tree = open_tree(CWD, staged, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    let cover = || {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
        move_mount(&tree, "", CWD, file.path.as_str(), flags)
    };
    match cover() {
        Err(Errno::NOENT) => make_empty(&file.path).and_then(|()| cover()),
        other => other,
    }
}

/// The file that is covered, with the directories above it. The image's links are followed, as for whoever opens it later.
fn make_empty(path: &str) -> rustix::io::Result<()> {
    if let Some((parent, _)) = path.rsplit_once('/')
        && !parent.is_empty()
    {
        ensure_directory(parent)?;
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    open(path, flags, Mode::from_raw_mode(0o644)).map(drop)
}

fn is_place(path: &str) -> bool {
    let is_file = path.starts_with('/') && !path.ends_with('/');
    is_file && !path.split('/').any(|part| part == ".." || part == ".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_delivered_wins_over_what_is_configured() {
        let configured = ["A=1", "AB=2", "PATH=/bin"].map(String::from).to_vec();
        let delivered = ["A=x=y", "C=3", "", "A", "=x"].map(String::from).to_vec();
        assert_eq!(environment(configured, delivered), ["A=x=y", "AB=2", "PATH=/bin", "C=3"]);
    }

    #[test]
    fn files_have_absolute_places() {
        assert!(["/a", "/etc/x.conf", "/..a/b"].into_iter().all(is_place));
        for path in ["", "/", "a", "/a/", "/a/../b", "/./a", ".."] {
            assert!(!is_place(path), "{path}");
        }
    }

    #[test]
    fn all_is_read_and_no_more_than_may_be() {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        rustix::io::ioctl_fionbio(&ours, true).unwrap();
        let mut host = std::os::unix::net::UnixStream::from(theirs);
        let writer = std::thread::spawn(move || host.write_all(&vec![7; CHUNK * 3]));
        assert_eq!(read_all(&ours).unwrap().len(), CHUNK * 3);
        writer.join().unwrap().unwrap();
    }
}
