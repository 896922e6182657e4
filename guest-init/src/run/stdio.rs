//! The workload's standard streams: three pipes or one terminal, relayed to sockets of the host.
//!
//! Pipes and no sockets of the host: programs open /dev/stdout again, which a socket does not allow.

use std::os::fd::{AsFd, OwnedFd};

use protocol::{RunConfig, TtySize, port};
use rustix::{
    fs::{CWD, Gid, Mode, OFlags, Uid, fchown, openat},
    mount::mount_bind,
    pipe::{PipeFlags, pipe_with},
    pty::{OpenptFlags, ioctl_tiocgptpeer, ptsname, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

use super::relay::Relay;
use crate::{
    control::wait_connected,
    failure::{Failure, OrSetup},
    sys,
};

/// Connections to the host for the streams, started but not yet answered.
#[derive(Debug)]
pub struct Connections {
    stdin: Option<OwnedFd>,
    stdout: OwnedFd,
    stderr: Option<OwnedFd>,
}

impl Connections {
    /// Starts the connections that this configuration asks for.
    ///
    /// # Errors
    /// [`protocol::FailureKind::Setup`].
    pub fn start(config: &RunConfig) -> Result<Self, Failure> {
        let connect =
            |port| sys::vsock_connect(port).or_setup(|| format!("connect to the host on vsock port {port}"));
        let pipes = config.tty.is_none();
        Ok(Self {
            stdin: (pipes && config.stdin).then(|| connect(port::STDIN)).transpose()?,
            stdout: connect(port::STDOUT)?,
            stderr: pipes.then(|| connect(port::STDERR)).transpose()?,
        })
    }

    /// Waits until the host has accepted all of them.
    ///
    /// # Errors
    /// [`protocol::FailureKind::Setup`] naming the port.
    pub fn wait(&self) -> Result<(), Failure> {
        let with_ports = [
            (self.stdin.as_ref(), port::STDIN),
            (Some(&self.stdout), port::STDOUT),
            (self.stderr.as_ref(), port::STDERR),
        ];
        with_ports
            .into_iter()
            .filter_map(|(socket, port)| Some((socket?, port)))
            .try_for_each(|(socket, port)| wait_connected(socket.as_fd(), port))
    }
}

/// The workload's ends.
#[derive(Debug)]
pub struct ChildStdio {
    /// Standard input.
    pub stdin: OwnedFd,
    /// Standard output.
    pub stdout: OwnedFd,
    /// Standard error.
    pub stderr: OwnedFd,
    /// Whether they are a terminal, which becomes the controlling one.
    pub is_terminal: bool,
}

/// Guest-init's ends.
#[derive(Debug)]
pub struct Stdio {
    /// From the host to the workload, unless its input is /dev/null.
    pub input: Option<Relay>,
    /// From the workload to the host.
    pub outputs: Vec<Relay>,
    /// The terminal's master, to resize it and to send its signals.
    pub terminal: Option<OwnedFd>,
}

/// Makes the streams. They belong to the workload's user, who may open them again through /dev/stdout.
///
/// # Errors
/// [`protocol::FailureKind::Setup`].
pub fn open(config: &RunConfig, uid: u32, connections: Connections) -> Result<(Stdio, ChildStdio), Failure> {
    match config.tty {
        Some(size) => open_terminal(size, uid, connections.stdout).or_setup(|| "make the terminal".into()),
        None => open_pipes(uid, connections).or_setup(|| "make the standard streams".into()),
    }
}

fn open_pipes(uid: u32, connections: Connections) -> rustix::io::Result<(Stdio, ChildStdio)> {
    let owner = Some(Uid::from_raw(uid));
    let (input, stdin) = match connections.stdin {
        Some(socket) => {
            let (child, ours) = pipe_with(PipeFlags::CLOEXEC)?;
            fchown(&child, owner, None)?;
            rustix::io::ioctl_fionbio(&ours, true)?;
            (Some(Relay::input(socket, ours)), child)
        }
        None => (None, openat(CWD, "/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?),
    };
    let mut outputs = Vec::with_capacity(2);
    let mut output = |socket: OwnedFd| -> rustix::io::Result<OwnedFd> {
        let (ours, child) = pipe_with(PipeFlags::CLOEXEC)?;
        fchown(&child, owner, None)?;
        rustix::io::ioctl_fionbio(&ours, true)?;
        outputs.push(Relay::output(ours, socket));
        Ok(child)
    };
    let stdout = output(connections.stdout)?;
    let stderr = match connections.stderr {
        Some(socket) => output(socket)?,
        None => stdout.try_clone().map_err(|_| rustix::io::Errno::MFILE)?,
    };
    Ok((Stdio { input, outputs, terminal: None }, ChildStdio { stdin, stdout, stderr, is_terminal: false }))
}

fn open_terminal(size: TtySize, uid: u32, socket: OwnedFd) -> rustix::io::Result<(Stdio, ChildStdio)> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let master = openat(CWD, "/dev/ptmx", flags, Mode::empty())?;
    unlockpt(&master)?;
    let slave = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    fchown(&slave, Some(Uid::from_raw(uid)), Some(Gid::from_raw(5)))?;
    resize(&master, size)?;
    // Programs that write to the console want the user's terminal, not the serial port.
    let name = ptsname(&master, Vec::new())?;
    let _ = mount_bind(name.as_c_str(), "/dev/console");

    let duplicate = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd, 3);
    let stdio = Stdio {
        input: Some(Relay::input(duplicate(&socket)?, duplicate(&master)?)),
        outputs: vec![Relay::output(duplicate(&master)?, socket)],
        terminal: Some(master),
    };
    let child = ChildStdio {
        stdin: duplicate(&slave)?,
        stdout: duplicate(&slave)?,
        stderr: slave,
        is_terminal: true,
    };
    Ok((stdio, child))
}

/// Sets a terminal's size, which signals its foreground group.
///
/// # Errors
/// The kernel's reason.
pub fn resize(terminal: &OwnedFd, size: TtySize) -> rustix::io::Result<()> {
    let size = Winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(terminal, size)
}
