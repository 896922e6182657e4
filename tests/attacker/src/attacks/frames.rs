//! Frames of every size, in parts of every size, with headers that promise what is not there.

use crate::{
    Scene, cpu,
    device::{Device, NET, Part, Queue},
    memory::{ARENA, fill},
};

const MOST_PARTS: usize = 12;

pub fn frames(scene: &mut Scene) -> u64 {
    let mut count = 0;
    for device in scene.of_kind(NET) {
        let sizes = (0..100).chain((100..1700).step_by(37)).chain([
            4096,
            9000,
            0xffff,
            0x1_0000,
            0x1_0001,
            0x1_1000,
            1 << 20,
        ]);
        let mut queues = start(&device, scene.random.next());
        for (n, size) in sizes.enumerate().take(scene.rounds(400) as usize) {
            send(scene, &device, &mut queues[1], size, n);
            count += 1;
            if device.failed() {
                queues = start(&device, scene.random.next());
            }
        }
        // What is received, into buffers of no use.
        for _ in 0..scene.rounds(40) {
            let mut queues = start(&device, scene.random.next());
            for n in 0..8 {
                let (address, length) = (scene.random.writable(), scene.random.below(80) as u32);
                queues[0].give(n, &[(address, length, !scene.random.one_in(8))]);
            }
            device.kick(0);
            // A frame to all, which the host's kernel answers in its own way.
            send(scene, &device, &mut queues[1], 72, 0);
            count += 1;
        }
        control(scene, &device);
        device.reset();
    }
    count
}

fn start(device: &Device, features: u64) -> [Queue; 8] {
    let queues = device.start(features);
    if device.failed() { device.start(0) } else { queues }
}

fn send(scene: &mut Scene, device: &Device, queue: &mut Queue, size: u64, n: usize) {
    let random = &mut scene.random;
    fill(ARENA, size.min(2048) + 12, random.next() as u8);
    // struct virtio_net_hdr_v1 (section 5.1.6): flags, GSO type and all lengths by chance.
    if n.is_multiple_of(2) {
        (0..12).for_each(|at| cpu::write8(ARENA + at, 0));
    } else {
        cpu::write64(ARENA, random.number());
        cpu::write32(ARENA + 8, random.number() as u32);
    }
    let mut parts: [Part; MOST_PARTS] = [(0, 0, false); MOST_PARTS];
    let (mut at, mut used, total) = (ARENA, 0, size);
    let mut left = total;
    while used < MOST_PARTS && (left > 0 || used == 0) {
        let last = used + 1 == MOST_PARTS || random.one_in(3);
        let length = if last { left } else { random.below(left + 1) };
        parts[used] = (at, length as u32, false);
        at += length;
        left -= length;
        used += 1;
    }
    queue.give(0, &parts[..used]);
    device.kick(queue.number);
    queue.wait_a_little(device);
}

/// Commands of the control queue, if there is one: the last.
fn control(scene: &mut Scene, device: &Device) {
    for _ in 0..scene.rounds(60) {
        let queues = device.start(u64::MAX);
        let random = &mut scene.random;
        for mut queue in queues.into_iter().skip(2).filter(|queue| queue.size > 0) {
            let bytes = random.below(64) as u32;
            let any = random.next() as u16;
            cpu::write16(ARENA, random.of(&[0x0004, 0x0104, 0x0000, 0x0101, any]));
            cpu::write16(ARENA + 2, random.number() as u16);
            queue.give(0, &[(ARENA, bytes, false), (ARENA + 4096, random.below(3) as u32, true)]);
            device.kick(queue.number);
            queue.wait_a_little(device);
        }
    }
}
