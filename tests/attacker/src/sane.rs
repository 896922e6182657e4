//! Uses each device as a good driver would, and says which did what they should.

use core::fmt::Write;

use crate::{
    Scene, cpu,
    device::{BALLOON, BLOCK, Device, F_INDIRECT, FS, NET, RNG, VSOCK},
    memory::{ARENA, GIVEN, fill},
    say,
    serial::Serial,
};

/// The host echoes what comes on this port.
pub const ECHO_PORT: u32 = 1000;
pub const GUEST_CID: u64 = 3;
const HOST_CID: u64 = 2;

const BLOCK_READ_ONLY: u64 = 1 << 5;
const BALLOON_REPORTING: u64 = 1 << 5;

pub const VSOCK_REQUEST: u16 = 1;
pub const VSOCK_RESPONSE: u16 = 2;
pub const VSOCK_RESET: u16 = 3;
pub const VSOCK_DATA: u16 = 5;

/// Prints `sane` and the devices that work; then those that do not, each with the step that failed.
pub fn check(scene: &mut Scene) {
    let _always = Serial.write_str("sane");
    for device in scene.devices() {
        let step = match device.kind {
            BLOCK => block(&device),
            NET => net(&device),
            RNG => rng(&device),
            BALLOON => balloon(&device),
            VSOCK => vsock(&device, 0x4000_0000 + scene.random.below(1 << 20) as u32),
            FS => fs(&device),
            _ => Err("unknown kind"),
        };
        device.reset();
        let _always = match step {
            Ok(()) => write!(Serial, " {}", device.name()),
            Err(step) => write!(Serial, " {}:FAILED({step})", device.name()),
        };
    }
    say!("");
}

type Step = Result<(), &'static str>;

fn must(good: bool, step: &'static str) -> Step {
    if good { Ok(()) } else { Err(step) }
}

fn block(device: &Device) -> Step {
    let read_only = device.features() & BLOCK_READ_ONLY != 0;
    let mut queue = device.start(0)[0];
    let (header, data, status) = (ARENA, ARENA + 4096, ARENA + 64);
    let mut request = |kind: u32, sector: u64, bytes: u32| {
        cpu::write32(header, kind);
        cpu::write32(header + 4, 0);
        cpu::write64(header + 8, sector);
        cpu::write8(status, 0xff);
        match bytes {
            0 => queue.give(0, &[(header, 16, false), (status, 1, true)]),
            _ => queue.give(0, &[(header, 16, false), (data, bytes, kind == 0), (status, 1, true)]),
        }
        device.kick(0);
        queue.wait(device).is_some() && cpu::read8(status) == 0
    };
    must(request(0, 0, 512), "read")?;
    if read_only {
        return Ok(());
    }
    fill(data, 4096, 0x5a);
    must(request(1, 8, 4096), "write")?;
    must(request(4, 0, 0), "flush")?;
    fill(data, 4096, 0);
    must(request(0, 8, 4096), "read again")?;
    must((data..data + 4096).all(|at| cpu::read8(at) == 0x5a), "compare")
}

fn net(device: &Device) -> Step {
    let mut queue = device.start(0)[1];
    let frame = ARENA;
    fill(frame, 12 + 60, 0);
    fill(frame + 12, 6, 0xff);
    // A source of the kind that nobody owns, and the EtherType for local experiments.
    fill(frame + 18, 1, 0x02);
    cpu::write16(frame + 24, 0xb588);
    queue.give(0, &[(frame, 12 + 60, false)]);
    device.kick(1);
    must(queue.wait(device).is_some(), "send")
}

fn rng(device: &Device) -> Step {
    let mut queue = device.start(0)[0];
    fill(ARENA, 64, 0);
    queue.give(0, &[(ARENA, 64, true)]);
    device.kick(0);
    must(queue.wait(device).is_some_and(|(_, bytes)| bytes > 0), "fetch")?;
    must((ARENA..ARENA + 64).any(|at| cpu::read8(at) != 0), "randomness")
}

fn balloon(device: &Device) -> Step {
    let mut queue = device.start(BALLOON_REPORTING)[2];
    fill(GIVEN, 4096, 0x77);
    queue.give(0, &[(GIVEN, 4096, true)]);
    device.kick(2);
    must(queue.wait(device).is_some(), "report")?;
    must((GIVEN..GIVEN + 4096).all(|at| cpu::read8(at) == 0), "page is zero")
}

fn fs(device: &Device) -> Step {
    device.start(0);
    must(!device.failed(), "start")
}

/// struct virtio_vsock_hdr (section 5.10.6).
pub struct Packet {
    pub source_cid: u64,
    pub destination_cid: u64,
    pub source_port: u32,
    pub destination_port: u32,
    pub length: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub allocation: u32,
    pub forwarded: u32,
}

impl Packet {
    pub fn new(source_port: u32, destination_port: u32, op: u16) -> Self {
        Self {
            source_cid: GUEST_CID,
            destination_cid: HOST_CID,
            source_port,
            destination_port,
            length: 0,
            kind: 1,
            op,
            flags: 0,
            allocation: 1 << 16,
            forwarded: 0,
        }
    }

    pub fn write(&self, at: u64) {
        cpu::write64(at, self.source_cid);
        cpu::write64(at + 8, self.destination_cid);
        let words = [self.source_port, self.destination_port, self.length];
        (at + 16..).step_by(4).zip(words).for_each(|(at, word)| cpu::write32(at, word));
        cpu::write16(at + 28, self.kind);
        cpu::write16(at + 30, self.op);
        let words = [self.flags, self.allocation, self.forwarded];
        (at + 32..).step_by(4).zip(words).for_each(|(at, word)| cpu::write32(at, word));
    }
}

fn vsock(device: &Device, port: u32) -> Step {
    let [mut rx, mut tx, ..] = device.start(F_INDIRECT);
    let (sent, received) = (ARENA, ARENA + 0x1_0000);
    let buffer = |n: u16| received + 4096 * u64::from(n);
    (0..8).for_each(|n| rx.give(n, &[(buffer(n), 4096, true)]));
    device.kick(0);
    let mut send = |packet: Packet| {
        packet.write(sent);
        tx.give(0, &[(sent, 44 + packet.length, false)]);
        device.kick(1);
        tx.wait(device).is_some()
    };
    // Packets may come that nobody waits for, credit updates for one.
    let mut wait_for = |op: u16| {
        for _ in 0..8 {
            let (head, _) = rx.wait(device)?;
            let at = buffer(head as u16);
            let theirs = cpu::read32(at + 20) == port;
            match cpu::read16(at + 30) {
                got if theirs && got == op => return Some(at),
                VSOCK_RESET if theirs => return None,
                _ => {}
            }
        }
        None
    };
    must(send(Packet::new(port, ECHO_PORT, VSOCK_REQUEST)), "request")?;
    must(wait_for(VSOCK_RESPONSE).is_some(), "response")?;
    fill(sent + 44, 100, 0x42);
    must(send(Packet { length: 100, ..Packet::new(port, ECHO_PORT, VSOCK_DATA) }), "send")?;
    let answer = wait_for(VSOCK_DATA).ok_or("answer")?;
    must((answer + 44..answer + 144).all(|at| cpu::read8(at) == 0x42), "echo")?;
    must(send(Packet::new(port, ECHO_PORT, VSOCK_RESET)), "reset")
}
