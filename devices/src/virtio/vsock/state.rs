//! The socket device in a snapshot. Connections are not saved: their host's end is a socket of a process that will be
//! gone. The restored guest is told so by an event (virtio 1.2, section 5.10.6.7) and then resets all of its own.
//!
//! ```text
//! None ──restored──▶ Owed ──a buffer for the event──▶ Told ──the driver brings another──▶ None
//! ```
//!
//! Until then no client of the host is let in: the guest would reset its connection with the old ones. Ports of the host
//! go on where they were, so that no new connection is taken for one of before.

use event_manager::EventOps;

use super::{Active, Vsock};
use crate::virtio::{
    InterruptReason,
    ring::{Chain, RingError},
    state::{Detail, DeviceState},
};

/// struct virtio_vsock_event with VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

/// How far a restored guest has been told of the end of its connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum News {
    /// There is nothing to tell.
    None,
    /// The driver has not had a buffer for the event.
    Owed,
    /// It has the event, and had made this many buffers available in all: the next one is that of the handled event.
    Told {
        /// The available index then.
        available: u16,
    },
}

impl Vsock {
    pub(super) fn saved(&self) -> DeviceState {
        let rings = self.active.iter().flat_map(|active| {
            [Some(active.rx.state(0)), Some(active.tx.state(0)), active.event.as_ref().map(|it| it.state(0))]
        });
        let mut state = DeviceState::of(rings);
        state.detail = Detail::Vsock { next_port: self.muxer.next_port() };
        state
    }

    pub(super) fn continue_without_connections(&mut self, state: &DeviceState) {
        if let Detail::Vsock { next_port } = state.detail {
            self.muxer.set_next_port(next_port);
        }
        // A driver without event queue learns it from the resets that answer its next packets.
        if self.active.as_ref().is_some_and(|active| active.event.is_some()) {
            self.news = News::Owed;
            self.events.fire();
        }
    }

    /// Brings the event on its way, and takes connections again when the driver has handled it.
    pub(super) fn tell_news(&mut self, ops: &mut EventOps) {
        if self.news == News::None {
            return;
        }
        self.bring_news();
        if self.news == News::None && self.active.is_some() {
            self.accept(ops);
        }
    }

    /// Brings the event on its way as far as the driver lets it. A device that fails over it is reset.
    pub(super) fn bring_news(&mut self) {
        let Some(active) = &mut self.active else { return };
        let next = match self.news {
            News::None => return,
            News::Owed => active.tell_reset(),
            News::Told { available } => active.was_heard(available),
        };
        match next {
            Ok(news) => self.news = news,
            Err(error) => {
                log::warn!("vsock: event queue: {error}");
                let interrupt = std::sync::Arc::clone(&active.interrupt);
                super::VirtioDevice::reset(self);
                interrupt.raise(InterruptReason::DeviceFailed);
            }
        }
    }
}

impl Active {
    fn tell_reset(&mut self) -> Result<News, RingError> {
        let Some(event) = &mut self.event else { return Ok(News::None) };
        let mut chain = Chain::default();
        if !event.pop(&self.memory, &mut chain)? {
            event.enable_notification(&self.memory)?;
            if !event.pop(&self.memory, &mut chain)? {
                return Ok(News::Owed);
            }
        }
        chain.write(&self.memory, 0, &TRANSPORT_RESET)?;
        event.push(&self.memory, chain.head(), TRANSPORT_RESET.len() as u32)?;
        let available = event.notify_at_next(&self.memory)?;
        self.interrupt.raise(InterruptReason::UsedRing);
        Ok(News::Told { available })
    }

    fn was_heard(&self, told_at: u16) -> Result<News, RingError> {
        let Some(event) = &self.event else { return Ok(News::None) };
        let heard = event.available_index(&self.memory)? != told_at;
        Ok(if heard { News::None } else { News::Told { available: told_at } })
    }
}
