//! One conversation with a running machine: a command in it, an attachment to its workload, its figures, a copy.
//!
//! Guest-init listens on vsock port [`PORT`]; each connection carries one [`Request`] and then, until it closes,
//! frames of [`ToSession`] from the client and [`FromSession`] from the other side. An attachment to the workload
//! itself speaks the same frames with the machine's monitor, so that one client serves both.
//!
//! Input has a window, so that a process that does not read keeps no signal from it: a client may be ahead by
//! [`STDIN_WINDOW`] bytes, and hears by [`FromSession::StdinTaken`] what it may add.
//!
//! A client that closes its connection (its writing side is enough) ends its interest: an exec'd process without a
//! terminal goes on with its streams closed, one with a terminal is hung up on, as with docker.
//!
//! A suspend ends every connection. A command with a [`Ticket`] waits for its client, which presents the ticket over a new
//! connection ([`Request::Rejoin`]); both then send what the other has not received ([`crate::replay`]). A client that does
//! not come within [`REJOIN_LIMIT_MS`] of the machine's time has closed its connection.

use serde::{Deserialize, Serialize};

use crate::{ExitStatus, FailureKind, TtySize};

/// The vsock port, in the guest, on which guest-init takes sessions.
pub const PORT: u32 = 10;

/// The most bytes of a stream in one frame.
pub const MAX_CHUNK: usize = 32 * 1024;

/// The most bytes of [`ToSession::Stdin`] that a client may have sent and not heard of as taken.
pub const STDIN_WINDOW: usize = 256 * 1024;

/// How long a command waits for its client once the machine goes on, in milliseconds.
pub const REJOIN_LIMIT_MS: u32 = 30_000;

/// Random bytes that the client chose for its command, and that nobody else knows.
#[derive(Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket(pub [u8; 16]);

impl Ticket {
    /// Whether both are the same, in a time that does not tell how much of them is.
    pub fn matches(&self, other: &Ticket) -> bool {
        let differing = self.0.iter().zip(&other.0).fold(0, |all, (a, b)| all | (a ^ b));
        std::hint::black_box(differing) == 0
    }
}

impl std::fmt::Debug for Ticket {
    /// A secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ticket(…)")
    }
}

/// The first frame of a session, from the client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Run a command beside the workload.
    Exec(Box<ExecConfig>),
    /// One [`FromSession::Stats`] is wanted.
    Stats,
    /// [`FromSession::Processes`] are wanted, the last of them empty.
    Processes,
    /// Unpack the tar that comes as [`ToSession::Stdin`] below this directory, which exists.
    CopyIn {
        /// Absolute path in the machine.
        directory: String,
    },
    /// Send this file or directory as [`FromSession::Entry`], each file's with its content behind it. Not as a tar:
    /// the host is to parse no format of the guest's making.
    CopyOut {
        /// Absolute path in the machine.
        path: String,
        /// Whether a symbolic link at that path (not below) is followed.
        follow_link: bool,
    },
    /// Say what is at this path, as one [`FromSession::PathInfo`].
    Stat {
        /// Absolute path in the machine.
        path: String,
    },
    /// Go on with a command whose connection has broken. Answered by [`FromSession::Rejoined`].
    Rejoin {
        /// The command's.
        ticket: Ticket,
        /// How many frames of the command's the client has received in all.
        received: u64,
    },
}

/// A command to run beside the workload.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecConfig {
    /// Program and arguments. Never empty.
    pub argv: Vec<String>,
    /// `KEY=VALUE` entries on top of the workload's environment.
    pub env: Vec<String>,
    /// `user[:group]`; `None` is the workload's.
    pub user: Option<String>,
    /// Working directory; `None` is the workload's.
    pub workdir: Option<String>,
    /// The size of the terminal to make, if it is to have one.
    pub tty: Option<TtySize>,
    /// Whether standard input will come; otherwise it is /dev/null.
    pub stdin: bool,
    /// Whether the session ends when the command has started, with its output going to /dev/null.
    pub detach: bool,
    /// By which its client comes back when the machine was suspended; without one the session ends then.
    pub ticket: Option<Ticket>,
}

/// What the client says after its request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToSession {
    /// At most [`MAX_CHUNK`] bytes of input.
    Stdin(#[serde(with = "serde_bytes")] Vec<u8>),
    /// The end of the input.
    StdinEnd,
    /// Nobody reads the output any more: the process is to get SIGPIPE when it writes some.
    CloseStdout,
    /// The same for the error output.
    CloseStderr,
    /// Send this signal to the process, or to the terminal's foreground group as the kernel would.
    Signal {
        /// Linux signal number, 1 to 64.
        signal: i32,
    },
    /// The client's terminal changed its size.
    Resize(TtySize),
    /// The client has received so many frames in all. Does not count as one, and comes in sessions with a [`Ticket`] only.
    Received {
        /// Number of frames since the session began.
        frames: u64,
    },
}

