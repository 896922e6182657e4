//! From the guest to the host (virtio 1.2, section 5.1.6.2).

use std::os::fd::BorrowedFd;

use super::{
    super::{
        Memory,
        ring::{Chain, Ring, RingError, total},
        state::RingState,
        throttle::Throttle,
        transfer::{Span, Transfer},
    },
    HEADER_BYTES,
};

/// The longest packet with its headers: 64 KiB of IP, Ethernet with a VLAN tag, virtio's.
const MAX_BYTES: u64 = 65_535 + 18 + HEADER_BYTES as u64;

/// The device's side of transmitq.
pub struct Transmitter {
    ring: Ring,
    chain: Chain,
}

impl Transmitter {
    pub fn new(ring: Ring) -> Self {
        Transmitter { ring, chain: Chain::default() }
    }

    /// Sends at most a queue's size of packets; true when there may be more at once.
    pub fn process(
        &mut self,
        memory: &Memory,
        file: BorrowedFd<'_>,
        transfer: &mut Transfer,
        throttle: &mut Throttle,
    ) -> Result<bool, RingError> {
        self.ring.disable_notification(memory)?;
        for _ in 0..self.ring.size() {
            // Without notifications until the alarm: what the driver adds must wait too.
            if !throttle.admits() {
                return Ok(false);
            }
            if !self.ring.pop(memory, &mut self.chain)? {
                if self.ring.enable_notification(memory)? {
                    continue;
                }
                return Ok(false);
            }
            let length = total(self.chain.readable());
            throttle.charge(length.saturating_sub(HEADER_BYTES.into()).min(MAX_BYTES));
            if (u64::from(HEADER_BYTES)..=MAX_BYTES).contains(&length) {
                let span = Span { buffers: self.chain.readable(), offset: 0, length };
                // A packet that the host does not take is lost, as on any wire: a bad header, a link that is down.
                if let Err(error) = transfer.write(file, memory, span) {
                    log::debug!("net: a packet of {length} bytes is lost: {error}");
                }
            }
            self.ring.push(memory, self.chain.head(), 0)?;
        }
        Ok(true)
    }

    pub fn state(&self) -> RingState {
        self.ring.state(0)
    }

    pub fn needs_interrupt(&mut self, memory: &Memory) -> Result<bool, RingError> {
        self.ring.needs_interrupt(memory)
    }
}
