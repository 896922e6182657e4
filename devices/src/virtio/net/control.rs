//! The control queue (virtio 1.2, section 5.1.6.5), of which this device knows one command: how many pairs of queues to use.

use std::{io, num::NonZeroU64};

use super::{
    super::{
        Memory,
        rate::Rate,
        ring::{Chain, Ring, RingError, total},
        state::RingState,
        throttle::Throttle,
    },
    NetConfig,
};

/// struct virtio_net_ctrl up to its data: class and command.
const HEADER_BYTES: u64 = 2;
const CLASS_MQ: u8 = 4;
const MQ_VQ_PAIRS_SET: u8 = 0;
const OK: u8 = 0;
const ERR: u8 = 1;

/// A driver commands once, when it starts. Each command may have the host attach and detach queues, under the one lock that
/// its kernel has for all network configuration, so a guest gets no more of it than this.
const COMMANDS_PER_SECOND: Option<NonZeroU64> = NonZeroU64::new(10);

/// What holds the commands of such a card to their rate.
///
/// # Errors
/// When the host grants no more timers.
pub fn throttle(config: NetConfig) -> io::Result<Throttle> {
    if config.pairs == 1 {
        return Ok(Throttle::default());
    }
    Throttle::new(Rate { bytes: None, operations: COMMANDS_PER_SECOND })
}

/// The device's side of controlq.
pub struct Control {
    ring: Ring,
    chain: Chain,
}

impl Control {
    pub fn new(ring: Ring) -> Self {
        Control { ring, chain: Chain::default() }
    }

    /// Carries out at most a queue's size of commands; true when there may be more at once. `set_pairs` is given a number that the
    /// driver asks for, which may be any, and says whether it is used from now on.
    pub fn process(
        &mut self,
        memory: &Memory,
        throttle: &mut Throttle,
        mut set_pairs: impl FnMut(u16) -> bool,
    ) -> Result<bool, RingError> {
        self.ring.disable_notification(memory)?;
        for _ in 0..self.ring.size() {
            if !throttle.admits() {
                return Ok(false);
            }
            if !self.ring.pop(memory, &mut self.chain)? {
                if self.ring.enable_notification(memory)? {
                    continue;
                }
                return Ok(false);
            }
            // The ack is the last writable byte; behind a reply, if there were commands with one.
            let Some(ack_at) = total(self.chain.writable()).checked_sub(1) else {
                return Err(RingError::TooShort { needed: 1 });
            };
            throttle.charge(0);
            let done = self.wanted_pairs(memory)?.is_some_and(&mut set_pairs);
            self.chain.write(memory, ack_at, &[if done { OK } else { ERR }])?;
            self.ring.push(memory, self.chain.head(), u32::from(ack_at == 0))?;
        }
        Ok(true)
    }

    pub fn state(&self) -> RingState {
        self.ring.state(0)
    }

    pub fn needs_interrupt(&mut self, memory: &Memory) -> Result<bool, RingError> {
        self.ring.needs_interrupt(memory)
    }

    /// What VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET asks for; `None` for any other command.
    fn wanted_pairs(&self, memory: &Memory) -> Result<Option<u16>, RingError> {
        let mut command = [0; HEADER_BYTES as usize + 2];
        if total(self.chain.readable()) != command.len() as u64 {
            return Ok(None);
        }
        self.chain.read(memory, 0, &mut command)?;
        let [class, command, low, high] = command;
        let known = (class, command) == (CLASS_MQ, MQ_VQ_PAIRS_SET);
        Ok(known.then_some(u16::from_le_bytes([low, high])))
    }
}
