//! Machines on disk: suspend and resume.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use tests::image::busybox;
use tests::suspended::{pid_of, wait_until};
use tests::{Flyrun, flyrun::Outcome};

/// Counts on standard output, in a file of its own disk, and says what clocks and randomness say.
const COUNTER: &str = "i=0; while :; do i=$((i+1)); echo line $i; echo $i > /count; sleep 0.05; done";

fn flyrun(arguments: &[&str]) -> Outcome {
    Flyrun::shared().command(arguments).end()
}

/// A machine that is removed at the end of its test.
struct Machine(String);

impl Machine {
    fn start(name: &str, flags: &[&str], script: &str) -> Machine {
        let image = busybox();
        let words = [&["run", "-d", "--name", name], flags, &[&image, "sh", "-c", script]].concat();
        flyrun(&words).code(0);
        Machine(name.to_string())
    }

    fn call(&self, command: &[&str]) -> Outcome {
        flyrun(&[command, &[&self.0]].concat())
    }

    fn exec(&self, script: &str) -> String {
        flyrun(&["exec", &self.0, "sh", "-c", script]).code(0).text()
    }

    fn state(&self) -> String {
        let mut inspected = self.call(&["inspect"]).code(0);
        inspected.json()[0]["state"].as_str().unwrap().to_string()
    }

    fn last_start(&self) -> serde_json::Value {
        self.call(&["inspect"]).code(0).json()[0]["last_start"].clone()
    }

    fn lines(&self) -> usize {
        self.call(&["logs"]).code(0).text().lines().count()
    }