/// What the client hears.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromSession {
    /// The command runs; for a copy, that it may begin.
    Started {
        /// Process id in the guest.
        pid: u32,
    },
    /// So many bytes of the input were taken (or discarded, as nobody reads them), and so many more may come.
    StdinTaken {
        /// Number of bytes since the last such frame.
        bytes: u32,
    },
    /// The next entry of a copy. A file's content follows in [`FromSession::Stdout`], exactly its size.
    Entry(Box<CopyEntry>),
    /// At most [`MAX_CHUNK`] bytes of output, of a terminal's output, or of a file's content.
    Stdout(#[serde(with = "serde_bytes")] Vec<u8>),
    /// At most [`MAX_CHUNK`] bytes of error output.
    Stderr(#[serde(with = "serde_bytes")] Vec<u8>),
    /// The process is gone (or the copy is done, with code 0), and all its output was sent before. The last frame.
    Exited(ExitStatus),
    /// It could not be done. The last frame.
    Failed {
        /// What kind of failure it is, which decides the exit code.
        kind: FailureKind,
        /// One line with the facts, for the user.
        message: String,
    },
    /// The answer to [`Request::Stats`]. The last frame.
    Stats(GuestStats),
    /// Some of the answer to [`Request::Processes`]; an empty one is the last frame.
    Processes(Vec<ProcessInfo>),
    /// The answer to [`Request::Stat`]: `None` when there is nothing. The last frame.
    PathInfo(Option<PathInfo>),
    /// The machine has received so many frames of the client's in all. Does not count as one.
    Received {
        /// Number of frames since the session began, the request not among them.
        frames: u64,
    },
    /// Of an attachment: the machine has been suspended, and the connection ends. Does not count as a frame.
    Suspended,
    /// The answer to [`Request::Rejoin`], and as [`FromSession::Received`]. What the client has not received follows.
    Rejoined {
        /// Number of frames since the session began, the request not among them.
        frames: u64,
    },
}

/// One file, directory or link of a copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyEntry {
    /// Path below what is copied, its parts separated by slashes; empty for the thing itself, which comes first.
    #[serde(with = "serde_bytes")]
    pub path: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits, the lowest twelve.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time in seconds since 1970.
    pub mtime: i64,
}

/// What an entry of a copy is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EntryKind {
    /// A regular file.
    File {
        /// Bytes of content that follow.
        size: u64,
    },
    /// A directory; its entries follow, at any time.
    Directory,
    /// A symbolic link.
    Symlink {
        /// Where it leads, as it is written in it.
        #[serde(with = "serde_bytes")]
        target: Vec<u8>,
    },
    /// Another name of a file that came before.
    HardLink {
        /// That entry's path.
        #[serde(with = "serde_bytes")]
        target: Vec<u8>,
    },
    /// A device, pipe or socket, which is told and not copied.
    Special,
}

/// What a path in the machine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathInfo {
    /// Whether it is a directory, or a symbolic link to one.
    pub is_directory: bool,
    /// Bytes of a file.
    pub size: u64,
}

/// The guest's own figures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStats {
    /// Microseconds of CPU that the workload's cgroup has used (cpu.stat, usage_usec).
    pub cpu_usec: u64,
    /// Bytes of memory that the guest's kernel manages.
    pub memory_total: u64,
    /// Bytes of memory that are in use and not reclaimable (MemTotal - MemAvailable).
    pub memory_used: u64,
    /// Processes and threads of the workload (pids.current).
    pub processes: u64,
    /// Bytes received by the network interface.
    pub net_rx: u64,
    /// Bytes sent by the network interface.
    pub net_tx: u64,
    /// Bytes read from block devices.
    pub disk_read: u64,
    /// Bytes written to block devices.
    pub disk_written: u64,
}

/// One process of the workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessInfo {
    /// User id.
    pub uid: u32,
    /// Process id in the guest.
    pub pid: u32,
    /// Its parent's.
    pub ppid: u32,
    /// Start, in seconds since the guest's boot.
    pub started: u64,
    /// Milliseconds of CPU used.
    pub cpu_ms: u64,
    /// Command line, or the kernel's name for it.
    pub command: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_matches_itself_alone_and_is_not_shown() {
        let ticket = Ticket([7; 16]);
        assert!(ticket.matches(&ticket));
        for byte in 0..16 {
            let mut other = ticket;
            other.0[byte] ^= 1;
            assert!(!ticket.matches(&other));
        }
        assert!(!format!("{ticket:?}").contains('7'));
    }
}
