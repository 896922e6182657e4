//! Rings where none can be, and chains that break every rule.

use crate::{
    Scene, cpu,
    device::{Device, F_EVENT_IDX, INDIRECT, MAX_QUEUES, NEXT, Queue, STATUS_READY, WRITE, descriptor},
    memory::{ARENA, TABLES, TABLES_END},
    random::Random,
    second,
};

/// Queues of every size at every address: unaligned, overlapping, behind the end of memory, around its end.
pub fn rings(scene: &mut Scene) -> u64 {
    let rounds = scene.rounds(400);
    for _ in 0..rounds {
        let device = scene.any();
        let random = &mut scene.random;
        device.negotiate(random.next());
        let near = random.writable();
        for queue in 0..MAX_QUEUES {
            let max = u64::from(device.queue_max(queue));
            let size = match random.below(6) {
                0 => random.number(),
                1 => random.below(max + 3),
                _ => max,
            };
            let mut address = |align: u64| match random.below(8) {
                0 => random.outside(),
                1 => near,
                2 => crate::memory::END - random.below(4096),
                3 => 0,
                4 => random.writable(),
                _ => random.writable() & !(align - 1),
            };
            device.place(queue, size as u32, address(16), address(2), address(4));
        }
        device.go();
        for queue in 0..MAX_QUEUES {
            device.kick(queue);
        }
        cpu::rest(300);
    }
    rounds
}

/// Random descriptors in good rings.
pub fn chains(scene: &mut Scene) -> u64 {
    let rounds = scene.rounds(500);
    for _ in 0..rounds {
        let device = scene.any();
        let random = &mut scene.random;
        let queues = device.start(random.next());
        for mut queue in queues.into_iter().filter(|queue| queue.size > 0) {
            random_table(random, queue.descriptors, queue.size);
            for _ in 0..1 + random.below(6) {
                let wild = random.one_in(12);
                queue.offer(if wild { random.next() as u16 } else { random.below(queue.size.into()) as u16 });
            }
            device.kick(queue.number);
            queue.wait_a_little(&device);
        }
    }
    rounds
}

/// Fills a table with descriptors of which most are good for something, so that the rest is reached.
fn random_table(random: &mut Random, table: u64, size: u16) {
    for n in 0..size {
        let mut flags = random.below(4) as u16;
        let mut length = random.length();
        if random.one_in(3) {
            length = random.below(4096) as u32;
        }
        let mut address = if flags & WRITE == 0 { random.readable() } else { random.writable() };
        if random.one_in(4) {
            flags = INDIRECT | if random.one_in(8) { random.below(4) as u16 } else { 0 };
            address = indirect_table(random, &mut length);
        }
        let next = match random.below(8) {
            0 => n,
            1 => random.next() as u16,
            2 => 0,
            _ => n + 1,
        };
        descriptor(table + 16 * u64::from(n), address, length, flags, next);
    }
}

/// A table in which devices write nothing, so that only what this kernel has put there is taken for descriptors.
fn indirect_table(random: &mut Random, length: &mut u32) -> u64 {
    let table = TABLES + 16 * random.below((TABLES_END - TABLES) / 16 - 128);
    let entries = 1 + random.below(40) as u16;
    for n in 0..entries {
        let flags = if random.one_in(16) { random.below(8) as u16 } else { random.below(4) as u16 | NEXT };
        let address = if random.one_in(10) { table } else { random.writable() };
        let address = if flags & WRITE == 0 { random.readable() } else { address.max(ARENA) };
        let next = if random.one_in(10) { random.next() as u16 } else { n + 1 };
        let length = if random.one_in(4) { random.length() } else { random.below(2048) as u32 };
        // A device may write where a descriptor says so, and this one must not say: the tables.
        let in_tables = (TABLES..TABLES_END).contains(&address);
        descriptor(
            table + 16 * u64::from(n),
            address,
            length,
            if in_tables { flags & !WRITE } else { flags },
            next,
        );
    }
    *length = match random.below(10) {
        0 => 0,
        1 => 16 * u32::from(entries) + 8,
        2 => 0xffff_fff0,
        3 => 16 * 70_000,
        _ => 16 * u32::from(entries),
    };
    // Sometimes behind the end of memory, or askew.
    if random.one_in(12) { random.outside() } else { table + random.of(&[0, 0, 0, 0, 8]) }
}

