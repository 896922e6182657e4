//! A guest that owns its kernel and attacks (tests/attacker): its VMM stands, stays small, and its neighbour goes on.
//! `make soak NAME=hostile` does it for longer, with other seeds.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use tests::Flyrun;
use tests::hostile::{ATTACKS, Attack};
use tests::image::busybox;

const ATTACK: Attack<'static> =
    Attack { names: &ATTACKS, seed: 1, percent: 25, cpus: 1, net: "user", console_file: false };

/// Set also when the attack is one that succeeds, and panics.
struct AtTheEnd<'a>(&'a AtomicBool);

impl Drop for AtTheEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn a_hostile_guest_breaks_neither_its_vmm_nor_its_neighbour() {
    let flyrun = Flyrun::shared();
    flyrun.command(&["run", "-d", "--name", "neighbour", &busybox(), "sleep", "100000"]).end().code(0);
    let over = AtomicBool::new(false);
    let answers = thread::scope(|scope| {
        let neighbour = scope.spawn(|| {
            let mut answers = 0;
            while !over.load(Ordering::SeqCst) {
                flyrun.command(&["exec", "neighbour", "echo", "alive"]).end().code(0).prints("alive");
                answers += 1;
            }
            answers
        });
        let at_the_end = AtTheEnd(&over);
        ATTACK.run();
        drop(at_the_end);
        neighbour.join().unwrap()
    });
    assert!(answers > 3, "the neighbour answered {answers} times");
    flyrun.command(&["rm", "-f", "neighbour"]).end().code(0);
}

#[test]
fn hostile_descriptors_may_change_while_they_are_read() {
    Attack { names: &["race", "chains"], cpus: 2, ..ATTACK }.run();
}

#[test]
fn a_hostile_driver_of_vhost_net_harms_nobody() {
    if !std::path::Path::new("/dev/vhost-net").exists() {
        println!("SKIPPED, nothing was tested: there is no /dev/vhost-net");
        return;
    }
    Attack {
        names: &["registers", "rings", "chains", "available", "frames"],
        net: "auto",
        percent: 25,
        ..ATTACK
    }
    .run();
}

#[test]
fn a_hostile_guest_does_not_fill_the_host_with_its_console() {
    // 20 pages of 4 KiB, an exit for each byte, to a file that had nearly all it may have.
    Attack { names: &["console"], percent: 100, console_file: true, ..ATTACK }.run();
}