    fn wait_for_lines(&self, more: usize) {
        let before = self.lines();
        for _ in 0..600 {
            if self.lines() >= before + more {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        panic!("{} prints nothing any more", self.0);
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.call(&["rm", "-f"]);
    }
}

/// KiB of kernels' text that the process has mapped from the files which all machines share, and how many of them by huge pages.
fn shared_text(process: i32) -> (u64, u64) {
    let smaps = std::fs::read_to_string(format!("/proc/{process}/smaps")).unwrap();
    let (mut is_text, mut mapped, mut huge) = (false, 0, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap();
        if !first.ends_with(':') {
            is_text = line.contains("/kernel-text/");
        } else if is_text {
            let mut kib = || words.next().unwrap().parse::<u64>().unwrap();
            match first {
                "Size:" => mapped += kib(),
                "ShmemPmdMapped:" => huge += kib(),
                _ => {}
            }
        }
    }
    (mapped, huge)
}

#[test]
fn all_machines_have_their_kernels_text_once_in_huge_pages_and_do_without() {
    // With a base of its own alone, which its first machine makes.
    let flyrun = Flyrun::fresh();
    std::fs::remove_file(flyrun.root().join("bases")).unwrap();
    let call = |words: &[&str]| flyrun.command(words).end().code(0);
    let vmm = |name: &str| {
        let id = call(&["inspect", name]).json()[0]["id"].as_str().unwrap().to_string();
        pid_of("flyrun-vmm", &id)
    };
    let texts = flyrun.run_dir().join("kernel-text");
    let names = ["text-one", "text-two"];
    for name in names {
        call(&["run", "-d", "--name", name, "--network", "none", &busybox(), "sleep", "1000"]);
    }
    let name = names[1];
    let (mapped, huge) = shared_text(vmm(name));
    assert!(mapped >= 2048 && mapped.is_multiple_of(2048), "{mapped} KiB");
    if huge == 0 {
        eprintln!("this host has no huge page left for the text");
    }
    assert_eq!(shared_text(vmm(names[0])).0, mapped);
    // A snapshot of its own says so as well.
    for _ in 0..2 {
        call(&["suspend", name]);
        call(&["resume", name]);
        call(&["exec", name, "true"]);
        assert_eq!(shared_text(vmm(name)).0, mapped);
    }
    // A host that was started anew has none, until a machine has been started.
    call(&["suspend", name]);
    std::fs::remove_dir_all(&texts).unwrap();
    call(&["resume", name]);
    call(&["exec", name, "true"]);
    assert_eq!(shared_text(vmm(name)), (0, 0));
    wait_until("the base's text is there again", || {
        std::fs::read_dir(&texts)
            .is_ok_and(|mut files| files.any(|file| file.is_ok_and(|file| file.path().extension().is_none())))
    });
    call(&["suspend", name]);
    call(&["resume", name]);
    assert_eq!(shared_text(vmm(name)).0, mapped);
    names.iter().for_each(|name| drop(call(&["rm", "-f", name])));
}

#[test]
fn a_machine_goes_on_where_it_was_and_its_log_has_no_gap() {
    let machine = Machine::start("sleeper", &["-p", "127.0.0.1:18480:80"], COUNTER);
    machine.wait_for_lines(5);
    for _ in 0..3 {
        machine.call(&["suspend"]).code(0).prints("sleeper");
        assert_eq!(machine.state(), "suspended");
        let before = machine.lines();
        machine.call(&["resume"]).code(0).prints("sleeper").complains_about("flyrun: sleeper: resumed");
        assert_eq!(machine.state(), "started");
        assert_eq!(machine.last_start()["kind"], "resumed");
        machine.wait_for_lines(5);
        assert!(machine.lines() > before);
    }
    let log = machine.call(&["logs"]).code(0).text();
    for (index, line) in log.lines().enumerate() {
        assert_eq!(line, format!("line {}", index + 1));
    }
    // The old one, or another if somebody has taken that meanwhile.
    let address =
        machine.call(&["inspect"]).code(0).json()[0]["network"]["ipv4"].as_str().unwrap().to_string();
    assert_eq!(machine.exec("ip -4 address show eth0 | grep -o 'inet [0-9.]*'"), format!("inet {address}"));
    let count: usize = machine.exec("cat /count").parse().unwrap();
    assert!(count >= 15, "{count}");
}

#[test]
fn what_is_suspended_twice_or_stopped_is_what_ps_says() {
    let machine = Machine::start("states", &["--network", "none"], COUNTER);
    machine.call(&["suspend"]).code(0);
    machine.call(&["suspend"]).code(0);
    flyrun(&["ps", "--filter", "status=suspended"]).code(0).prints_something_with("states");
    machine.call(&["pause"]).code(125).complains_about("it is suspended");
    flyrun(&["exec", "states", "true"]).code(125).complains_about("flyrun resume");
    machine.call(&["rm"]).code(125).complains_about("it is suspended");
    machine.call(&["stop"]).code(0);
    assert_eq!(machine.state(), "stopped");
    machine.call(&["resume"]).code(125).complains_about("flyrun start");
    machine.call(&["start"]).code(0);
    assert_eq!(machine.last_start()["kind"], "base");
}

#[test]
fn time_and_randomness_are_renewed() {
    let machine = Machine::start("renewed", &["--network", "none"], COUNTER);
    let generation = machine.exec("cat /dev/vm-generation-id");
    assert_eq!(generation.len(), 32);
    let uptime: f64 = machine.exec("cut -d' ' -f1 /proc/uptime").parse().unwrap();
    machine.call(&["suspend"]).code(0);
    std::thread::sleep(Duration::from_secs(5));
    machine.call(&["resume"]).code(0);
    assert_ne!(machine.exec("cat /dev/vm-generation-id"), generation);
    // Both ends of the same moment: what lies between is the time that two commands take.
    let before = now();
    let inside: u64 = machine.exec("date +%s").parse().unwrap();
    assert!((before..=now()).contains(&inside), "{before} {inside}");
    let later: f64 = machine.exec("cut -d' ' -f1 /proc/uptime").parse().unwrap();
    assert!(later > uptime, "monotonic time went from {uptime} to {later}");
}

fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
}

#[test]
fn a_damaged_snapshot_is_told_and_the_machine_boots() {
    let machine = Machine::start("damaged", &["--network", "none"], COUNTER);
    machine.wait_for_lines(2);
    machine.call(&["suspend"]).code(0);
    let directory = machine.call(&["inspect"]).code(0).json()[0]["directory"].as_str().unwrap().to_string();
    let state = format!("{directory}/snapshot/state");
    let mut bytes = std::fs::read(&state).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&state, bytes).unwrap();
    machine.call(&["resume"]).code(0).prints("damaged").complains_about("damaged: cold_boot: ");
    let last_start = machine.last_start();
    assert_eq!(last_start["kind"], "cold_boot");
    assert!(last_start["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{last_start}");
    machine.wait_for_lines(2);
}

#[test]
fn a_suspended_machine_keeps_its_volume() {
    let machine = Machine::start("keeper", &["--network", "none", "-v", "kept:/data"], COUNTER);
    machine.exec("echo before > /data/file");
    machine.call(&["suspend"]).code(0);
    Flyrun::shared()
        .run(&["-v", "kept:/data", &busybox(), "true"])
        .end()
        .code(125)
        .complains_about("suspended");
    flyrun(&["volume", "extend", "kept", "--size", "20g"]).code(125).complains_about("suspended");
    machine.call(&["resume"]).code(0);
    assert_eq!(machine.exec("cat /data/file"), "before");
    drop(machine);
    Flyrun::shared()
        .run(&["-v", "kept:/data", &busybox(), "cat", "/data/file"])
        .end()
        .code(0)
        .prints("before");
    flyrun(&["volume", "rm", "kept"]).code(0);
}

#[test]
fn who_is_connected_with_a_machine_that_is_suspended_is_told_and_so_is_its_workload() {
    let machine = Machine::start("peer", &[], "nc -ll -p 9000 -e cat");
    let address = machine.exec("ip -4 address show eth0 | grep -o 'inet [0-9.]*' | cut -c6-");
    let mut peer = (0..600)
        .find_map(|_| {
            std::thread::sleep(Duration::from_millis(100));
            TcpStream::connect((address.as_str(), 9000)).ok()
        })
        .unwrap();
    // Longer than anything takes here.
    peer.set_read_timeout(Some(Duration::from_secs(300))).unwrap();
    peer.write_all(b"there?").unwrap();
    peer.read_exact(&mut [0; 6]).unwrap();
    let established = "netstat -tn | grep -c ESTABLISHED || true";
    assert_eq!(machine.exec(established), "1");
    machine.call(&["suspend"]).code(0);
    let told = peer.read(&mut [0]).map_err(|error| error.kind());
    assert_eq!(told, Err(std::io::ErrorKind::ConnectionReset));
    machine.call(&["resume"]).code(0);
    assert_eq!(machine.exec(established), "0");
}

/// `make soak` makes two hundred.
#[test]
fn clones_of_one_machine_have_randomness_and_addresses_of_their_own() {
    tests::clones::are_somebody_each(Flyrun::shared(), 12);
}

/// `make soak` does it a hundred times.
#[test]
fn services_live_through_suspends_and_clones() {
    tests::resident::survives(Flyrun::shared(), 3, 2);
}

#[test]
fn clones_are_machines_of_their_own_and_go_on_from_one_memory() {
    let machine = Machine::start("dolly", &["-p", "127.0.0.1:18490:80"], COUNTER);
    machine.exec("echo before > /file");
    machine.wait_for_lines(5);
    let cloned = flyrun(&["clone", "-n", "3", "--name", "sheep", "dolly"]).code(0).text();
    assert_eq!(cloned.lines().count(), 3);
    let clones: Vec<_> = (1..=3).map(|number| Machine(format!("sheep-{number}"))).collect();
    let mut seen = std::collections::BTreeSet::new();
    for (clone, id) in clones.iter().zip(cloned.lines()) {
        assert_eq!(clone.state(), "started");
        assert_eq!(clone.last_start()["kind"], "resumed");
        assert_eq!(
            clone.exec("hostname; cat /etc/hostname; echo $HOSTNAME; cat /file"),
            format!("{id}\n{id}\n{id}\nbefore")
        );
        let address = clone.exec("ip -4 address show eth0 | grep -o 'inet [0-9.]*'");
        assert_eq!(clone.exec("grep -c nameserver /etc/resolv.conf"), "1");
        let random = clone.exec("head -c 16 /dev/urandom | od -A n -t x1; cat /dev/vm-generation-id");
        assert!(seen.insert(address) && seen.insert(random), "{seen:?}");
        clone.wait_for_lines(3);
        clone.exec(&format!("echo {id} > /file"));
        // Through the host, by the card and the address that are this one's alone.
        clone.exec("mkdir -p /srv; hostname > /srv/name; httpd -p 80 -h /srv");
        let port = flyrun(&["port", &clone.0, "80"]).code(0).text();
        let port = port.rsplit(':').next().unwrap();
        let page = std::process::Command::new("curl")
            .args(["-s", &format!("http://127.0.0.1:{port}/name")])
            .output()
            .unwrap();
        assert_eq!(String::from_utf8_lossy(&page.stdout).trim(), id);
    }
    assert_eq!(machine.exec("cat /file"), "before");
    machine.wait_for_lines(3);
    // What they have written since goes to disk on its own, and is there again.
    for (clone, id) in clones.iter().zip(cloned.lines()) {
        clone.call(&["suspend"]).code(0);
        clone.call(&["resume"]).code(0);
        assert_eq!(clone.last_start()["kind"], "resumed");
        assert_eq!(clone.exec("cat /file"), id);
    }
}
