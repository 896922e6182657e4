//! The conversation with virtiofsd: vhost-user (docs/interop/vhost-user.rst in QEMU), by the crate `vhost`.
//!
//! That crate waits for an answer for as long as it takes, and takes a socket's own time limit for a reason to try again.
//! So each step runs under a [`Watchdog`], which shuts the socket down when the time is up; the step then fails as it does
//! when virtiofsd ends. A connection that has failed once is of no further use.

use std::{
    io,
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::Duration,
};

use ::vhost::{
    Error, VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{
        Frontend, VhostUserFrontend, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
        message::VhostUserHeaderFlag,
    },
};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::{
    ActiveQueue, Memory,
    mmio::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1},
};

/// What the transport offers the driver, and what whoever serves the rings must therefore know.
const RING_FEATURES: u64 = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1;

/// A virtiofsd that is connected.
pub struct Backend {
    frontend: Frontend,
    stream: UnixStream,
    watchdog: Watchdog,
}

impl Backend {
    /// Agrees on features with the one at the other end.
    ///
    /// # Errors
    /// It does not answer within `limit`, or lacks a feature.
    pub fn greet(stream: UnixStream, queues: usize, limit: Duration, begin: fn()) -> io::Result<Self> {
        let watchdog = Watchdog::new(stream.try_clone()?, limit, begin)?;
        let frontend = Frontend::from_stream(stream.try_clone()?, queues as u64);
        let mut backend = Backend { frontend, stream, watchdog };
        backend.step(|frontend| agree(frontend, queues))?;
        Ok(backend)
    }

    /// The connection, for watching its end.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Hands guest memory and all queues over.
    ///
    /// # Errors
    /// Guest memory belongs to this process alone, virtiofsd refuses, or does not answer in time.
    pub fn start(
        &mut self,
        memory: &Memory,
        queues: &[ActiveQueue],
        features: u64,
        call: &EventFd,
    ) -> io::Result<()> {
        let regions = memory.iter().map(VhostUserMemoryRegionInfo::from_guest_region);
        let regions: Vec<_> = regions.collect::<Result<_, _>>().map_err(io::Error::other)?;
        let rings = queues.iter().map(|queue| addresses(memory, queue)).collect::<io::Result<Vec<_>>>()?;
        let features = features & RING_FEATURES | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.step(|frontend| {
            frontend.set_features(features)?;
            frontend.set_mem_table(&regions)?;
            for (index, (ActiveQueue { queue, notify }, ring)) in queues.iter().zip(&rings).enumerate() {
                frontend.set_vring_num(index, queue.size())?;
                frontend.set_vring_addr(index, ring)?;
                frontend.set_vring_base(index, queue.next_avail())?;
                frontend.set_vring_call(index, call)?;
                frontend.set_vring_kick(index, notify)?;
            }
            (0..queues.len()).try_for_each(|index| frontend.set_vring_enable(index, true))
        })
    }

    /// Takes the queues back; when it has succeeded, virtiofsd does not touch them any more.
    ///
    /// # Errors
    /// It does not answer in time, or has ended.
    pub fn stop(&mut self, queues: usize) -> io::Result<()> {
        self.step(|frontend| (0..queues).try_for_each(|index| frontend.get_vring_base(index).map(drop)))
    }

    /// Ends the connection, and with it virtiofsd.
    pub fn hang_up(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    fn step(&mut self, step: impl FnOnce(&mut Frontend) -> Result<(), Error>) -> io::Result<()> {
        self.watchdog.start();
        let result = step(&mut self.frontend);
        self.watchdog.stop();
        result.map_err(|error| match self.watchdog.has_bitten() {
            true => {
                let limit = self.watchdog.limit;
                io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("virtiofsd has not answered within {limit:?}"),
                )
            }
            false => io::Error::other(format!("virtiofsd has ended or refuses ({error})")),
        })
    }
}

/// The first words, up to what both can do.
fn agree(frontend: &mut Frontend, queues: usize) -> Result<(), Error> {
    frontend.set_owner()?;
    let wanted = RING_FEATURES | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    let missing = wanted & !frontend.get_features()?;
    if missing != 0 {
        return Err(unable(format!("it lacks the features {missing:#x}")));
    }
    let useful = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
    let agreed = frontend.get_protocol_features()? & useful;
    frontend.set_protocol_features(agreed)?;
    if agreed.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    if agreed.contains(VhostUserProtocolFeatures::MQ) && frontend.get_queue_num()? < queues as u64 {
        return Err(unable(format!("it has fewer than {queues} queues")));
    }
    Ok(())
}

fn unable(reason: String) -> Error {
    Error::IoctlError(io::Error::other(reason))
}

/// Where the parts of a ring are in this process; each lies in one region, so that nobody runs over its end.
fn addresses(memory: &Memory, ActiveQueue { queue, .. }: &ActiveQueue) -> io::Result<VringConfigData> {
    let size = usize::from(queue.size());
    let address = |guest: u64, bytes: usize| {
        let slice = memory.get_slice(GuestAddress(guest), bytes).map_err(io::Error::other)?;
        Ok::<_, io::Error>(slice.ptr_guard().as_ptr() as u64)
    };
    Ok(VringConfigData {
        queue_max_size: queue.max_size(),
        queue_size: queue.size(),
        flags: 0,
        desc_table_addr: address(queue.desc_table(), 16 * size)?,
        avail_ring_addr: address(queue.avail_ring(), 6 + 2 * size)?,
        used_ring_addr: address(queue.used_ring(), 6 + 8 * size)?,
        log_addr: None,
    })
}

/// A thread that shuts a connection down when a step takes too long. It ends with the value.
struct Watchdog {
    steps: Sender<Step>,
    has_bitten: Arc<AtomicBool>,
    limit: Duration,
}

enum Step {
    Begins,
    Ends,
}

impl Watchdog {
    #[allow(clippy::disallowed_methods, reason = "the one thread of this crate; it begins as it is told")]
    fn new(stream: UnixStream, limit: Duration, begin: fn()) -> io::Result<Self> {
        let (steps, told) = channel();
        let has_bitten = Arc::new(AtomicBool::new(false));
        let bite = Arc::clone(&has_bitten);
        let watch = move || {
            begin();
            if is_late(&told, limit) {
                bite.store(true, Ordering::Release);
                let _ = stream.shutdown(Shutdown::Both);
            }
        };
        thread::Builder::new().name("fs-watchdog".into()).stack_size(64 << 10).spawn(watch)?;
        Ok(Watchdog { steps, has_bitten, limit })
    }

    fn start(&self) {
        // After its one bite nobody listens.
        let _ = self.steps.send(Step::Begins);
    }

    fn stop(&self) {
        let _ = self.steps.send(Step::Ends);
    }

    fn has_bitten(&self) -> bool {
        self.has_bitten.load(Ordering::Acquire)
    }
}

/// Waits until a step is late; `false` when there will be none any more.
fn is_late(told: &Receiver<Step>, limit: Duration) -> bool {
    loop {
        match told.recv() {
            Err(_) => return false,
            Ok(Step::Ends) => continue,
            Ok(Step::Begins) => {}
        }
        match told.recv_timeout(limit) {
            Err(RecvTimeoutError::Timeout) => return true,
            Err(RecvTimeoutError::Disconnected) => return false,
            Ok(_) => {}
        }
    }
}
