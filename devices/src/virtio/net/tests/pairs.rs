//! A card of several pairs of queues and a control queue, driven as a guest would.

use std::num::NonZeroU64;

use super::*;
use crate::{testing::TestClock, virtio::rate::Rate};

const PAIRS: u16 = 3;
const CTRL_VQ: u64 = config::F_CTRL_VQ;
const MQ: u64 = config::F_MQ;
const SET: [u8; 2] = [4, 0];
const OK: u8 = 0;
const ERR: u8 = 1;
/// The index of the control queue behind three pairs.
const CONTROL: usize = 6;

/// A wire for each pair, and the number of those that the device was told to use.
struct Wires {
    sockets: Vec<UnixDatagram>,
    used: Arc<Mutex<usize>>,
    /// The most that the host grants.
    most: usize,
}

impl Backend for Wires {
    fn file(&self, pair: usize) -> Option<BorrowedFd<'_>> {
        self.sockets.get(pair).map(UnixDatagram::as_fd)
    }

    fn set_pairs(&mut self, count: usize) -> io::Result<()> {
        // One that cannot do all of it does a part, as a TAP would.
        *self.used.lock().unwrap() = count.min(self.most);
        if count <= self.most { Ok(()) } else { Err(io::ErrorKind::Other.into()) }
    }

    fn set_offload(&mut self, _: Offload) -> io::Result<()> {
        Ok(())
    }
}

struct Card {
    guest: Guest,
    wires: Vec<UnixDatagram>,
    used: Arc<Mutex<usize>>,
}

impl Card {
    fn new(features: u64) -> Self {
        Self::granted(features, PAIRS.into())
    }

    fn granted(features: u64, most: usize) -> Self {
        let (mut sockets, mut wires) = (Vec::new(), Vec::new());
        for _ in 0..PAIRS {
            let (Wire { socket, .. }, there, _) = wire();
            sockets.push(socket);
            wires.push(there);
        }
        let used = Arc::new(Mutex::new(1));
        let backend = Wires { sockets, used: Arc::clone(&used), most };
        let config = NetConfig { pairs: PAIRS, ..CONFIG };
        let net = Net::new(Box::new(backend), config).unwrap();
        let mut guest = Guest::new(net.with_command_throttle(Throttle::default()));
        guest.start(features, 16);
        Card { guest, wires, used }
    }

    /// Gives a command to a control queue; the ack, and the number of bytes written.
    fn command_on(&mut self, queue: usize, bytes: &[u8]) -> (u8, u32) {
        let command = self.guest.place(bytes);
        let ack = self.guest.place(&[0xee]);
        // Cut in two, which is the driver's affair.
        let header = (bytes.len() as u32).min(2);
        let mut buffers =
            vec![(command, header, false), (command + u64::from(header), bytes.len() as u32 - header, false)];
        buffers.push((ack, 1, true));
        self.guest.add(queue, &buffers).unwrap();
        self.guest.kick(queue);
        let (_, written) = self.guest.used(queue).expect("the command was not answered");
        (self.guest.bytes(ack, 1)[0], written)
    }

    fn set_pairs(&mut self, pairs: u16) -> u8 {
        let (ack, written) = self.command_on(CONTROL, &[SET, pairs.to_le_bytes()].concat());
        assert_eq!(written, 1);
        ack
    }

    /// Whether a packet goes out of and comes into this pair, on the wire of the pair.
    fn carries(&mut self, pair: usize) -> [bool; 2] {
        let bytes = packet(60);
        let at = self.guest.place(&bytes);
        self.guest.add(2 * pair + 1, &[(at, 60, false)]).unwrap();
        self.guest.kick(2 * pair + 1);
        let out = self.guest.used(2 * pair + 1).is_some();
        assert_eq!(self.wires[pair].recv(&mut [0; 100]).is_ok(), out);
        let room = self.guest.allocate(1600);
        self.guest.add(2 * pair, &[(room, 1600, true)]).unwrap();
        self.guest.kick(2 * pair);
        self.wires[pair].send(&bytes).unwrap();
        self.guest.run();
        [out, self.guest.used(2 * pair).is_some()]
    }
}

