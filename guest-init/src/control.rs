//! The control connection: frames to and from the host, without ever blocking the loop that uses it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use protocol::{FailureKind, FromGuest, PROTOCOL_VERSION, ToGuest, frame, port};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown, sockopt::socket_error},
    time::{ClockId, clock_gettime},
};

use crate::{
    failure::{Failure, OrSetup},
    sys,
};

/// The host answers a connection at once or it is not there.
const CONNECT_TIMEOUT_MS: i64 = 10_000;
/// How long the host may take to read a last report and to close the connection.
const FAREWELL_TIMEOUT_MS: i64 = 10_000;
/// Frames that may be dropped are dropped when this much waits for the host to read.
const MAX_PENDING_BYTES: usize = 256 * 1024;

/// The guest's end of the control connection.
#[derive(Debug)]
pub struct Control {
    socket: OwnedFd,
    decoder: frame::Decoder,
    pending: Vec<u8>,
    connected: bool,
    closed: bool,
}

impl Control {
    /// Starts connecting to the host and queues `Hello`; [`Control::establish`] waits for the answer.
    ///
    /// # Errors
    /// [`FailureKind::Setup`] when the kernel has no vsock device.
    pub fn connect() -> Result<Self, Failure> {
        let socket = sys::vsock_connect(port::CONTROL).or_setup(|| "connect to the host by vsock".into())?;
        let mut control = Self::over(socket);
        control.connected = false;
        Ok(control)
    }

    /// Speaks over a connection that exists.
    pub fn over(socket: OwnedFd) -> Self {
        let mut control = Self {
            socket,
            decoder: frame::Decoder::default(),
            pending: Vec::with_capacity(256),
            connected: true,
            closed: false,
        };
        control.queue(&FromGuest::Hello { version: PROTOCOL_VERSION });
        control
    }

    /// Waits until the host has accepted the connection, and says `Hello`.
    ///
    /// # Errors
    /// [`FailureKind::Setup`] when the host refuses or does not answer.
    pub fn establish(&mut self) -> Result<(), Failure> {
        if !self.connected {
            wait_connected(self.socket.as_fd(), port::CONTROL)?;
            self.connected = true;
        }
        self.flush();
        Ok(())
    }

    /// Queues a frame and writes what the connection takes.
    pub fn send(&mut self, frame: &FromGuest) {
        self.queue(frame);
        self.flush();
    }

    /// Like [`Control::send`] for a frame that may be lost when the host reads too slowly.
    pub fn send_droppable(&mut self, frame: &FromGuest) {
        if self.pending.len() < MAX_PENDING_BYTES {
            self.send(frame);
        }
    }

    fn queue(&mut self, frame: &FromGuest) {
        // Only a message beyond the frame's bound fails, and `Failure::to_frame` cuts the one free-form text.
        if let Ok(bytes) = frame::encode(frame) {
            self.pending.extend_from_slice(&bytes);
        }
    }

    /// Writes what the connection takes of the queued frames.
    pub fn flush(&mut self) {
        while self.connected && !self.closed && !self.pending.is_empty() {
            match send(&self.socket, &self.pending, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => drop(self.pending.drain(..count.min(self.pending.len()))),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => self.closed = true,
            }
        }
    }

    /// What [`poll`] is to wait for.
    pub fn interest(&self) -> PollFlags {
        if self.pending.is_empty() { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT }
    }

    /// Reads once what has arrived. Afterwards [`Control::next_frame`] gives the whole frames.
    pub fn receive(&mut self) {
        let mut chunk = [0; 4096];
        match recv(&self.socket, &mut chunk[..], RecvFlags::DONTWAIT) {
            Ok((0, _)) => self.closed = true,
            Ok((count, _)) => self.decoder.push(chunk.get(..count).unwrap_or_default()),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => self.closed = true,
        }
    }

    /// The next frame that has arrived whole. A frame that does not parse ends the connection.
    pub fn next_frame(&mut self) -> Option<ToGuest> {
        match self.decoder.decode() {
            Ok(frame) => frame,
            Err(_) => {
                self.closed = true;
                None
            }
        }
    }

    /// Whether the host has closed the connection or it is broken.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Sends a failure and waits, for a bounded time, until the host has read it.
    ///
    /// # Errors
    /// The failure itself, when it could not be delivered.
    pub fn report(&mut self, failure: &Failure) -> Result<(), Failure> {
        self.establish().map_err(|unreachable| {
            Failure::new(failure.kind, format!("{failure}; and the host is not there: {unreachable}"))
        })?;
        self.queue(&failure.to_frame());
        self.farewell();
        Ok(())
    }

