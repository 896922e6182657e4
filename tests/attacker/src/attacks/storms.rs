//! Exits as fast as they come: ports, windows, notifications, the console.

use crate::{Scene, cpu, device::MAX_QUEUES, memory::ARENA};

/// The keyboard controller's command port, by which a machine resets itself.
const RESET_PORT: u16 = 0x64;
/// The serial port's data goes to the console, which has an attack of its own.
const SERIAL: core::ops::Range<u16> = 0x3f8..0x400;

/// All ports in all widths, then strings.
pub fn ports(scene: &mut Scene) -> u64 {
    let mut count = 0;
    let near = (0..0x500).chain((0x500..=0xffff).step_by(97));
    let reset = |port: u16| (RESET_PORT - 3..=RESET_PORT).contains(&port);
    for port in near.filter(|port| !reset(*port)) {
        let value = scene.random.number() as u32;
        cpu::in8(port);
        cpu::in16(port);
        cpu::in32(port);
        if port != SERIAL.start {
            cpu::out8(port, value as u8);
            cpu::out16(port, value as u16);
            cpu::out32(port, value);
        }
        count += 6;
    }
    // Neighbours of the reset, which must not be one.
    for value in (0..=255).filter(|value| *value != 0xfe) {
        cpu::out8(RESET_PORT, value);
        cpu::out8(0x60, value);
    }
    for _ in 0..scene.rounds(100) {
        let port = scene.random.next() as u16;
        let bytes = scene.random.below(5000);
        if reset(port) || SERIAL.contains(&port) {
            continue;
        }
        cpu::in_string(port, ARENA, bytes);
        cpu::out_string(port, ARENA, bytes);
        count += 2;
    }
    count
}

/// Nothing but exits: to nobody, to a device's register, to its notification.
pub fn exits(scene: &mut Scene) -> u64 {
    let rounds = scene.rounds(8000);
    for device in scene.devices() {
        device.start(0);
    }
    for n in 0..rounds {
        let device = scene.any();
        match n % 4 {
            0 => cpu::out8(0x80, n as u8),
            1 => _ = cpu::read32(0xe000_0000 + 4 * scene.random.below(1 << 20)),
            2 => _ = device.status(),
            _ => (0..MAX_QUEUES).for_each(|queue| device.kick(queue)),
        }
    }
    rounds
}

/// What never ends for the console, which is a file of the host's: pages of it, in lines and without.
pub fn console(scene: &mut Scene) -> u64 {
    let pages = scene.rounds(20);
    for n in 0..pages {
        (ARENA..ARENA + 4096).step_by(8).for_each(|at| cpu::write64(at, 0x6f66_6e6f_635f_6f6e));
        if n % 2 == 0 {
            (ARENA + 99..ARENA + 4096).step_by(100).for_each(|at| cpu::write8(at, b'\n'));
        }
        cpu::out_string(SERIAL.start, ARENA, 4096);
    }
    pages
}
