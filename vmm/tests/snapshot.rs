//! Machines that are suspended in one process and resumed in another, on a real KVM.
//!
//! Where KVM cannot run guests each test says so and is skipped, unless FLYRUN_REQUIRE_KVM=1 makes that a failure.
//! `make test` runs them through tests/host/run.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on panics")]
#![allow(clippy::disallowed_methods, reason = "threads of tests, and of a guest")]

mod linux;
mod mutate;
mod tiny;

use std::{
    io::{Read, Write},
    path::Path,
    sync::Arc,
};

use linux::Machine;

use tiny::{RESET, WAIT, kvm, say, spec};
use vmm::{
    exit::VmExit,
    snapshot::{dir::Dir, restore::Snapshot, save},
    trace::Trace,
    vm::Vm,
};

fn save_to(vm: &Vm, dir: &Path) -> Result<save::Report, save::NotSaved> {
    std::fs::create_dir_all(dir).unwrap();
    let mut machine = vm.machine();
    let standing = machine.standing().unwrap();
    save::save(
        vm.subject(),
        &standing,
        save::Order { dir: &Dir::at(dir).unwrap(), checksum: false, any_disks: false },
        &mut || false,
    )
}

#[test]
fn a_guest_goes_on_where_it_was() {
    if kvm() {
        for cpus in [1, 2] {
            let dir = tempfile::tempdir().unwrap();
            let spec = spec(dir.path(), &[&say("a\n"), &WAIT, &say("b"), &RESET], cpus);
            let mut vm = Vm::new(&spec, Arc::new(Trace::off())).unwrap();
            vm.start().unwrap();
            while std::fs::read(dir.path().join("console")).unwrap().is_empty() {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            vm.machine().pause().unwrap();
            let saved = dir.path().join("snapshot");
            let report = save_to(&vm, &saved).unwrap();
            assert!(report.full && report.written.written_bytes > 4096, "{report:?}");
            drop(vm);
            let snapshot = Snapshot::open(&saved).unwrap();
            let mut vm = Vm::restore(snapshot, &spec, false, Arc::new(Trace::off())).unwrap();
            vm.start().unwrap();
            let end = vm.serve();
            let text = std::fs::read_to_string(dir.path().join("console")).unwrap();
            assert_eq!((end.exit, end.reason.as_str(), text.as_str()), (VmExit::Reset, "", "a\nb"));
        }
    }
}

#[test]
fn an_access_to_a_device_is_neither_lost_nor_made_twice() {
    if kvm() {
        let text: String = (0..20_000u32)
            .map(|n| if n % 80 == 79 { '\n' } else { char::from(b'a' + (n % 23) as u8) })
            .collect();
        let dir = tempfile::tempdir().unwrap();
        let spec = spec(dir.path(), &[&say(&text), &RESET], 1);
        let mut vm = Vm::new(&spec, Arc::new(Trace::off())).unwrap();
        let console = || std::fs::read_to_string(dir.path().join("console")).unwrap();
        let saved = dir.path().join("snapshot");
        let mut snapshots = 0;
        loop {
            vm.start().unwrap();
            std::thread::sleep(std::time::Duration::from_micros(500 + 137 * snapshots));
            vm.machine().pause().unwrap();
            if console().len() > 19_000 || snapshots == 60 {
                break;
            }
            save_to(&vm, &saved).unwrap();
            snapshots += 1;
            vm = Vm::restore(Snapshot::open(&saved).unwrap(), &spec, false, Arc::new(Trace::off())).unwrap();
        }
        assert!(snapshots > 3, "{snapshots}");
        vm.machine().resume().unwrap();
        assert_eq!(vm.serve().exit, VmExit::Reset);
        assert!(console() == text, "after {snapshots} snapshots the console has:\n{}", console());
    }
}

/// The stored snapshot of the newest version of each section, by which later ones are tested: those with a balloon are of version
/// 2, `state-1` is from before there was one. To be run once for a version:
/// `tests/host/run --share vmm/tests/fixtures -- target/debug/deps/snapshot-… --ignored --exact writes_the_fixture`.
#[test]
#[ignore = "it writes tests/fixtures/state-3"]
fn writes_the_fixture() {
    let Some(mut machine) = machine(1) else { return };
    machine.spec.balloon = true;
    let mut life = machine.boot();
    life.suspend_to(&machine.snapshot());
    life.kill();
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    std::fs::copy(machine.snapshot().join("state"), fixtures.join("state-3")).unwrap();
}

/// A machine of the kernel for that many CPUs, where it can be run.
fn machine(cpus: u8) -> Option<Machine> {
    let kernel = linux::kernel(if cpus == 1 { "vmlinux" } else { "vmlinux-smp" });
    let mut machine = Machine::new(kernel.filter(|_| kvm())?);
    machine.spec.cpus = cpus;
    Some(machine)
}

fn monotonic(life: &mut linux::Life) -> i64 {
    life.ask("monotonic").parse().unwrap()
}

#[test]
fn linux_goes_on_with_its_memory_its_clock_and_its_devices() {
    let Some(machine) = machine(1).map(Machine::with_disk) else { return };
    let mut life = machine.boot();
    assert_eq!(life.ask("fill 7"), "filled");
    assert_eq!(life.ask("write 8192 before"), "written");
    let random = life.ask("random");
    let mut held = life.connect();
    held.write_all(b"hold\n").unwrap();
    let mut told = [0; 5];
    held.read_exact(&mut told).unwrap();
    let before = monotonic(&mut life);
    let figures = life.suspend_to(&machine.snapshot());
    assert_eq!(figures["full"], true);
    let (written, all) =
        (figures["written_bytes"].as_u64().unwrap(), figures["memory_bytes"].as_u64().unwrap());
    assert!(written > 32 << 20 && written < all, "{figures}");
    life.kill();

    let mut life = machine.resume();
    let after = monotonic(&mut life);
    let passed_ms = (after - before) / 1_000_000;
    assert!((0..30_000).contains(&passed_ms), "{passed_ms} ms have passed for the guest");
    assert_eq!(life.ask("questions"), "7");
    assert_eq!(life.ask("sum"), format!("7:{}", 8192 * 4096));
    assert_eq!(life.ask("ended"), "1", "the guest is told that its connection has gone");
    assert_eq!(life.ask("read 8192 6"), "before");
    assert_eq!(life.ask("write 0 after"), "written");
    assert_eq!(&std::fs::read(machine.disk()).unwrap()[..5], b"after");
    let next = life.ask("random");
    assert!(next.len() == 32 && next != random, "{next}");
    life.end();
}

/// Pages, as bytes in the figures.
fn written(figures: &serde_json::Value) -> u64 {
    figures["written_bytes"].as_u64().unwrap()
}

#[test]
fn the_second_snapshot_writes_only_what_has_changed_and_holds_everything() {
    let Some(machine) = machine(1) else { return };
    let mut life = machine.boot();
    life.ask("fill 7");
    let first = life.suspend_to(&machine.snapshot());
    life.kill();
    let mut life = machine.resume();
    assert_eq!(life.ask("touch 512 9"), "touched");
    let second = life.suspend_to(&machine.snapshot());
    life.kill();
    assert_eq!(second["full"], false);
    let little = (2 << 20)..(10 << 20);
    assert!(written(&first) > 32 << 20 && little.contains(&written(&second)), "{first} {second}");
    let mut life = machine.resume();
    let pages = |count: usize| count * 4096;
    assert_eq!(life.ask("sum"), format!("7:{} 9:{}", pages(8192 - 512), pages(512)));
    // Pages that become zero become holes again.
    life.ask("touch 1024 0");
    let third = life.suspend_to(&machine.snapshot());
    life.kill();
    assert!(written(&third) < 8 << 20, "{third}");
    let mut life = machine.resume();
    assert_eq!(life.ask("sum"), format!("0:{} 7:{}", pages(1024), pages(8192 - 1024)));
    life.end();
}

#[test]
fn memory_that_the_guest_frees_goes_back_to_the_host_and_out_of_the_snapshot() {
    const MIB: u64 = 1 << 20;
    let Some(mut machine) = machine(1) else { return };
    machine.spec.balloon = true;
    let mut life = machine.boot();
    life.ask("use 40");
    let used = life.resident();
    life.ask("free");
    // Some of the 40 was there before.
    wait_until(|| life.resident() < used - 24 * MIB);
    let small = life.suspend_to(&machine.snapshot());
    life.kill();
    assert!(written(&small) < 48 * MIB, "{small}");

    // Now what is freed is a snapshot's, and must not come back from its file.
    let mut life = machine.resume();
    life.ask("fill 7");
    life.ask("use 40");
    let large = life.suspend_to(&machine.snapshot());
    life.kill();
    assert!(written(&large) > 70 * MIB, "{large}");
    let blocks = || {
        let memory = std::fs::metadata(machine.snapshot().join("memory")).unwrap();
        std::os::unix::fs::MetadataExt::blocks(&memory) * 512
    };
    let before = blocks();
    let mut life = machine.resume();
    life.ask("free");
    wait_until(|| {
        std::thread::sleep(std::time::Duration::from_millis(500));
        let figures = life.suspend_to(&machine.snapshot());
        assert_eq!(life.request("resume"), "ok");
        assert!(written(&figures) < 8 * MIB, "{figures}");
        blocks() < before - 24 * MIB
    });
    life.suspend_to(&machine.snapshot());
    life.kill();
    // Its memory is used anew, and lost nothing.
    let mut life = machine.resume();
    assert_eq!(life.ask("sum"), format!("7:{}", 8192 * 4096));
    life.ask("use 40");
    assert_eq!(life.ask("sum"), format!("7:{}", 8192 * 4096));
    life.end();
}

/// What a machine of its own does with a snapshot that nobody has written.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    Refused,
    Ended,
    Runs,
}

