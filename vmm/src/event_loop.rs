//! The thread that serves the devices and watches for the end: the process's first.

use std::{
    io, mem,
    os::fd::{AsRawFd, RawFd},
    ptr,
    sync::{Arc, Mutex},
};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};

use crate::{ending::Ending, exit::VmExit};

/// Anything that the loop serves.
pub type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// The loop and what it serves.
pub struct EventLoop {
    manager: EventManager<Subscriber>,
    ending: Arc<Ending>,
}

impl std::fmt::Debug for EventLoop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EventLoop")
    }
}

impl EventLoop {
    /// A loop that serves nothing but the end.
    ///
    /// # Errors
    /// The host gives no epoll instance.
    pub fn new(ending: Arc<Ending>) -> io::Result<Self> {
        let manager = EventManager::new().map_err(io::Error::other)?;
        let mut this = Self { manager, ending: Arc::clone(&ending) };
        this.serve(Arc::new(Mutex::new(EndWatch(ending))));
        Ok(this)
    }

    /// Serves this too. Before [`EventLoop::run`], on its thread.
    pub fn serve(&mut self, subscriber: Subscriber) {
        self.manager.add_subscriber(subscriber);
    }

    /// Ends the machine on SIGTERM and SIGINT. Before any other thread starts, so that all threads leave the signals
    /// to this loop.
    ///
    /// # Errors
    /// The host gives no signalfd.
    pub fn serve_signals(&mut self) -> io::Result<()> {
        let watch = SignalWatch { fd: signal_fd()?, ending: Arc::clone(&self.ending) };
        self.serve(Arc::new(Mutex::new(watch)));
        Ok(())
    }

    /// Serves until the machine ends.
    pub fn run(&mut self) {
        while self.ending.get().is_none() {
            if let Err(error) = self.manager.run() {
                self.ending.end(VmExit::Setup, format!("the event loop failed: {error}"));
            }
        }
    }
}

/// Wakes the loop at the end.
struct EndWatch(Arc<Ending>);

impl MutEventSubscriber for EndWatch {
    fn init(&mut self, ops: &mut EventOps) {
        if ops.add(Events::new(self.0.event(), EventSet::IN)).is_err() {
            self.0.end(VmExit::Setup, "the host does not poll an eventfd");
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        let _once = self.0.event().read();
    }
}

/// Whether one of the signals that end the machine waits for the loop, which does something long.
pub fn signal_waits() -> bool {
    // SAFETY: all zeros is a valid sigset_t, and the calls only read and write this one.
    unsafe {
        let mut set: libc::sigset_t = mem::zeroed();
        libc::sigpending(&mut set) == 0
            && (libc::sigismember(&set, libc::SIGTERM) == 1 || libc::sigismember(&set, libc::SIGINT) == 1)
    }
}

struct SignalWatch {
    fd: RawFd,
    ending: Arc<Ending>,
}

impl MutEventSubscriber for SignalWatch {
    fn init(&mut self, ops: &mut EventOps) {
        if ops.add(Events::new(&self.fd, EventSet::IN)).is_err() {
            self.ending.end(VmExit::Setup, "the host does not poll a signalfd");
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        let name = match read_signal(self.fd) {
            libc::SIGINT => "SIGINT",
            _ => "SIGTERM",
        };
        self.ending.end(VmExit::Terminated, format!("ended by {name}"));
    }
}

impl Drop for SignalWatch {
    fn drop(&mut self) {
        // SAFETY: the descriptor is this value's own and is not used after.
        unsafe { libc::close(self.fd) };
    }
}

fn signal_fd() -> io::Result<RawFd> {
    // SAFETY: a sigset_t of zeros is valid memory for sigemptyset; the calls only write to it and to the thread's
    // mask, and signalfd makes a new descriptor.
    let fd = unsafe {
        let mut set: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::sigaddset(&mut set, libc::SIGINT);
        if libc::pthread_sigmask(libc::SIG_BLOCK, &set, ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    };
    if fd.as_raw_fd() < 0 { Err(io::Error::last_os_error()) } else { Ok(fd) }
}

fn read_signal(fd: RawFd) -> i32 {
    // SAFETY: all zeros is a valid signalfd_siginfo.
    let mut info: libc::signalfd_siginfo = unsafe { mem::zeroed() };
    // SAFETY: the pointer and the length are those of `info`.
    unsafe { libc::read(fd, (&raw mut info).cast(), size_of_val(&info)) };
    info.ssi_signo.cast_signed()
}
