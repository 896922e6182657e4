//! Answers in the place of a virtiofsd that is gone: each request fails with ENOTCONN, as one to a dead FUSE daemon does
//! on any host.

use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueT};

use super::Memory;
use crate::virtio::ring::{Chain, Ring, RingError, total};

/// struct fuse_in_header, with which each request begins; its `unique` is at byte 8 (include/uapi/linux/fuse.h).
const IN_HEADER_BYTES: usize = 40;
/// struct fuse_out_header: length, error, unique.
const OUT_HEADER_BYTES: u32 = 16;

/// The queues that nobody else serves.
pub struct Abandoned {
    rings: Vec<Ring>,
    chain: Chain,
}

/// What one round of answers leaves to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// The driver wants an interrupt.
    pub interrupt: bool,
    /// There may be more requests.
    pub more: bool,
}

impl Abandoned {
    /// Goes on where the queues' last server stopped. As only their used index tells where that was, requests are taken
    /// to have been finished in order, which is what virtiofsd does unless it is given a pool of threads.
    ///
    /// # Errors
    /// A ring is not in guest memory any more.
    pub fn take_over<'a>(
        memory: &Memory,
        queues: impl Iterator<Item = &'a Queue>,
    ) -> Result<Self, RingError> {
        let rings = queues.map(|queue| {
            let mut own = Queue::try_from(queue.state())?;
            let used = queue.used_idx(memory, Ordering::Acquire)?.0;
            own.set_next_used(used);
            own.set_next_avail(used);
            Ok(Ring::new(own))
        });
        Ok(Abandoned { rings: rings.collect::<Result<_, RingError>>()?, chain: Chain::default() })
    }

    /// Answers at most a queue's size of requests of each queue.
    ///
    /// # Errors
    /// The driver has broken a ring, or a request is no FUSE request.
    pub fn answer(&mut self, memory: &Memory) -> Result<Done, RingError> {
        let mut done = Done::default();
        for ring in &mut self.rings {
            done.more |= answer_queue(ring, &mut self.chain, memory)?;
            done.interrupt |= ring.needs_interrupt(memory)?;
        }
        Ok(done)
    }
}

/// True when there may be more.
fn answer_queue(ring: &mut Ring, chain: &mut Chain, memory: &Memory) -> Result<bool, RingError> {
    for _ in 0..ring.size() {
        if !ring.pop(memory, chain)? {
            // Its last server may have asked the driver not to notify.
            match ring.enable_notification(memory)? {
                true => continue,
                false => return Ok(false),
            }
        }
        let written = refuse(chain, memory)?;
        ring.push(memory, chain.head(), written)?;
    }
    Ok(true)
}

/// Writes the answer, unless the request is one without, and gives its length.
fn refuse(chain: &Chain, memory: &Memory) -> Result<u32, RingError> {
    let mut header = [0; IN_HEADER_BYTES];
    chain.read(memory, 0, &mut header)?;
    if total(chain.writable()) < OUT_HEADER_BYTES.into() {
        return Ok(0);
    }
    let mut answer = [0; OUT_HEADER_BYTES as usize];
    let error = -libc::ENOTCONN;
    let unique = header.iter().skip(8).take(8).copied();
    let fields = OUT_HEADER_BYTES.to_le_bytes().into_iter().chain(error.to_le_bytes()).chain(unique);
    for (place, byte) in answer.iter_mut().zip(fields) {
        *place = byte;
    }
    chain.write(memory, 0, &answer)?;
    Ok(OUT_HEADER_BYTES)
}
