//! The socket device (virtio 1.2, section 5.10): streams between ports of the guest and unix sockets of the host.

mod connection;
mod muxer;
mod packet;
mod state;

use std::{
    io,
    os::{
        fd::AsRawFd,
        unix::{fs::FileTypeExt, net::UnixListener},
    },
    path::Path,
    sync::Arc,
};

use connection::Connection;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use muxer::{FIRST_CONNECTION, Muxer};
use state::News;

use super::{
    ActivateError, Activation, Interrupt, InterruptReason, Memory, VirtioDevice,
    events::QueueEvents,
    ring::{Chain, Ring, RingError},
    state::{DeviceState, SaveError},
};

const DEVICE_TYPE: u32 = 19;
/// Room for as much as a round takes; a ring of 256 in each direction is what Linux can use.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
/// The event data of the listening socket.
const LISTENER: u32 = 8;
const _: () = assert!(LISTENER < FIRST_CONNECTION);

/// The most packets that one round gives to the guest before other devices have their turn.
const PACKETS_PER_ROUND: usize = 256;

/// The socket device.
pub struct Vsock {
    guest_cid: u64,
    listener: UnixListener,
    listening: bool,
    muxer: Muxer,
    /// Connections of a driver that is gone. The event loop's thread closes them, as only it can forget them.
    retired: Vec<Connection>,
    events: QueueEvents,
    active: Option<Active>,
    /// A guest that continues a snapshot has not taken notice yet that its connections are gone.
    news: News,
}

struct Active {
    memory: Memory,
    interrupt: Arc<dyn Interrupt>,
    rx: Ring,
    tx: Ring,
    /// Only a snapshot's resume has an event to put here.
    event: Option<Ring>,
}

impl Vsock {
    /// Makes the device and listens at `path`, where a socket left over from a machine before is replaced. Clients wait
    /// in the listener's backlog until the guest's driver is there.
    ///
    /// # Errors
    /// When the socket cannot be bound (its path has at most 107 bytes) or the host grants no more eventfds.
    pub fn new(guest_cid: u64, path: &Path) -> io::Result<Self> {
        if path.symlink_metadata().is_ok_and(|found| found.file_type().is_socket()) {
            std::fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(Vsock {
            guest_cid,
            listener,
            listening: false,
            muxer: Muxer::new(guest_cid, path.to_path_buf()),
            retired: Vec::new(),
            events: QueueEvents::new()?,
            active: None,
            news: News::None,
        })
    }

    /// The same socket by the path that leads to it for this process from now on: it has gone where others lead nowhere.
    pub fn found_at(mut self, path: &Path) -> Self {
        self.muxer = Muxer::new(self.guest_cid, path.to_path_buf());
        self
    }

    /// Number of connections, those included whose last bytes are still going out.
    pub fn connections(&self) -> usize {
        self.muxer.len()
    }

    /// On the event loop's thread, after an activation or a reset.
    fn follow(&mut self, ops: &mut EventOps) {
        for connection in self.retired.drain(..) {
            let _ = ops.remove(Events::empty(connection.stream()));
            connection.close();
        }
        if self.active.is_some() != self.listening {
            self.watch_listener(ops);
        }
        // The edge of a client that came while no driver was there has been lost.
        self.accept(ops);
    }

    fn accept(&mut self, ops: &mut EventOps) {
        if self.listening && self.news == News::None {
            self.muxer.accept(&self.listener, ops);
        }
    }

    fn watch_listener(&mut self, ops: &mut EventOps) {
        let set = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let events = Events::with_data(&self.listener, LISTENER, set);
        let done = if self.listening { ops.remove(events) } else { ops.add(events) };
        match done {
            Ok(()) => self.listening = !self.listening,
            Err(error) => log::error!("vsock: cannot watch the listening socket: {error}"),
        }
    }

    /// Moves packets both ways until there are none, or a round is full.
    fn pump(&mut self, ops: &mut EventOps) {
        let Some(active) = &mut self.active else { return };
        match active.pump(&mut self.muxer, ops) {
            Ok(false) => {}
            Ok(true) => self.events.fire(),
            Err(error) => {
                log::warn!("vsock: {error}");
                let interrupt = Arc::clone(&active.interrupt);
                self.reset();
                interrupt.raise(InterruptReason::DeviceFailed);
            }
        }
    }
}

impl Active {
    /// True when a round was full.
    fn pump(&mut self, muxer: &mut Muxer, ops: &mut EventOps) -> Result<bool, RingError> {
        let mut chain = Chain::default();
        let more_tx = self.take_from_guest(muxer, &mut chain, ops)?;
        let more_rx = self.give_to_guest(muxer, &mut chain, ops)?;
        let rx = self.rx.needs_interrupt(&self.memory)?;
        let tx = self.tx.needs_interrupt(&self.memory)?;
        if rx || tx {
            self.interrupt.raise(InterruptReason::UsedRing);
        }
        Ok(more_tx || more_rx)
    }

