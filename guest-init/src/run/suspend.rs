//! Standing still for a snapshot, and going on in another time and maybe another place.
//!
//! ```text
//! Running ── Suspend ──▶ workload frozen ──▶ filesystems frozen ──▶ streams ended ── Frozen sent ──▶ waiting
//!    ▲                                                                                                 │
//!    └── Resumed sent ◀── workload thawed ◀── streams, network, filesystems, randomness, clock ◀── Resume
//! ```
//! Nobody but this process runs meanwhile, so it is one procedure that may wait; a `Resume` ends each wait but that for the
//! streams, which is short where the host reads them. From the freezing of the filesystems to
//! their thawing nothing is written to a disk: a snapshot taken in between stays true of them until the host says `Resume`.
//! A restored machine finds all connections broken, and makes new ones.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use protocol::{FromGuest, NetworkConfig, Renewal, ToGuest, port};
use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{CWD, Mode, OFlags, openat, rename},
    io::Errno,
    process::{PidfdFlags, WaitOptions, pidfd_open, waitpid},
};

use super::{
    cgroup::Cgroup, clock, clock::Told, connections, filesystems, network, relay::Relay, set_hostname, stdio,
    stdio::Stdio,
};
use crate::{
    control::{Control, monotonic_ms, timeout, wait_connected},
    failure::{Failure, OrSetup},
    sys::{self, Fork},
};

/// How long the workload may take to stand still; a process in the middle of a slow write takes that long.
const FREEZE_LIMIT_MS: i64 = 10_000;
/// How long the host may take to read what the streams hold.
const STREAMS_LIMIT_MS: i64 = 10_000;
/// How long the host of a restored machine may take to answer.
const RECONNECT_LIMIT_MS: i64 = 10_000;
/// Pause between two attempts to reach it.
const RECONNECT_PAUSE_MS: u64 = 5;

/// Where programs find a number that no other run of this machine's memory has had. Of all places that programs see, /dev is on no
/// disk: the number is renewed while those are frozen.
const GENERATION: &str = "/dev/vm-generation-id";
const GENERATION_BYTES: usize = 16;

/// What is brought to stand still.
#[derive(Debug)]
pub struct Still<'a> {
    /// The workload.
    pub cgroup: &'a Cgroup,
    /// Its streams.
    pub stdio: &'a mut Stdio,
    /// Filesystems that are written to disks.
    pub disks: &'a [OwnedFd],
    /// The machine's place in the network.
    pub network: &'a mut Option<NetworkConfig>,
    /// Those of the filesystems that stand still because of this: one that the workload has frozen stays so.
    pub frozen: Vec<BorrowedFd<'a>>,
}