fn outcome(mut vmm: std::process::Command) -> Outcome {
    const GRACE: std::time::Duration = std::time::Duration::from_millis(500);
    let mut child = vmm.stdout(std::process::Stdio::null()).spawn().unwrap();
    let since = std::time::Instant::now();
    let status = loop {
        match child.try_wait().unwrap() {
            None if since.elapsed() < GRACE => std::thread::sleep(std::time::Duration::from_millis(2)),
            other => break other,
        }
    };
    let Some(status) = status else {
        // One that hangs does not end by this, but by the time limit of the test host.
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let status = child.wait().unwrap();
        // By the signal itself: it was slow, and came so far only.
        let early = std::os::unix::process::ExitStatusExt::signal(&status) == Some(libc::SIGTERM);
        assert!(early || matches!(status.code(), Some(0 | 4..=7 | 9)), "{status} after SIGTERM");
        return if status.code() == Some(9) { Outcome::Refused } else { Outcome::Runs };
    };
    let mut told = String::new();
    child.stderr.take().unwrap().read_to_string(&mut told).unwrap();
    // A guest may end in any way that a guest can; flyrun-vmm itself may not.
    assert!(matches!(status.code(), Some(0 | 4..=6 | 9)) && told.lines().count() <= 1, "{status}: {told}");
    if status.code() == Some(9) { Outcome::Refused } else { Outcome::Ended }
}