#[test]
fn s5_1_4_the_card_tells_how_many_pairs_it_has() {
    let mut card = Card::new(MQ | CTRL_VQ);
    let mut data = [0; 12];
    card.guest.transport.read(0x100, &mut data);
    assert_eq!(data[8..10], PAIRS.to_le_bytes());
    assert_eq!(card.guest.queues.len(), 7);
    assert_eq!(card.guest.offered_features() & (MQ | CTRL_VQ), MQ | CTRL_VQ);
}

#[test]
fn a_card_of_one_pair_has_no_control_queue() {
    let (mut guest, ..) = guest(0, 16);
    assert_eq!(guest.queues.len(), 2);
    assert_eq!(guest.offered_features() & (MQ | CTRL_VQ), 0);
}

#[test]
fn s5_1_6_5_5_only_the_first_pair_is_used_until_the_driver_asks() {
    let mut card = Card::new(MQ | CTRL_VQ);
    assert_eq!(card.carries(0), [true; 2]);
    assert_eq!((card.carries(1), card.carries(2)), ([false; 2], [false; 2]));
    assert_eq!((card.set_pairs(2), *card.used.lock().unwrap()), (OK, 2));
    // What waited in the pair has been moved at once.
    assert!(card.guest.used(3).is_some() && card.guest.used(2).is_some());
    assert!(card.wires[1].recv(&mut [0; 100]).is_ok());
    assert_eq!((card.carries(0), card.carries(1)), ([true; 2], [true; 2]));
    assert!(card.guest.used(5).is_none());
    assert_eq!((card.set_pairs(1), *card.used.lock().unwrap()), (OK, 1));
    assert_eq!((card.carries(0), card.carries(1)), ([true; 2], [false; 2]));
}

#[test]
fn s5_1_6_5_what_is_not_known_or_not_possible_is_answered_with_an_error_and_changes_nothing() {
    let mut card = Card::new(MQ | CTRL_VQ);
    assert_eq!(card.set_pairs(2), OK);
    for pairs in [0, PAIRS + 1, u16::MAX] {
        assert_eq!(card.set_pairs(pairs), ERR, "{pairs}");
    }
    for command in [&[4, 1, 1, 0][..], &[0, 0, 1, 0], &[4, 0, 1], &[4, 0, 1, 0, 0], &[4], &[]] {
        assert_eq!(card.command_on(CONTROL, command), (ERR, 1), "{command:?}");
    }
    assert_eq!(*card.used.lock().unwrap(), 2);
    assert_eq!(card.carries(1), [true; 2]);
}

#[test]
fn a_host_that_refuses_leaves_the_pairs_that_were_used() {
    let mut card = Card::granted(MQ | CTRL_VQ, 2);
    assert_eq!((card.set_pairs(2), card.set_pairs(3)), (OK, ERR));
    assert_eq!(*card.used.lock().unwrap(), 2);
    assert_eq!((card.carries(1), card.carries(2)), ([true; 2], [false; 2]));
}

#[test]
fn s5_1_2_without_multi_queue_the_control_queue_follows_the_first_pair() {
    let mut card = Card::new(CTRL_VQ);
    assert_eq!(card.command_on(2, &[4, 0, 1, 0]), (OK, 1));
    assert_eq!(card.command_on(2, &[4, 0, 2, 0]), (ERR, 1));
    assert_eq!(card.carries(0), [true; 2]);
}

#[test]
fn a_driver_without_a_control_queue_has_one_pair() {
    for features in [0, MQ] {
        let mut card = Card::new(features);
        assert_eq!((card.carries(0), card.carries(1)), ([true; 2], [false; 2]));
    }
}

#[test]
fn pairs_whose_queues_the_driver_did_not_set_up_cannot_be_used() {
    let mut card = Card::new(MQ | CTRL_VQ);
    assert!(card.guest.negotiate(MQ | CTRL_VQ));
    card.guest.queues.clear();
    for index in 0..7 {
        let queue = card.guest.set_up_queue(index, 16);
        card.guest.queues.push(queue);
        if index == 3 {
            // A transmitq2 that is taken back before the device starts.
            card.guest.write(0x44, 0);
        }
    }
    card.guest.write(0x70, 15);
    card.guest.run();
    assert_eq!((card.set_pairs(2), card.set_pairs(3), card.set_pairs(1)), (ERR, ERR, OK));
    assert_eq!(card.carries(0), [true; 2]);
}

