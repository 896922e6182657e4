//! A guest that attacks its VMM: a kernel of a few KiB that knows virtio well enough to break each of its rules.
//!
//! What it does stands on its command line: `attack=NAME…` in this order, `seed=`, `rounds=` (a factor in percent), and
//! `only=` the name of a kind of device; with `alone=1` nobody is waited for. Each
//! attack ends with a line, `did NAME …`, and a wait for the host's word: it looks at the VMM meanwhile. After that all
//! devices are used as a good driver would: `sane …`, so that a device that has silently died does not pass for a safe
//! one. Nothing is ever written to some parts of memory; `canaries` says whether that held.
//! The end is a reset by the keyboard controller.
#![no_std]
#![no_main]

mod attacks;
mod cpu;
mod device;
mod library;
mod memory;
mod random;
mod sane;
mod second;
mod serial;
mod start;
mod words;

use device::Device;
use random::Random;
use words::Words;

/// More windows than that are left alone.
const MAX_DEVICES: usize = 16;

/// What an attack is given.
pub struct Scene {
    devices: [Device; MAX_DEVICES],
    count: usize,
    random: Random,
    percent: u64,
}

impl Scene {
    fn find(words: &Words, seed: u64) -> Self {
        let percent = match words.number("rounds") {
            0 => 100,
            percent => percent,
        };
        let mut scene =
            Self { devices: [Device::default(); MAX_DEVICES], count: 0, random: Random::new(seed), percent };
        for base in words.values("virtio_mmio.device").filter_map(words::window).take(MAX_DEVICES) {
            let device = Device::at(base, scene.count as u64);
            let only = words.value("only");
            if only.is_empty() || only == device.name() {
                scene.devices[scene.count] = device;
                scene.count += 1;
            }
        }
        scene
    }

    fn devices(&self) -> impl Iterator<Item = Device> + use<> {
        let (devices, count) = (self.devices, self.count);
        devices.into_iter().take(count)
    }

    fn of_kind(&self, kind: u32) -> impl Iterator<Item = Device> + use<> {
        self.devices().filter(move |device| device.kind == kind)
    }

    fn any(&mut self) -> Device {
        self.devices[self.random.below(self.count as u64) as usize]
    }

    /// So many rounds, as many as the command line makes of them.
    fn rounds(&self, normal: u64) -> u64 {
        (normal * self.percent).div_ceil(100)
    }
}

pub extern "C" fn main(zero_page: u64) -> ! {
    let words = Words::read(zero_page);
    start::map_everything();
    memory::plant_canaries();
    if words.number("cpus") > 1 {
        start::start_second();
        while !second::awake() {
            cpu::rest(1000);
        }
    }
    let seed = words.number("seed");
    let mut scene = Scene::find(&words, seed);
    say!("attacker: {} devices, {} processors, seed {seed}", scene.count, 1 + u32::from(second::awake()));
    sane::check(&mut scene);
    for name in words.values("attack") {
        // Each attack begins with the same numbers, whichever went before.
        let salt = name.bytes().fold(seed, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
        scene.random = Random::new(salt);
        let told = attacks::run(name, &mut scene);
        serial::mend();
        match told {
            Some(rounds) => say!("did {name} {rounds}"),
            None => say!("there is no attack {name}"),
        }
        wait(&words);
        match memory::dead_canary() {
            None => say!("canaries live"),
            Some(at) => say!("canaries dead at {at:#x}"),
        }
        sane::check(&mut scene);
    }
    say!("attacker: over");
    wait(&words);
    reset()
}

/// Lets the host look at the VMM, unless nobody does.
fn wait(words: &Words) {
    if words.number("alone") == 0 {
        serial::wait_for_host();
    }
}

fn reset() -> ! {
    loop {
        cpu::out8(0x64, 0xfe);
    }
}

#[panic_handler]
fn panicked(info: &core::panic::PanicInfo<'_>) -> ! {
    serial::mend();
    say!("attacker: {info}");
    reset()
}