/// FLYRUN_CORRUPTION_KVM_CASES says how many cases.
#[test]
fn kvm_is_given_states_that_nobody_has_written() {
    let Some(mut machine) = machine(1) else { return };
    let cases = std::env::var("FLYRUN_CORRUPTION_KVM_CASES").ok().map_or(40, |text| text.parse().unwrap());
    machine.spec.balloon = true;
    let mut life = machine.boot();
    life.suspend_to(&machine.snapshot());
    life.kill();
    let state = machine.snapshot().join("state");
    let good = std::fs::read(&state).unwrap();
    let restored = || machine.vmm(&["--restore", machine.snapshot().to_str().unwrap()]);
    assert_eq!(outcome(restored()), Outcome::Runs);
    let mut outcomes = std::collections::BTreeMap::new();
    for case in 0..cases {
        let mut random = mutate::Random::new(case);
        let file = if case % 4 == 0 {
            mutate::forged(&good, &mut random)
        } else {
            mutate::other_payloads(&good, &mut random)
        };
        std::fs::write(&state, file).unwrap();
        let _ = std::fs::remove_file(machine.dir.path().join("v"));
        let outcome = std::panic::catch_unwind(|| outcome(restored()));
        *outcomes.entry(outcome.unwrap_or_else(|_| panic!("case {case}"))).or_insert(0) += 1;
    }
    println!("{cases} cases: {outcomes:?}");
    // Both ways are really gone.
    assert!(outcomes[&Outcome::Refused] > 0 && outcomes[&Outcome::Runs] > 0);
}