    /// Writes everything queued, says that nothing follows, and waits, for a bounded time, until the host closes.
    pub fn farewell(&mut self) {
        let deadline = monotonic_ms() + FAREWELL_TIMEOUT_MS;
        let mut finished = false;
        loop {
            self.flush();
            if self.pending.is_empty() && !finished {
                let _ = shutdown(&self.socket, Shutdown::Write);
                finished = true;
            }
            let left = deadline - monotonic_ms();
            if self.closed || left <= 0 {
                return;
            }
            if wait(self.socket.as_fd(), self.interest(), left).is_ok() {
                self.receive();
                while self.next_frame().is_some() {}
            }
        }
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Waits until a started connection is made.
///
/// # Errors
/// [`FailureKind::Setup`] naming the port and the reason.
pub fn wait_connected(socket: BorrowedFd<'_>, port: u32) -> Result<(), Failure> {
    let outcome = match wait(socket, PollFlags::OUT, CONNECT_TIMEOUT_MS) {
        Ok(()) => socket_error(socket).and_then(|result| result),
        Err(errno) => Err(errno),
    };
    outcome.map_err(|errno| {
        Failure::new(FailureKind::Setup, format!("cannot reach the host on vsock port {port}: {errno}"))
    })
}

/// Waits for an event on one descriptor; `ETIMEDOUT` when the time is over.
///
/// # Errors
/// The kernel's reason.
pub fn wait(fd: BorrowedFd<'_>, events: PollFlags, timeout_ms: i64) -> rustix::io::Result<()> {
    let deadline = monotonic_ms() + timeout_ms;
    loop {
        let left = (deadline - monotonic_ms()).max(0);
        match poll(&mut [PollFd::from_borrowed_fd(fd, events)], Some(&timeout(left))) {
            Ok(0) => return Err(Errno::TIMEDOUT),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Milliseconds of the monotonic clock.
pub fn monotonic_ms() -> i64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.saturating_mul(1000).saturating_add(now.tv_nsec / 1_000_000)
}

/// A timeout for [`poll`].
pub fn timeout(milliseconds: i64) -> Timespec {
    Timespec { tv_sec: milliseconds / 1000, tv_nsec: milliseconds % 1000 * 1_000_000 }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (Control, std::os::unix::net::UnixStream) {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        (Control::over(ours), theirs.into())
    }

    #[test]
    fn the_first_frame_is_hello() {
        let (mut control, mut host) = pair();
        control.establish().unwrap();
        assert_eq!(frame::read(&mut host).unwrap(), Some(FromGuest::Hello { version: PROTOCOL_VERSION }));
    }

    #[test]
    fn frames_of_the_host_arrive_and_its_close_is_seen() {
        let (mut control, mut host) = pair();
        frame::write(&mut host, &ToGuest::Signal { signal: 15 }).unwrap();
        frame::write(&mut host, &ToGuest::Signal { signal: 9 }).unwrap();
        control.receive();
        assert_eq!(control.next_frame(), Some(ToGuest::Signal { signal: 15 }));
        assert_eq!(control.next_frame(), Some(ToGuest::Signal { signal: 9 }));
        assert_eq!(control.next_frame(), None);
        assert!(!control.is_closed());
        drop(host);
        control.receive();
        assert!(control.is_closed());
    }

    #[test]
    fn garbage_from_the_host_closes_the_connection() {
        let (mut control, mut host) = pair();
        std::io::Write::write_all(&mut host, &[255; 64]).unwrap();
        control.receive();
        assert_eq!(control.next_frame(), None);
        assert!(control.is_closed());
    }

    #[test]
    fn a_report_is_whole_before_the_connection_ends() {
        let (mut control, mut host) = pair();
        let failure = Failure::new(FailureKind::UnknownUser, "no such user: nobody2");
        let reader = std::thread::spawn(move || {
            let mut frames = Vec::new();
            while let Some(frame) = frame::read::<FromGuest>(&mut host).unwrap() {
                frames.push(frame);
            }
            frames
        });
        control.report(&failure).unwrap();
        assert_eq!(reader.join().unwrap().last(), Some(&failure.to_frame()));
    }
}