#[test]
fn a_reset_goes_back_to_one_pair() {
    let mut card = Card::new(MQ | CTRL_VQ);
    assert_eq!(card.set_pairs(3), OK);
    card.guest.start(MQ | CTRL_VQ, 16);
    assert_eq!(*card.used.lock().unwrap(), 1);
    assert_eq!((card.carries(0), card.carries(2)), ([true; 2], [false; 2]));
}

#[test]
fn a_command_without_room_for_its_answer_breaks_the_device() {
    let mut card = Card::new(MQ | CTRL_VQ);
    let command = card.guest.place(&[4, 0, 2, 0]);
    card.guest.add(CONTROL, &[(command, 4, false)]).unwrap();
    card.guest.kick(CONTROL);
    assert_ne!(card.guest.status() & status::NEEDS_RESET, 0);
    assert_eq!(*card.used.lock().unwrap(), 1);
}

#[test]
fn commands_wait_for_their_turn_because_the_host_pays_for_them() {
    let clock = TestClock::new();
    let rate = Rate { bytes: None, operations: NonZeroU64::new(10) };
    let (Wire { socket, .. }, ..) = wire();
    let backend = Wires { sockets: vec![socket], used: Arc::default(), most: 1 };
    let net = Net::new(Box::new(backend), NetConfig { pairs: 2, ..CONFIG }).unwrap();
    let commands = Throttle::with_alarm(rate, Box::new(clock.clone()));
    let mut guest = Guest::new(net.with_command_throttle(commands));
    guest.start(MQ | CTRL_VQ, 16);
    let at = guest.place(&[4, 0, 1, 0, 0xee]);
    for _ in 0..3 {
        guest.add(4, &[(at, 4, false), (at + 4, 1, true)]).unwrap();
    }
    guest.kick(4);
    for _ in 0..3 {
        assert!(guest.used(4).is_some() && guest.used(4).is_none());
        clock.advance(clock.next_call_ns().unwrap());
        guest.run();
    }
    // The card's own limit is in place where no other is set.
    let config = NetConfig { pairs: 2, ..CONFIG };
    let mut own = control::throttle(config).unwrap();
    assert!(own.admits());
    (0..10_000).for_each(|_| own.charge(0));
    assert!(!own.admits());
}

#[test]
fn no_pair_starves_behind_a_rate_limit() {
    let clock = TestClock::new();
    let rate = Rate { bytes: None, operations: NonZeroU64::new(20) };
    let (mut sockets, mut wires) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        let (Wire { socket, .. }, there, _) = wire();
        sockets.push(socket);
        wires.push(there);
    }
    let backend = Wires { sockets, used: Arc::default(), most: 2 };
    let net = Net::new(Box::new(backend), NetConfig { pairs: 2, ..CONFIG }).unwrap();
    let transmit = Throttle::with_alarm(rate, Box::new(clock.clone()));
    let mut guest = Guest::new(
        net.with_throttles(Throttle::default(), transmit).with_command_throttle(Throttle::default()),
    );
    guest.start(MQ | CTRL_VQ, 64);
    let mut card = Card { guest, wires, used: Arc::default() };
    assert_eq!(card.command_on(4, &[4, 0, 2, 0]), (OK, 1));
    let at = card.guest.place(&packet(60));
    for queue in [1, 3] {
        for _ in 0..30 {
            card.guest.add(queue, &[(at, 60, false)]).unwrap();
        }
        card.guest.kick(queue);
    }
    let mut sent = [0; 2];
    for _ in 0..20 {
        clock.advance(clock.next_call_ns().unwrap());
        card.guest.run();
        for (sent, wire) in sent.iter_mut().zip(&card.wires) {
            *sent += std::iter::from_fn(|| wire.recv(&mut [0; 100]).ok()).count();
        }
    }
    assert_eq!(sent.iter().sum::<usize>(), 22);
    assert!(sent.iter().all(|sent| *sent >= 10), "{sent:?}");
}