#[test]
fn a_machine_has_the_balloon_that_it_had() {
    let Some(mut machine) = machine(1) else { return };
    for balloon in [false, true] {
        machine.spec.balloon = balloon;
        let mut life = machine.boot();
        life.suspend_to(&machine.snapshot());
        life.kill();
        machine.spec.balloon = !balloon;
        let mut life = machine.resume();
        life.suspend_to(&machine.snapshot());
        life.kill();
        machine.resume().end();
        std::fs::write(machine.dir.path().join("console"), b"").unwrap();
    }
}

#[test]
fn clones_of_one_snapshot_live_and_are_suspended_apart() {
    let Some(machine) = machine(1) else { return };
    let mut life = machine.boot();
    life.ask("fill 7");
    life.suspend_to(&machine.snapshot());
    life.kill();
    let mut clone = Machine::new(machine.spec.kernel.clone());
    clone.spec.vsock.as_mut().unwrap().guest_cid = 77;
    std::fs::create_dir(clone.snapshot()).unwrap();
    std::fs::hard_link(machine.snapshot().join("memory"), clone.snapshot().join("memory")).unwrap();
    std::fs::copy(machine.snapshot().join("state"), clone.snapshot().join("state")).unwrap();
    for (machine, byte, rounds) in [(&machine, 1, 3), (&clone, 2, 3)] {
        for round in 1..=rounds {
            let mut life = machine.resume();
            let touched = 100 * round;
            life.ask(&format!("touch {touched} {byte}"));
            let figures = life.suspend_to(&machine.snapshot());
            life.kill();
            assert!(figures["full"] == false && written(&figures) < 8 << 20, "{figures}");
            let mut life = machine.resume();
            let expected = format!("{byte}:{} 7:{}", touched * 4096, (8192 - touched) * 4096);
            assert_eq!(life.ask("sum"), expected, "round {round} of {byte}");
            life.kill();
        }
    }
    assert!(machine.snapshot().join("base").exists() && clone.snapshot().join("base").exists());
    // Into another directory a clone goes whole.
    let mut life = clone.resume();
    let elsewhere = clone.dir.path().join("elsewhere");
    let figures = life.suspend_to(&elsewhere);
    life.kill();
    assert_eq!(figures["full"], true);
    std::fs::remove_dir_all(clone.snapshot()).unwrap();
    std::fs::rename(elsewhere, clone.snapshot()).unwrap();
    let mut life = clone.resume();
    assert_eq!(life.ask("sum"), format!("2:{} 7:{}", 300 * 4096, (8192 - 300) * 4096));
    life.end();
}

#[test]
fn a_machine_resumed_paused_runs_when_it_is_told_and_can_be_saved_before() {
    let Some(machine) = machine(1) else { return };
    let mut life = machine.boot();
    life.ask("fill 3");
    life.suspend_to(&machine.snapshot());
    life.kill();
    let mut life = machine.resume_paused();
    let answer = life.request(&format!("snapshot {}", machine.snapshot().display()));
    assert!(answer.starts_with("ok {"), "{answer}");
    assert_eq!(life.request("resume"), "ok");
    assert_eq!(life.ask("sum"), format!("3:{}", 8192 * 4096));
    let refused = life.request(&format!("snapshot {}", machine.snapshot().display()));
    assert_eq!(refused, "error Save needs a machine that is paused, this one is Running");
    life.end();
}

