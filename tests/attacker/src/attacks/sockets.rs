//! vsock: packets by chance, credit that does not add up, connections without end, data that nobody has room for.

use crate::{
    Scene,
    device::{Device, F_INDIRECT, Queue, VSOCK},
    memory::{ARENA, fill},
    sane::{ECHO_PORT, GUEST_CID, Packet, VSOCK_DATA, VSOCK_REQUEST},
};

/// The host takes connections here and reads nothing.
const DEAF_PORT: u32 = 1001;
const RECEIVE: u64 = ARENA + 0x10_0000;

struct Link {
    device: Device,
    rx: Queue,
    tx: Queue,
}

impl Link {
    fn new(device: Device) -> Self {
        let [mut rx, tx, ..] = device.start(F_INDIRECT);
        (0..rx.size).for_each(|n| rx.give(n, &[(RECEIVE + 4096 * u64::from(n), 4096, true)]));
        device.kick(0);
        Self { device, rx, tx }
    }

    /// Sends a packet whose data is what happens to lie behind it.
    fn send(&mut self, packet: &Packet, really: u32) {
        packet.write(ARENA);
        self.tx.give(0, &[(ARENA, 44 + really, false)]);
        self.device.kick(1);
        self.tx.wait_a_little(&self.device);
        // Buffers that came back go there again.
        while let Some((head, _)) = self.rx.take() {
            self.rx.offer(head as u16 % self.rx.size.max(1));
        }
        if self.device.failed() {
            *self = Self::new(self.device);
        }
    }
}

pub fn flood(scene: &mut Scene) -> u64 {
    let rounds = scene.rounds(2500);
    for device in scene.of_kind(VSOCK) {
        let mut link = Link::new(device);
        for _ in 0..rounds {
            let random = &mut scene.random;
            let (source, destination) =
                (random.below(24) as u32, random.of(&[ECHO_PORT, ECHO_PORT, DEAF_PORT, 7, u32::MAX]));
            let mut packet =
                Packet::new(source, destination, random.of(&[1, 1, 2, 3, 4, 5, 5, 5, 6, 7, 0, 8, u16::MAX]));
            packet.length = if random.one_in(3) { random.length() } else { random.below(3000) as u32 };
            packet.flags = random.of(&[0, 1, 2, 3, u32::MAX]);
            packet.allocation = random.number() as u32;
            packet.forwarded = random.number() as u32;
            if random.one_in(10) {
                packet.kind = random.next() as u16;
                packet.source_cid = random.of(&[GUEST_CID, 0, 1, 2, 4, u64::MAX]);
                packet.destination_cid = random.number();
            }
            let really = if random.one_in(8) { random.below(4000) as u32 } else { packet.length.min(8000) };
            link.send(&packet, really);
        }
        // Connections and data stay as they are while the host looks.
    }
    rounds
}

/// More connections than there may be, from ever new ports.
pub fn connections(scene: &mut Scene) -> u64 {
    let rounds = scene.rounds(1400);
    for device in scene.of_kind(VSOCK) {
        let mut link = Link::new(device);
        for n in 0..rounds as u32 {
            let port = if n % 2 == 0 { DEAF_PORT } else { ECHO_PORT };
            link.send(&Packet::new(10_000 + n, port, VSOCK_REQUEST), 0);
        }
    }
    rounds
}

/// All that goes out on connections to somebody who reads nothing, credit or not.
pub fn overrun(scene: &mut Scene) -> u64 {
    let rounds = scene.rounds(1500);
    fill(ARENA + 44, 0x1_0000, 0x66);
    for device in scene.of_kind(VSOCK) {
        let mut link = Link::new(device);
        for n in 0..rounds as u32 {
            let from = 50_000 + n % 200;
            if n < 200 {
                link.send(&Packet::new(from, DEAF_PORT, VSOCK_REQUEST), 0);
            }
            let packet = Packet { length: 0x1_0000, ..Packet::new(from, DEAF_PORT, VSOCK_DATA) };
            link.send(&packet, packet.length);
        }
    }
    rounds
}