    fn take_from_guest(
        &mut self,
        muxer: &mut Muxer,
        chain: &mut Chain,
        ops: &mut EventOps,
    ) -> Result<bool, RingError> {
        self.tx.disable_notification(&self.memory)?;
        for _ in 0..self.tx.size() {
            if self.tx.pop(&self.memory, chain)? {
                muxer.take(&self.memory, chain, ops)?;
                self.tx.push(&self.memory, chain.head(), 0)?;
            } else if !self.tx.enable_notification(&self.memory)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn give_to_guest(
        &mut self,
        muxer: &mut Muxer,
        chain: &mut Chain,
        ops: &mut EventOps,
    ) -> Result<bool, RingError> {
        self.rx.disable_notification(&self.memory)?;
        for _ in 0..PACKETS_PER_ROUND {
            if !muxer.has_packet() {
                return Ok(false);
            }
            if !self.rx.pop(&self.memory, chain)? {
                // Only a guest that has to bring buffers is asked to tell of them.
                if self.rx.enable_notification(&self.memory)? {
                    continue;
                }
                return Ok(false);
            }
            match muxer.give(&self.memory, chain, ops)? {
                Some(written) => self.rx.push(&self.memory, chain.head(), written)?,
                None => self.rx.put_back(),
            }
        }
        Ok(true)
    }
}

impl MutEventSubscriber for Vsock {
    fn init(&mut self, ops: &mut EventOps) {
        self.events.init(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if self.events.control(events, ops) {
            self.follow(ops);
        } else if !self.events.acknowledge(events) {
            if self.active.is_none() {
                return;
            }
            if events.fd() == self.listener.as_raw_fd() {
                self.accept(ops);
            } else {
                self.muxer.socket_event(events, ops);
            }
        }
        self.tell_news(ops);
        self.pump(ops);
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// struct virtio_vsock_config (section 5.10.4): the guest's address.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let config = self.guest_cid.to_le_bytes();
        let rest = usize::try_from(offset).ok().and_then(|at| config.get(at..)).unwrap_or_default();
        for (place, byte) in data.iter_mut().zip(rest) {
            *place = *byte;
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut queues = activation.queues.into_iter();
        let rx = queues.next().flatten().ok_or(ActivateError::QueueMissing(RX))?;
        let tx = queues.next().flatten().ok_or(ActivateError::QueueMissing(TX))?;
        let event = queues.next().flatten();
        let mut notifications = vec![(RX as u32, rx.notify), (TX as u32, tx.notify)];
        if let Some(event) = &event {
            notifications.push((EVENT as u32, event.notify.try_clone()?));
        }
        self.events.watch(notifications);
        self.active = Some(Active {
            memory: activation.memory,
            interrupt: activation.interrupt,
            rx: Ring::new(rx.queue),
            tx: Ring::new(tx.queue),
            event: event.map(|event| Ring::new(event.queue)),
        });
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.news = News::None;
        self.retired.extend(self.muxer.clear());
        self.events.forget();
        if self.listening {
            self.events.fire();
        }
    }

    fn save(&mut self) -> Result<DeviceState, SaveError> {
        Ok(self.saved())
    }

    fn restored(&mut self, state: &DeviceState) {
        self.continue_without_connections(state);
    }

    /// The end of its connections is what wakes a guest up. That it was heard is the event loop's to see, which accepts new ones then.
    fn begin(&mut self) {
        if self.news == News::Owed {
            self.bring_news();
        }
    }
}

#[cfg(test)]
mod tests;