#[test]
fn a_resume_gives_a_snapshot_up_and_leaves_nothing_half_written() {
    let Some(machine) = machine(1) else { return };
    let mut life = machine.boot();
    life.ask("fill 7");
    let held = life.connect();
    (&held).write_all(b"hold\n").unwrap();
    (&held).read_exact(&mut [0; 5]).unwrap();
    assert_eq!(life.request("pause"), "ok");
    std::fs::create_dir(machine.snapshot()).unwrap();
    life.send(&format!("snapshot {}\nresume", machine.snapshot().display()));
    assert_eq!(life.answer(), "error the snapshot was given up");
    assert_eq!(life.answer(), "ok");
    assert_eq!(std::fs::read_dir(machine.snapshot()).unwrap().count(), 0);
    assert_eq!(life.ask("ended"), "0", "connections are as they were");
    assert_eq!(life.ask("sum"), format!("7:{}", 8192 * 4096));
    // One that is given up while it is written in place ends the old one too: the machine has gone on from it.
    life.suspend_to(&machine.snapshot());
    life.kill();
    let mut life = machine.resume();
    life.ask("touch 4096 9");
    assert_eq!(life.request("pause"), "ok");
    life.send(&format!("snapshot {}\nresume", machine.snapshot().display()));
    assert_eq!((life.answer().as_str(), life.answer().as_str()), ("error the snapshot was given up", "ok"));
    assert!(machine.refusal().contains("(missing)"));
    life.ask("touch 100 8");
    life.suspend_to(&machine.snapshot());
    life.kill();
    let mut life = machine.resume();
    let pages = |count: usize| count * 4096;
    assert_eq!(life.ask("sum"), format!("7:{} 8:{} 9:{}", pages(4096), pages(100), pages(3996)));
    life.end();
}

#[test]
fn two_vcpus_go_on_busy_and_idle() {
    let Some(machine) = machine(2) else { return };
    let mut life = machine.boot();
    assert_eq!(life.ask("cpus"), "2");
    assert_eq!(life.ask("spin"), "spinning");
    let before = monotonic(&mut life);
    for _ in 0..2 {
        life.suspend_to(&machine.snapshot());
        life.kill();
        life = machine.resume();
        let after = monotonic(&mut life);
        assert!((0..60_000_000_000).contains(&(after - before)), "{before} {after}");
    }
    assert_eq!(life.ask("rest"), "resting");
    life.end();
}

#[test]
fn memory_above_the_gap_comes_back() {
    let Some(mut machine) = machine(1) else { return };
    machine.spec.memory_mib = 3584;
    let mut life = machine.boot();
    life.ask("fill 7");
    let first = life.suspend_to(&machine.snapshot());
    life.kill();
    assert_eq!(first["memory_bytes"], 3584u64 << 20);
    let mut life = machine.resume();
    life.ask("touch 64 8");
    let second = life.suspend_to(&machine.snapshot());
    life.kill();
    assert!(written(&second) < 8 << 20, "{second}");
    let mut life = machine.resume();
    assert_eq!(life.ask("sum"), format!("7:{} 8:{}", (8192 - 64) * 4096, 64 * 4096));
    life.end();
}