impl Still<'_> {
    /// Stands still until the host says how to go on. The host is told when it may take the snapshot, or why it may not.
    pub fn suspend(&mut self, control: &mut Control) {
        // Signals and sizes do not come: the host keeps them for a workload that runs.
        let mut early = None;
        let frozen = self.freeze(control, &mut |control| {
            control.receive();
            early = early.take().or_else(|| next_resume(control));
            early.is_none()
        });
        // The host has ended its side of the streams in any case.
        let stands = self.end_streams().and(frozen);
        let renewal = match (early, stands) {
            (Some(early), _) => Some((early, Told::default())),
            (None, Ok(())) => {
                control.send(&FromGuest::Frozen);
                wait_for(control, |frame, asked_ns| match frame {
                    ToGuest::Resume(renewal) => {
                        let time = Told::since(asked_ns, renewal.realtime_ns);
                        Some((*renewal, time))
                    }
                    _ => None,
                })
            }
            (None, Err(failure)) => {
                control.send(&FromGuest::NotFrozen { message: failure.one_line() });
                Some((Renewal::default(), Told::default()))
            }
        };
        let resumed = self.go_on(renewal.as_ref(), control);
        match resumed {
            Ok(()) if renewal.is_some() => control.send(&FromGuest::Resumed),
            Ok(()) => {}
            Err(failure) => control.send(&failure.to_frame()),
        }
    }

    /// Says why nothing stands still. The host has ended its side of the streams all the same, and is told of new ones.
    pub fn decline(&mut self, message: String, control: &mut Control) {
        let ended = self.end_streams();
        control.send(&FromGuest::NotFrozen { message });
        match ended.and_then(|()| self.begin_streams()) {
            Ok(()) => control.send(&FromGuest::Resumed),
            Err(failure) => control.send(&failure.to_frame()),
        }
    }

    fn freeze(
        &mut self,
        control: &mut Control,
        wanted: &mut dyn FnMut(&mut Control) -> bool,
    ) -> Result<(), Failure> {
        let frozen = self.cgroup.freeze(FREEZE_LIMIT_MS, control, wanted);
        frozen.or_setup(|| "freeze the workload".into())?;
        self.write_out(control, wanted).or_setup(|| "write the filesystems out".into())?;
        for disk in self.disks {
            match sys::freeze_filesystem(disk.as_fd()) {
                Ok(()) => self.frozen.push(disk.as_fd()),
                Err(Errno::BUSY) => {}
                Err(errno) => return Err(errno).or_setup(|| "freeze a filesystem".into()),
            }
        }
        Ok(())
    }

    /// Writes the filesystems to their disks, which may be slow, in a child that nobody has to wait for.
    fn write_out(
        &self,
        control: &mut Control,
        wanted: &mut dyn FnMut(&mut Control) -> bool,
    ) -> rustix::io::Result<()> {
        let pid = match sys::fork()? {
            Fork::Parent(pid) => pid,
            Fork::Child => {
                let written = self.disks.iter().all(|disk| rustix::fs::syncfs(disk).is_ok());
                sys::exit_now(if written { 0 } else { 1 })
            }
        };
        let child = pidfd_open(pid, PidfdFlags::empty())?;
        loop {
            let mut fds = vec![PollFd::new(&child, PollFlags::IN)];
            if !control.is_closed() {
                fds.push(PollFd::new(&*control, PollFlags::IN));
            }
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
            let is_done = fds.first().is_some_and(|fd| !fd.revents().is_empty());
            let has_come = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
            drop(fds);
            if is_done {
                let status = waitpid(Some(pid), WaitOptions::empty())?;
                let written = status.is_some_and(|(_, status)| status.exit_status() == Some(0));
                return if written { Ok(()) } else { Err(Errno::IO) };
            }
            // Given up, the child goes on by itself, and is buried by the loop.
            if has_come && !wanted(control) {
                return Err(Errno::CANCELED);
            }
        }
    }

    /// Everything that was read from the workload reaches the host, everything that the host has sent is taken. What the
    /// workload's pipes hold stays in them.
    fn end_streams(&mut self) -> Result<(), Failure> {
        let until = monotonic_ms() + STREAMS_LIMIT_MS;
        let mut result = Ok(());
        for relay in &mut self.stdio.outputs {
            result = result.and(end_output(relay, until));
        }
        if let Some(relay) = &mut self.stdio.input {
            result = result.and(end_input(relay, until));
        }
        result.or_setup(|| "pass the streams on to the host".into())
    }

    /// Goes on, in an order in which nobody sees anything old: the workload comes last.
    fn go_on(&mut self, renewal: Option<&(Renewal, Told)>, control: &mut Control) -> Result<(), Failure> {
        if let Some((renewal, time)) = renewal {
            clock::set(*time, control)?;
            renew_random(&renewal.entropy)?;
        }
        // Only who was on disk gets fresh randomness.
        if renewal.is_some_and(|(renewal, _)| !renewal.entropy.is_empty()) {
            // The host has reset their peers meanwhile.
            connections::end();
        }
        for disk in self.frozen.drain(..) {
            let _ = sys::thaw_filesystem(disk);
        }
        let renewed = renewal.map_or(Ok(()), |(renewal, _)| self.renew(renewal));
        self.cgroup.thaw().or_setup(|| "thaw the workload".into())?;
        renewed
    }

    fn renew(&mut self, renewal: &Renewal) -> Result<(), Failure> {
        let mut is_elsewhere = !renewal.hostname.is_empty() && renewal.hostname != hostname();
        if is_elsewhere {
            set_hostname(&renewal.hostname)?;
        }
        if let Some(network) = &renewal.network
            && self.network.as_ref() != Some(network)
        {
            network::renew(self.network.as_ref(), network)?;
            *self.network = Some(network.clone());
            is_elsewhere = true;
        }
        if is_elsewhere {
            filesystems::rewrite_etc(&hostname(), self.network.as_ref());
        }
        self.begin_streams()?;
        if let (Some(terminal), Some(size)) = (&self.stdio.terminal, renewal.terminal) {
            let _ = stdio::resize(terminal, size);
        }
        Ok(())
    }

    /// Connects the streams again that have not ended.
    fn begin_streams(&mut self) -> Result<(), Failure> {
        let terminal = self.stdio.terminal.is_some();
        for (relay, port) in self.stdio.outputs.iter_mut().zip([port::STDOUT, port::STDERR]) {
            let socket = connect(port)?;
            if terminal && let Some(input) = &mut self.stdio.input {
                input.join_host(stdio::duplicate(&socket).or_setup(|| "share the terminal's stream".into())?);
            }
            relay.join_host(socket);
        }
        if !terminal && let Some(input) = &mut self.stdio.input {
            input.join_host(connect(port::STDIN)?);
        }
        Ok(())
    }
}