/// Available and used indices that jump, wrap around and run backwards; the event indices too.
pub fn available(scene: &mut Scene) -> u64 {
    let rounds = scene.rounds(300);
    for _ in 0..rounds {
        let device = scene.any();
        let random = &mut scene.random;
        let features = if random.one_in(2) { F_EVENT_IDX } else { 0 };
        let queues = device.start(features);
        for mut queue in queues.into_iter().filter(|queue| queue.size > 0) {
            for n in 0..queue.size {
                queue.describe(n, ARENA + 4096 * u64::from(n), 512, random.of(&[0, WRITE]), 0);
            }
            for _ in 0..6 {
                queue.given = match random.below(6) {
                    0 => random.next() as u16,
                    1 => queue.given.wrapping_sub(1),
                    2 => queue.given.wrapping_add(queue.size + 1),
                    _ => queue.given.wrapping_add(random.below(u64::from(queue.size) + 1) as u16),
                };
                cpu::write16(queue.driver, random.next() as u16);
                cpu::write16(queue.driver + 4 + 2 * u64::from(queue.size), random.next() as u16);
                cpu::write16(queue.driver + 2, queue.given);
                device.kick(queue.number);
                cpu::rest(60);
            }
        }
    }
    rounds
}

/// Descriptors that change while the device reads them. With one processor, right after the notice.
pub fn race(scene: &mut Scene) -> u64 {
    let rounds = scene.rounds(150);
    for _ in 0..rounds {
        let device = scene.any();
        let random = &mut scene.random;
        let mut queues = device.start(random.next());
        let which = random.below(3) as usize;
        let Some(queue) = queues.get_mut(which).filter(|queue| queue.size > 0) else { continue };
        // The ring's descriptors move to where devices write nothing.
        let table = TABLES + 4096 * random.below(64);
        restart_with_table(&device, queue, table);
        for _ in 0..8 {
            random_table(random, table, queue.size);
            (0..queue.size).for_each(|n| queue.offer(n));
            second::change(table, queue.size);
            device.kick(queue.number);
            if second::awake() {
                queue.wait_a_little(&device);
            } else {
                random_table(random, table, queue.size);
            }
            if device.failed() {
                break;
            }
        }
        second::leave();
    }
    rounds
}

/// The same device, with one queue's descriptors elsewhere.
fn restart_with_table(device: &Device, moved: &mut Queue, table: u64) {
    device.negotiate(u64::MAX);
    for number in 0..MAX_QUEUES {
        let mut queue = device.queue(number);
        if queue.size > 0 && number == moved.number {
            device.set(0x44, 0);
            queue.descriptors = table;
            device.place(number, queue.size.into(), table, queue.driver, queue.device);
            *moved = queue;
        }
    }
    device.go();
    let _live = device.status() == STATUS_READY;
}

/// Rings that always have more, for as long as the host looks on: nothing waits for the device, nothing is reset.
pub fn endless(scene: &mut Scene) -> u64 {
    let mut count = 0;
    for device in scene.devices() {
        let queues = device.start(0);
        for mut queue in queues.into_iter().filter(|queue| queue.size > 0) {
            for n in 0..queue.size {
                queue.describe(n, ARENA + 64 * u64::from(n), 64, if n % 2 == 0 { WRITE } else { 0 }, 0);
            }
            for _ in 0..scene.rounds(200) {
                (0..queue.size / 2).for_each(|n| queue.offer(n));
                device.kick(queue.number);
                count += 1;
            }
        }
    }
    count
}