#[test]
fn what_cannot_be_resumed_is_refused_by_name() {
    let Some(mut machine) = machine(1).map(Machine::with_disk) else { return };
    let mut life = machine.boot();
    life.suspend_to(&machine.snapshot());
    life.kill();
    let state = machine.snapshot().join("state");
    let memory = machine.snapshot().join("memory");
    let good = std::fs::read(&state).unwrap();
    let refused = |machine: &Machine, name: &str| {
        let told = machine.refusal();
        assert!(
            told.starts_with("flyrun-vmm: the snapshot cannot be resumed (") && told.contains(name),
            "{told}"
        );
    };
    std::fs::write(&state, &good[..good.len() / 2]).unwrap();
    refused(&machine, "(truncated): state has");
    let mut bad = good.clone();
    bad[good.len() / 2] ^= 1;
    std::fs::write(&state, &bad).unwrap();
    refused(&machine, "(corrupted): the checksum of section");
    std::fs::write(&state, &good).unwrap();

    let length = std::fs::metadata(&memory).unwrap().len();
    let file = std::fs::File::options().write(true).open(&memory).unwrap();
    file.set_len(length - 4096).unwrap();
    refused(&machine, "(truncated)");
    file.set_len(length).unwrap();

    let spec = machine.spec.clone();
    machine.spec.memory_mib = 64;
    refused(&machine, "(other-machine): the machine has 64 MiB of memory, and was suspended with 128");
    machine.spec.kernel = machine.dir.path().join("other");
    machine.spec.memory_mib = 128;
    std::fs::write(&machine.spec.kernel, b"another kernel").unwrap();
    refused(&machine, "(other-kernel)");
    machine.spec = spec;

    let disk = std::fs::File::options().write(true).open(machine.disk()).unwrap();
    let then = disk.metadata().unwrap().modified().unwrap();
    (&disk).write_all(b"x").unwrap();
    refused(&machine, "(changed-disk): disk 0:");
    disk.set_modified(then).unwrap();
    machine.resume().end();

    std::fs::remove_file(&state).unwrap();
    refused(&machine, "(missing)");
}

