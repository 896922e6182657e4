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
    let (ours, child) = pipes(uid, connections.stdin.is_some())?;
    let input = connections.stdin.zip(ours.stdin).map(|(socket, pipe)| Relay::input(socket, pipe));
    let mut outputs = vec![Relay::output(ours.stdout, connections.stdout)];
    outputs.extend(connections.stderr.map(|socket| Relay::output(ours.stderr, socket)));
    Ok((Stdio { input, outputs, terminal: None }, child))
}

/// Guest-init's ends of a process's pipes, none of which block.
#[derive(Debug)]
pub struct Pipes {
    /// To its standard input, unless that is /dev/null.
    pub stdin: Option<OwnedFd>,
    /// From its standard output.
    pub stdout: OwnedFd,
    /// From its standard error.
    pub stderr: OwnedFd,
}

/// Makes the pipes of a process of this user.
///
/// # Errors
/// The kernel's reason.
pub fn pipes(uid: u32, with_stdin: bool) -> rustix::io::Result<(Pipes, ChildStdio)> {
    let prepare = |ours: &OwnedFd, child: &OwnedFd| {
        fchown(child, Some(Uid::from_raw(uid)), None)?;
        rustix::io::ioctl_fionbio(ours, true)
    };
    let output = || -> rustix::io::Result<(OwnedFd, OwnedFd)> {
        let (ours, child) = pipe_with(PipeFlags::CLOEXEC)?;
        prepare(&ours, &child)?;
        Ok((ours, child))
    };
    let (ours_stdin, stdin) = if with_stdin {
        let (child, ours) = pipe_with(PipeFlags::CLOEXEC)?;
        prepare(&ours, &child)?;
        (Some(ours), child)
    } else {
        (None, dev_null(OFlags::RDONLY)?)
    };
    let (ours_stdout, stdout) = output()?;
    let (ours_stderr, stderr) = output()?;
    let ours = Pipes { stdin: ours_stdin, stdout: ours_stdout, stderr: ours_stderr };
    Ok((ours, ChildStdio { stdin, stdout, stderr, is_terminal: false }))
}

/// The streams of a process that nobody talks to.
///
/// # Errors
/// The kernel's reason.
pub fn nowhere() -> rustix::io::Result<ChildStdio> {
    let (stdout, stderr) = (dev_null(OFlags::WRONLY)?, dev_null(OFlags::WRONLY)?);
    Ok(ChildStdio { stdin: dev_null(OFlags::RDONLY)?, stdout, stderr, is_terminal: false })
}

fn dev_null(access: OFlags) -> rustix::io::Result<OwnedFd> {
    openat(CWD, "/dev/null", access | OFlags::CLOEXEC, Mode::empty())
}

/// Makes a terminal for a process of this user; guest-init's end does not block.
///
/// # Errors
/// The kernel's reason.
pub fn terminal(size: TtySize, uid: u32) -> rustix::io::Result<(OwnedFd, ChildStdio)> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let master = openat(CWD, "/dev/ptmx", flags, Mode::empty())?;
    unlockpt(&master)?;
    let slave = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    fchown(&slave, Some(Uid::from_raw(uid)), Some(Gid::from_raw(5)))?;
    resize(&master, size)?;
    let (stdin, stdout) = (duplicate(&slave)?, duplicate(&slave)?);
    Ok((master, ChildStdio { stdin, stdout, stderr: slave, is_terminal: true }))
}

/// Another descriptor of the same file.
///
/// # Errors
/// The kernel's reason.
pub fn duplicate(fd: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    rustix::io::fcntl_dupfd_cloexec(fd, 3)
}

fn open_terminal(size: TtySize, uid: u32, socket: OwnedFd) -> rustix::io::Result<(Stdio, ChildStdio)> {
    let (master, child) = terminal(size, uid)?;
    // Programs that write to the console want the user's terminal, not the serial port.
    let name = ptsname(&master, Vec::new())?;
    let _ = mount_bind(name.as_c_str(), "/dev/console");
    let stdio = Stdio {
        input: Some(Relay::input(duplicate(&socket)?, duplicate(&master)?)),
        outputs: vec![Relay::output(duplicate(&master)?, socket)],
        terminal: Some(master),
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
