//! Which queue is what (virtio 1.2, section 5.1.2): receiveq1, transmitq1, receiveq2, … and the control queue behind them.

use super::config::{self, NetConfig};
use crate::virtio::{ActivateError, ActiveQueue};

/// receiveqN and transmitqN.
#[derive(Debug)]
pub struct Pair {
    pub receive: ActiveQueue,
    pub transmit: ActiveQueue,
}

/// The queues that a driver has set up.
#[derive(Debug)]
pub struct Queues {
    /// At least the first pair; those that follow it as far as none is missing.
    pub pairs: Vec<Pair>,
    pub control: Option<ActiveQueue>,
}

impl Queues {
    /// Takes the queues of an activation.
    ///
    /// # Errors
    /// One of the first pair is missing.
    pub fn arrange(
        queues: Vec<Option<ActiveQueue>>,
        features: u64,
        config: NetConfig,
    ) -> Result<Self, ActivateError> {
        let mut queues = queues.into_iter();
        let mut next = || queues.next().flatten();
        let receive = next().ok_or(ActivateError::QueueMissing(0))?;
        let transmit = next().ok_or(ActivateError::QueueMissing(1))?;
        let mut pairs = vec![Pair { receive, transmit }];
        let mut complete = true;
        // Without MQ the control queue follows the first pair.
        for _ in 1..config::negotiated_pairs(features, config) {
            match (next(), next()) {
                (Some(receive), Some(transmit)) if complete => pairs.push(Pair { receive, transmit }),
                _ => complete = false,
            }
        }
        let control = if config::has_control(features) { next() } else { None };
        Ok(Queues { pairs, control })
    }

    /// The index of the control queue, if there is one: without MQ it follows the first pair.
    pub fn control_index(features: u64, config: NetConfig) -> usize {
        2 * usize::from(config::negotiated_pairs(features, config))
    }

    /// The index of receiveq of this pair; transmitq's is the next.
    pub fn index(pair: usize) -> u32 {
        2 * pair as u32
    }
}