/// Runs a program of the host, as root in the test host.
fn run(program: &str, arguments: &[&str]) {
    let output = std::process::Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn network_cards_of_both_kinds_go_on() {
    network_cards_go_on(1, 1);
}

#[test]
fn network_cards_of_both_kinds_go_on_with_several_pairs_of_queues() {
    network_cards_go_on(2, 2);
}

fn network_cards_go_on(cpus: u8, queue_pairs: u16) {
    let Some(mut machine) = machine(cpus) else { return };
    static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let backends: &[&str] = match Path::new("/dev/vhost-net").exists() {
        true => &["user", "vhost"],
        false => &["user"],
    };
    vmm::PersistentTap::create("snap0", queue_pairs > 1).unwrap();
    run("ip", &["address", "add", "10.99.0.1/24", "dev", "snap0"]);
    run("ip", &["link", "set", "snap0", "up"]);
    let echo = std::net::UdpSocket::bind("10.99.0.1:7").unwrap();
    echo.set_read_timeout(Some(std::time::Duration::from_millis(100))).unwrap();
    let over = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let is_over = std::sync::Arc::clone(&over);
    let echo = std::thread::spawn(move || {
        let mut bytes = [0; 100];
        while !is_over.load(std::sync::atomic::Ordering::SeqCst) {
            if let Ok((count, from)) = echo.recv_from(&mut bytes) {
                let _ = echo.send_to(&bytes[..count], from);
            }
        }
    });
    for backend in backends {
        let card = serde_json::json!([{
            "tap": "snap0", "mac": [2, 0, 0, 0, 0, 1], "backend": backend, "queue_pairs": queue_pairs,
        }]);
        machine.spec.nets = serde_json::from_value(card).unwrap();
        let mut life = machine.boot();
        assert_eq!(life.ask("ping first"), "first");
        for round in 0..2 {
            life.suspend_to(&machine.snapshot());
            life.kill();
            life = machine.resume();
            // More than the card's rings have, so that all buffers come round.
            for n in 0..270 {
                let text = format!("{round}-{n}");
                assert_eq!(life.ask(&format!("ping {text}")), text, "{backend}");
            }
        }
        // A snapshot without an end of the machine.
        life.suspend_to(&machine.snapshot());
        assert_eq!(life.request("resume"), "ok");
        assert_eq!(life.ask("ping on"), "on");
        life.end();
        std::fs::write(machine.dir.path().join("console"), b"").unwrap();
    }
    over.store(true, std::sync::atomic::Ordering::SeqCst);
    echo.join().unwrap();
    run("ip", &["link", "delete", "snap0"]);
}

#[test]
fn an_owner_that_ends_while_its_machine_is_saved_is_outlived() {
    let Some(machine) = machine(1) else { return };
    let vmm = machine.vmm(&[]);
    let (mut owner, stdin) = std::os::unix::net::UnixStream::pair().unwrap();
    // A shell is the owner, in between.
    let mut shell = std::process::Command::new("sh")
        .args(["-c", r#"exec 3<&0; "$@" --control --owner $$ <&3 & echo $!; exec >&-; wait"#, "owner"])
        .arg(vmm.get_program())
        .args(vmm.get_args())
        .stdin(std::os::fd::OwnedFd::from(stdin))
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut pid = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(shell.stdout.take().unwrap()), &mut pid)
        .unwrap();
    let alive = || Path::new("/proc").join(pid.trim()).exists();
    wait_until(|| {
        std::fs::read_to_string(machine.dir.path().join("console")).is_ok_and(|it| it.contains("ready"))
    });
    std::fs::create_dir(machine.snapshot()).unwrap();
    owner.write_all(format!("pause\nsnapshot {}\n", machine.snapshot().display()).as_bytes()).unwrap();
    wait_until(|| {
        machine.snapshot().join("memory.new").exists() || machine.snapshot().join("state").exists()
    });
    shell.kill().unwrap();
    shell.wait().unwrap();
    wait_until(|| !alive());
    let mut life = machine.resume();
    assert_eq!(life.ask("questions"), "1");
    life.end();
}

#[test]
fn a_checksum_of_memory_is_made_and_verified_where_it_is_asked_for() {
    let Some(machine) = machine(1) else { return };
    let inspect = || {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_flyrun-vmm"));
        let output = command.args(["--verify", "--inspect"]).arg(machine.snapshot()).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let mut life = machine.boot();
    life.suspend_to(&machine.snapshot());
    life.kill();
    assert!(inspect().0 == Some(9) && inspect().1.contains("has no checksum"), "{:?}", inspect());
    let mut life = machine.resume();
    life.ask("fill 7");
    assert_eq!(life.request("pause"), "ok");
    let answer = life.request(&format!("checked-snapshot {}", machine.snapshot().display()));
    assert!(answer.starts_with(r#"ok {"full":false"#), "{answer}");
    life.kill();
    assert_eq!(inspect(), (Some(0), String::new()));
    machine.resume_verified().end();
    let memory = std::fs::File::options().write(true).open(machine.snapshot().join("memory")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&memory, b"x", 77 << 20).unwrap();
    let (code, told) = inspect();
    assert!(code == Some(9) && told.contains("(corrupted): the checksum of memory is wrong"), "{told}");
}

fn wait_until(mut done: impl FnMut() -> bool) {
    let since = std::time::Instant::now();
    while !done() {
        assert!(since.elapsed().as_secs() < 120, "what was waited for does not happen");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

#[test]
fn an_inspection_reads_the_header_alone() {
    let Some(machine) = machine(1).map(Machine::with_disk) else { return };
    let mut life = machine.boot();
    life.suspend_to(&machine.snapshot());
    life.kill();
    std::fs::remove_file(machine.snapshot().join("memory")).unwrap();
    let inspect = || {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_flyrun-vmm"));
        command.arg("--inspect").arg(machine.snapshot()).output().unwrap()
    };
    let output = inspect();
    assert!(output.status.success(), "{output:?}");
    let header: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(header["memory"]["bytes"], 128 << 20);
    assert_eq!(header["spec"]["cpus"], 1);
    assert_eq!(header["disks"][0]["files"][0]["bytes"], 4 << 20);
    assert!(header["kernel"]["digest"].as_str().unwrap().starts_with("build-id:"), "{header}");
    assert!(machine.refusal().contains("(missing)"));
    std::fs::write(machine.snapshot().join("state"), b"").unwrap();
    assert_eq!(inspect().status.code(), Some(9));
}