fn connect(port: u32) -> Result<OwnedFd, Failure> {
    let socket = sys::vsock_connect(port).or_setup(|| format!("connect to the host on vsock port {port}"))?;
    wait_connected(socket.as_fd(), port)?;
    Ok(socket)
}

/// Writes what is pending and says that nothing follows. The host tells by the stream's end when it has everything.
fn end_output(relay: &mut Relay, until: i64) -> rustix::io::Result<()> {
    while !relay.flush_to_host() {
        match relay.sink_interest() {
            Some((fd, flags)) => wait(fd, flags, until)?,
            None => return Ok(()),
        }
    }
    Ok(())
}

/// Takes what the host has sent before it stopped.
fn end_input(relay: &mut Relay, until: i64) -> rustix::io::Result<()> {
    while !relay.absorb()? {
        match relay.source() {
            Some(socket) => wait(socket, PollFlags::IN, until)?,
            None => return Ok(()),
        }
    }
    Ok(())
}

fn wait(fd: BorrowedFd<'_>, flags: PollFlags, until: i64) -> rustix::io::Result<()> {
    let left = (until - monotonic_ms()).max(0);
    match poll(&mut [PollFd::from_borrowed_fd(fd, flags)], Some(&timeout(left))) {
        Ok(0) => Err(Errno::TIMEDOUT),
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// The next `Resume` that has arrived. All else that comes meanwhile is for a workload that runs.
fn next_resume(control: &mut Control) -> Option<Renewal> {
    next(control, &|frame| match frame {
        ToGuest::Resume(renewal) => Some(*renewal),
        _ => None,
    })
}

/// The next frame that has arrived and is accepted; others are passed over.
fn next<T>(control: &mut Control, accept: &impl Fn(ToGuest) -> Option<T>) -> Option<T> {
    loop {
        if let Some(accepted) = accept(control.next_frame()?) {
            return Some(accepted);
        }
    }
}

/// Waits for a frame that is accepted, over a new connection where a restored machine's old one is broken; others are passed
/// over. With each comes the monotonic time, in nanoseconds, at which the host may have begun to answer. `None` when there is no host.
pub fn wait_for<T>(control: &mut Control, accept: impl Fn(ToGuest, i64) -> Option<T>) -> Option<T> {
    let mut give_up_at = None;
    // The host answers when it has heard of the new connection.
    let mut asked_ns = clock::monotonic_ns();
    loop {
        if let Some(accepted) = next(control, &|frame| accept(frame, asked_ns)) {
            return Some(accepted);
        }
        if control.is_closed() {
            let until = *give_up_at.get_or_insert_with(|| monotonic_ms() + RECONNECT_LIMIT_MS);
            asked_ns = clock::monotonic_ns();
            match Control::connect().and_then(|mut fresh| fresh.establish().map(|()| fresh)) {
                Ok(fresh) => *control = fresh,
                Err(_) if monotonic_ms() < until => {
                    std::thread::sleep(std::time::Duration::from_millis(RECONNECT_PAUSE_MS));
                }
                Err(_) => return None,
            }
            continue;
        }
        let mut fds = [PollFd::new(control, control.interest())];
        if poll(&mut fds, None).is_ok() {
            control.flush();
            control.receive();
        }
    }
}

/// What the machine is called.
pub fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// The random generator takes these bytes in, and forgets what it was: bytes that were promised before a snapshot are not given out behind
/// it. Without any all stays as it is.
///
/// # Errors
/// The kernel's reason.
pub fn renew_random(entropy: &[u8]) -> Result<(), Failure> {
    if entropy.is_empty() {
        return Ok(());
    }
    openat(CWD, "/dev/random", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
        .and_then(|device| {
            sys::add_entropy(device.as_fd(), entropy)?;
            sys::reseed_random(device.as_fd())
        })
        .or_setup(|| "seed the random generator".into())?;
    write_generation();
    Ok(())
}

/// Gives this run of the machine's memory its number, as a VM generation id: 32 hexadecimal digits, another after each
/// resume.
fn write_generation() {
    let mut bytes = [0; GENERATION_BYTES];
    if rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty()) != Ok(GENERATION_BYTES)
    {
        return;
    }
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let draft = format!("{GENERATION}.new");
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let _ = openat(CWD, &draft, flags, Mode::from_raw_mode(0o444))
        .and_then(|file| rustix::io::write(file, format!("{digits}\n").as_bytes()))
        .and_then(|_| rename(&draft, GENERATION));
}
