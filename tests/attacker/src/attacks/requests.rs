//! Requests to the disk that reach outside of it, and a balloon's driver that lies.

use crate::{
    Scene, cpu,
    device::{BALLOON, BLOCK, F_INDIRECT, WRITE},
    memory::{ARENA, CANARIES, GIVEN, GIVEN_END, RINGS},
    random::Random,
};

/// Every type of request at and behind the ends of the disk, in headers of one to many parts.
pub fn blocks(scene: &mut Scene) -> u64 {
    let mut count = 0;
    for device in scene.of_kind(BLOCK) {
        device.reset();
        let sectors =
            u64::from(cpu::read32(device.base + 0x100)) | u64::from(cpu::read32(device.base + 0x104)) << 32;
        let mut queue = device.start(F_INDIRECT)[0];
        for _ in 0..scene.rounds(500) {
            let random = &mut scene.random;
            let (header, data, status) = (ARENA, ARENA + 0x1_0000, ARENA + 0x8000);
            let kind = random.of(&[0, 0, 1, 1, 4, 8, 11, 13, 13, 2, 5, 16, u32::MAX]);
            cpu::write32(header, kind);
            cpu::write32(header + 4, random.next() as u32);
            cpu::write64(header + 8, sector(random, sectors));
            let bytes = match random.below(5) {
                0 => random.length(),
                1 => 16 * random.below(40) as u32,
                _ => 512 * (1 + random.below(64) as u32),
            };
            if matches!(kind, 11 | 13) {
                for n in 0..u64::from(bytes.min(1024) / 16) {
                    cpu::write64(data + 16 * n, sector(random, sectors));
                    cpu::write32(data + 16 * n + 8, random.number() as u32);
                    cpu::write32(data + 16 * n + 12, random.of(&[0, 0, 1, 2, u32::MAX]));
                }
            }
            let reads = matches!(kind, 0 | 8);
            let split = 1 + random.below(15) as u32;
            match random.below(6) {
                // Without a status, without a header, with all in one part.
                0 => queue.give(0, &[(header, 16, false), (data, bytes, reads)]),
                1 => queue.give(0, &[(data, bytes, reads), (status, 1, true)]),
                2 => queue.give(0, &[(header, 16, false), (data, bytes.saturating_add(1), true)]),
                3 => queue.give(
                    0,
                    &[
                        (header, split, false),
                        (header + u64::from(split), 16 - split, false),
                        (data, bytes, reads),
                        (status, 1, true),
                    ],
                ),
                // Many times the same buffer.
                4 => {
                    let part = (data, bytes, reads);
                    queue.give(
                        0,
                        &[(header, 16, false), part, part, part, part, part, part, part, (status, 3, true)],
                    );
                }
                _ => queue.give(0, &[(header, 16, false), (data, bytes, reads), (status, 1, true)]),
            }
            device.kick(0);
            queue.wait_a_little(&device);
            count += 1;
            if device.failed() || queue.given.wrapping_sub(queue.taken) > queue.size / 2 {
                queue = device.start(F_INDIRECT)[0];
            }
        }
    }
    count
}

fn sector(random: &mut Random, sectors: u64) -> u64 {
    match random.below(6) {
        // What the host compares afterwards lies behind the first 9 MiB: good requests stay before it.
        0..3 => random.below(2048 - 512),
        3 => sectors.wrapping_sub(1),
        4 => sectors.wrapping_add(random.below(4)),
        _ => random.of(&[u64::MAX, u64::MAX / 512, 1 << 55, u64::MAX / 512 - 1, (1 << 63) / 512]),
    }
}

/// Reports and inflations of memory that is in use, is reported twice, or is not there; the configuration too.
pub fn balloon(scene: &mut Scene) -> u64 {
    let mut count = 0;
    for device in scene.of_kind(BALLOON) {
        for round in 0..scene.rounds(150) {
            let random = &mut scene.random;
            if round % 10 == 0 {
                let offset = random.below(32);
                cpu::write32(device.base + 0x100 + offset, random.number() as u32);
            }
            let queues = device.start(random.next() | 1 << 5);
            for mut queue in queues.into_iter().filter(|queue| queue.size > 0) {
                let parts = 1 + random.below(u64::from(queue.size)) as u16;
                for n in 0..parts {
                    let address = reported(random);
                    // Only what may be taken away is offered so that it is.
                    let free = (GIVEN..GIVEN_END).contains(&address) || address >= crate::memory::END;
                    let length = match random.below(4) {
                        0 => random.length(),
                        1 => (GIVEN_END - GIVEN) as u32,
                        _ => 4096 * (1 + random.below(16) as u32),
                    };
                    let length = if free { clip(address, length) } else { length };
                    let next = if n + 1 < parts { 1 } else { 0 };
                    queue.describe(n, address, length, next | if free { WRITE } else { 0 }, n + 1);
                }
                queue.offer(0);
                device.kick(queue.number);
                queue.wait_a_little(&device);
                count += 1;
            }
        }
        device.reset();
    }
    count
}

fn reported(random: &mut Random) -> u64 {
    match random.below(6) {
        0 => random.outside(),
        1 => random.of(&CANARIES).0,
        2 => RINGS,
        _ => GIVEN + random.below(GIVEN_END - GIVEN),
    }
}

/// As much of it as does not reach what must stay.
fn clip(address: u64, length: u32) -> u32 {
    match GIVEN_END.checked_sub(address) {
        Some(room) => length.min(room as u32),
        None => length,
    }
}
