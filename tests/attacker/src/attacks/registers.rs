//! Register accesses of every width at every offset, and drivers that come and go.

use crate::{Scene, cpu, device::Device, random::Random};

/// All offsets of all windows in all widths, then random ones, with what lies between the windows.
pub fn storm(scene: &mut Scene) -> u64 {
    let mut count = 0;
    for device in scene.devices() {
        for at in (0..0x120).chain((0xff0..0x1000).step_by(4)).map(|offset| device.base + offset) {
            for width in 0..4 {
                read(at, width);
                write(at, width, scene.random.number());
                count += 2;
            }
        }
        device.reset();
    }
    for _ in 0..scene.rounds(8000) {
        let device = scene.any();
        access(&device, &mut scene.random);
        count += 1;
    }
    count
}

fn access(device: &Device, random: &mut Random) {
    // A register as often as not, and sometimes one that makes the device live.
    let offset = match random.below(4) {
        0 => random.below(0x1000),
        1 => 4 * random.below(0x44),
        2 => random.of(&[0x20, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x84, 0x90, 0xa0]),
        _ => 0x100 + random.below(64),
    };
    let value = match offset {
        0x70 => u64::from(random.of(&[0u32, 1, 3, 11, 15, 15, 79, 128, 143, 255])),
        0x80 | 0x90 | 0xa0 if random.one_in(2) => random.writable(),
        _ => random.number(),
    };
    let width = if random.one_in(3) { random.below(4) } else { 2 };
    // The last access of a window may reach into the next.
    if random.one_in(3) {
        read(device.base + offset, width)
    } else {
        write(device.base + offset, width, value)
    }
}

fn read(at: u64, width: u64) {
    match width {
        0 => _ = cpu::read8(at),
        1 => _ = cpu::read16(at),
        2 => _ = cpu::read32(at),
        _ => _ = cpu::read64(at),
    }
}

fn write(at: u64, width: u64, value: u64) {
    match width {
        0 => cpu::write8(at, value as u8),
        1 => cpu::write16(at, value as u16),
        2 => cpu::write32(at, value as u32),
        _ => cpu::write64(at, value),
    }
}

/// Drivers that start a device, ask it for something and are gone before it answers.
pub fn resets(scene: &mut Scene) -> u64 {
    let rounds = scene.rounds(300);
    for _ in 0..rounds {
        let device = scene.any();
        let features = if scene.random.one_in(2) { u64::MAX } else { scene.random.next() };
        let queues = device.start(features);
        for mut queue in queues.into_iter().filter(|queue| queue.size > 0) {
            let random = &mut scene.random;
            queue.give(0, &[(random.writable(), random.length(), false), (random.writable(), 512, true)]);
            device.kick(queue.number);
            if random.one_in(4) {
                // A queue is taken away while the device uses it.
                device.set(0x30, queue.number);
                device.set(0x44, 0);
            }
        }
        device.set(0x70, if scene.random.one_in(4) { 128 } else { 0 });
    }
    rounds
}
