//! What makes a session outlive its connection: each side counts the frames it has received, keeps those it has sent until
//! the other has counted them, and sends what is missing over the next connection. Pure.
//!
//! Only whole frames count, in their order; [`Received`](crate::session::FromSession::Received) and
//! [`Rejoined`](crate::session::FromSession::Rejoined), which speak of the connection itself, do not.

use std::collections::VecDeque;

/// What keeping a frame costs beside its bytes.
const FRAME_COST: usize = 64;
/// After so many bytes, costs included, the other side is told what was received. A fraction of every window.
const TOLD_EVERY: usize = 32 * 1024;

/// Frames that were sent and not yet counted by the other side.
#[derive(Clone, Debug, Default)]
pub struct Sent {
    frames: VecDeque<Vec<u8>>,
    /// How many came before those.
    counted: u64,
    bytes: usize,
}

impl Sent {
    /// Keeps an encoded frame that is about to be sent.
    pub fn keep(&mut self, frame: Vec<u8>) {
        self.bytes += frame.len() + FRAME_COST;
        self.frames.push_back(frame);
    }

    /// What is kept, in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The other side has so many frames in all. False if that cannot be.
    pub fn counted(&mut self, frames: u64) -> bool {
        let Some(more) = frames.checked_sub(self.counted) else { return false };
        if more > self.frames.len() as u64 {
            return false;
        }
        for frame in self.frames.drain(..more as usize) {
            self.bytes -= frame.len() + FRAME_COST;
        }
        self.counted = frames;
        true
    }

    /// All that the other side is missing, one frame behind the other.
    pub fn missing(&self) -> Vec<u8> {
        self.frames.iter().flatten().copied().collect()
    }
}

/// Frames that were received.
#[derive(Clone, Copy, Debug, Default)]
pub struct Count {
    frames: u64,
    untold: usize,
}

impl Count {
    /// One more was received and dealt with, of so many bytes.
    pub fn add(&mut self, bytes: usize) {
        self.frames = self.frames.saturating_add(1);
        self.untold = self.untold.saturating_add(bytes + FRAME_COST);
    }

    /// How many there were in all.
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// How many the other side is to be told of now, if it is time.
    pub fn due(&mut self) -> Option<u64> {
        (self.untold >= TOLD_EVERY).then(|| {
            self.untold = 0;
            self.frames
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_cannot_have_been_received_is_refused() {
        let mut sent = Sent::default();
        sent.keep(vec![1]);
        sent.keep(vec![2]);
        assert!(!sent.counted(3));
        assert!(sent.counted(1));
        assert!(!sent.counted(0));
        assert_eq!(sent.missing(), [2]);
        assert!(sent.counted(2));
        assert_eq!((sent.bytes(), sent.missing()), (0, vec![]));
    }

    /// What may happen between two sides.
    #[derive(Clone, Debug)]
    enum Event {
        /// The next frame is sent.
        Send,
        /// A frame arrives, if one is under way.
        Arrive,
        /// The receiver tells its count, if it is time.
        Tell,
        /// The connection breaks with all that is under way, and another is made.
        Break,
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            5 => Just(Event::Send),
            5 => Just(Event::Arrive),
            2 => Just(Event::Tell),
            1 => Just(Event::Break)
        ]
    }

    proptest! {
        #[test]
        fn every_frame_arrives_once_and_in_order_however_often_connections_break(
            events in proptest::collection::vec(event(), 0..400), length in 1usize..20_000
        ) {
            let (mut sent, mut count) = (Sent::default(), Count::default());
            let mut under_way = VecDeque::new();
            let (mut next, mut arrived) = (0u64, Vec::new());
            for event in events.into_iter().chain([Event::Break]) {
                match event {
                    Event::Send => {
                        let mut frame = vec![0; length + 8];
                        frame[..8].copy_from_slice(&next.to_le_bytes());
                        sent.keep(frame.clone());
                        under_way.push_back(frame);
                        next += 1;
                    }
                    Event::Arrive => {
                        if let Some(frame) = under_way.pop_front() {
                            count.add(frame.len());
                            arrived.push(u64::from_le_bytes(*frame.first_chunk().unwrap()));
                        }
                    }
                    Event::Tell => {
                        if let Some(frames) = count.due() {
                            prop_assert!(sent.counted(frames));
                        }
                    }
                    Event::Break => {
                        prop_assert!(sent.counted(count.frames()));
                        under_way = sent.missing().chunks(length + 8).map(<[u8]>::to_vec).collect();
                    }
                }
            }
            for frame in under_way {
                arrived.push(u64::from_le_bytes(*frame.first_chunk().unwrap()));
            }
            prop_assert_eq!(arrived, (0..next).collect::<Vec<_>>());
        }

        #[test]
        fn no_count_of_the_other_side_makes_it_panic(counts in proptest::collection::vec(any::<u64>(), 0..20)) {
            let mut sent = Sent::default();
            for count in counts {
                sent.keep(vec![0; 3]);
                let _ = sent.counted(count % 8);
                let _ = sent.counted(count);
            }
        }
    }
}
