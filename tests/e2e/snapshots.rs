//! Snapshots with a name: taken, kept, carried elsewhere, and gone on from.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tests::Flyrun;
use tests::flyrun::{Outcome, scratch};
use tests::image::busybox;

/// Counts on standard output, and waits for somebody to look.
const COUNTER: &str = "i=0; while :; do i=$((i+1)); echo line $i; sleep 0.05; done";
/// Ends by itself as soon as it finds itself in another run of its memory.
const WAITER: &str = "g=$(cat /dev/vm-generation-id); echo waiting
    while [ \"$(cat /dev/vm-generation-id)\" = \"$g\" ]; do sleep 0.1; done
    echo woke up; echo elsewhere >&2; exit 7";

/// A store with what a test makes in it; machines are removed at its end.
struct House<'a>(&'a Flyrun, Vec<String>);

impl House<'_> {
    fn flyrun(&self, arguments: &[&str]) -> Outcome {
        self.0.command(arguments).end()
    }

    /// Starts a machine and waits for its first words.
    fn start(&mut self, name: &str, flags: &[&str], script: &str) {
        let image = busybox();
        let words = [&["run", "-d", "--name", name], flags, &[&image, "sh", "-c", script]].concat();
        self.flyrun(&words).code(0);
        self.1.push(name.to_string());
        self.wait_until_lines(name, 1);
    }

    /// Starts a machine from a snapshot, and gives its id.
    fn go_on(&mut self, name: &str, snapshot: &str, flags: &[&str]) -> String {
        let words = [&["run", "-d", "--name", name, "--from-snapshot", snapshot], flags].concat();
        let id = self.flyrun(&words).code(0).text();
        self.1.push(name.to_string());
        id
    }

    fn exec(&self, name: &str, script: &str) -> String {
        self.flyrun(&["exec", name, "sh", "-c", script]).code(0).text()
    }

    fn inspect(&self, name: &str) -> serde_json::Value {
        self.flyrun(&["inspect", name]).code(0).json()[0].clone()
    }

    fn lines(&self, name: &str) -> Vec<String> {
        self.flyrun(&["logs", name]).code(0).text().lines().map(str::to_string).collect()
    }

    fn wait_for_lines(&self, name: &str, more: usize) {
        self.wait_until_lines(name, self.lines(name).len() + more);
    }

    fn wait_until_lines(&self, name: &str, count: usize) {
        for _ in 0..600 {
            if self.lines(name).len() >= count {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        panic!("{name} prints nothing any more");
    }

    /// It counts without a gap, whatever it began with. Gives that.
    fn counts_on(&self, name: &str) -> usize {
        self.wait_for_lines(name, 3);
        let lines = self.lines(name);
        let number = |line: &str| line.strip_prefix("line ").unwrap().parse::<usize>().unwrap();
        let first = number(&lines[0]);
        for (index, line) in lines.iter().enumerate() {
            assert_eq!(number(line), first + index, "{name}");
        }
        first
    }

    fn snapshots(&self) -> Vec<serde_json::Value> {
        let mut listed = self.flyrun(&["snapshot", "ls", "--json"]).code(0);
        listed.json().as_array().unwrap().clone()
    }
}

impl Drop for House<'_> {
    fn drop(&mut self) {
        for name in &self.1 {
            let _ = self.flyrun(&["rm", "-f", name]);
        }
    }
}

#[test]
fn snapshots_of_a_running_machine_leave_it_running_and_others_go_on_from_them() {
    let mut house = House(Flyrun::shared(), vec![]);
    house.start("model", &["-p", "127.0.0.1:18500:80"], COUNTER);
    house.exec("model", "echo before > /file");
    house.wait_for_lines("model", 5);
    let before = house.inspect("model");
    let id = house.flyrun(&["snapshot", "create", "--name", "warm", "model"]).code(0).text();
    let after = house.inspect("model");
    for same in ["state", "started_at", "last_start", "network"] {
        assert_eq!(before[same], after[same], "{same}");
    }
    assert_eq!(house.counts_on("model"), 1);
    house.exec("model", "echo later > /file");

    let mut seen = BTreeSet::new();
    let made =
        [house.go_on("warm-1", "warm", &[]), house.go_on("warm-2", &id, &["-p", "127.0.0.1:18501:80"])];
    for (name, id) in ["warm-1", "warm-2"].into_iter().zip(&made) {
        let facts = house.inspect(name);
        assert_eq!((&facts["state"], &facts["last_start"]["kind"]), (&"started".into(), &"resumed".into()));
        assert!(house.counts_on(name) > 1, "{name} has begun anew");
        assert_eq!(house.exec(name, "hostname; cat /etc/hostname /file"), format!("{id}\n{id}\nbefore"));
        let random = house.exec(name, "head -c 16 /dev/urandom | od -A n -t x1; cat /dev/vm-generation-id");
        let address = house.exec(name, "ip -4 address show eth0 | grep -o 'inet [0-9.]*'");
        assert_eq!(address, format!("inet {}", facts["network"]["ipv4"].as_str().unwrap()));
        assert!(seen.insert(random) && seen.insert(address), "{seen:?}");
        house.exec(name, &format!("echo {id} > /file"));
    }
    assert_eq!(house.flyrun(&["port", "warm-2", "80"]).code(0).text(), "127.0.0.1:18501");

    // They hold what they need of it.
    house.flyrun(&["snapshot", "rm", "warm"]).code(0).prints("warm");
    house.flyrun(&["rm", "-f", "model"]).code(0);
    for (name, id) in ["warm-1", "warm-2"].into_iter().zip(&made) {
        house.flyrun(&["suspend", name]).code(0);
        house.flyrun(&["resume", name]).code(0);
        assert_eq!(house.inspect(name)["last_start"]["kind"], "resumed");
        house.counts_on(name);
        assert_eq!(&house.exec(name, "cat /file"), id);
    }
}

#[test]
fn snapshots_of_a_machine_that_was_resumed_hold_what_it_has_written_since() {
    let mut house = House(Flyrun::shared(), vec![]);
    house.start("again", &["--network", "none"], COUNTER);
    house.exec(
        "again",
        "mkdir /dev/shm/d; head -c 3000000 /dev/urandom > /dev/shm/d/old; sha256sum /dev/shm/d/old > /old",
    );
    house.flyrun(&["suspend", "again"]).code(0);
    house.flyrun(&["resume", "again"]).code(0);
    house.exec("again", "head -c 3000000 /dev/urandom > /dev/shm/d/new; sha256sum /dev/shm/d/new > /new");
    house.flyrun(&["snapshot", "create", "--name", "again-1", "again"]).code(0);
    house.exec("again", "rm -r /dev/shm/d; echo gone > /new");
    // The machine's own memory is the snapshot's too by now, and is not written over.
    house.flyrun(&["suspend", "again"]).code(0);
    house.flyrun(&["resume", "again"]).code(0);
    assert_eq!(house.exec("again", "cat /new; ls /dev/shm"), "gone");
    house.go_on("again-2", "again-1", &[]);
    assert_eq!(house.inspect("again-2")["last_start"]["kind"], "resumed");
    let checked = house.exec("again-2", "sha256sum -c /old /new");
    assert_eq!(checked, "/dev/shm/d/old: OK\n/dev/shm/d/new: OK");
    let files = house.flyrun(&["snapshot", "inspect", "again-1"]).code(0).json()[0]["files"].clone();
    let on_disk = |name: &str| {
        let file = files.as_array().unwrap().iter().find(|file| file["name"] == name);
        file.unwrap_or_else(|| panic!("no {name} in {files}"))["bytes_on_disk"].as_u64().unwrap()
    };
    assert!(on_disk("memory") < on_disk("base"), "{files}");
    house.flyrun(&["snapshot", "rm", "again-1"]).code(0);
}

#[test]
fn snapshots_outlive_their_machine_and_keep_its_root_filesystem() {
    let flyrun = Flyrun::fresh();
    let mut house = House(&flyrun, vec![]);
    house.start("origin", &["--network", "none"], WAITER);
    house.flyrun(&["suspend", "origin"]).code(0);
    let id = house.flyrun(&["snapshot", "create", "--name", "kept", "origin"]).code(0).text();
    assert_eq!(house.inspect("origin")["state"], "suspended");
    house.flyrun(&["rm", "-f", "origin"]).code(0);
    let image = house.flyrun(&["images", "-q"]).code(0).text();
    house.flyrun(&["rmi", &image]).code(125).complains_about("a snapshot");
    house.flyrun(&["prune", "--all"]).code(0);
    for _ in 0..2 {
        let ended = house.flyrun(&["run", "--rm", "--from-snapshot", "kept"]).code(7).prints("woke up");
        assert_eq!(ended.errors(), "elsewhere\n");
    }
    house.flyrun(&["ps", "-aq"]).code(0).prints("");
    house.flyrun(&["snapshot", "rm", &id]).code(0);
    house.flyrun(&["rmi", &image]).code(0);
}

#[test]
fn snapshots_tell_what_they_are() {
    let mut house = House(Flyrun::shared(), vec![]);
    house.start("told", &["--network", "none", "--memory", "128m"], COUNTER);
    let id = house.flyrun(&["snapshot", "create", "told"]).code(0).text();
    let all = house.snapshots();
    let listed = all.iter().find(|listed| listed["id"] == id.as_str()).unwrap();
    assert_eq!((&listed["name"], &listed["machine"]["name"]), (&id.as_str().into(), &"told".into()));
    assert_eq!(listed["memory"], 128 << 20);
    assert!(
        listed["bytes_on_disk"].as_u64().unwrap() > 1 << 20 && listed["taken_at_ms"].as_u64().unwrap() > 0
    );
    house.flyrun(&["snapshot", "ls"]).code(0).prints_something_with("told");
    house.flyrun(&["snapshot", "ls", "-q"]).code(0).prints_something_with(&id);
    let inspected = house.flyrun(&["snapshot", "inspect", &id[..6]]).code(0).json()[0].clone();
    let header = &inspected["header"];
    assert_eq!((&header["memory"]["bytes"], &header["spec"]["cpus"]), (&(128 << 20).into(), &1.into()));
    assert!(header["cpu"]["vendor"].is_string() && header["kernel"]["digest"].is_string(), "{header}");
    assert!(inspected["chain_id"].as_str().unwrap().starts_with("sha256:"));
    assert_eq!(inspected["config"]["run"]["argv"][2], COUNTER);
    let directory = inspected["directory"].as_str().unwrap();
    assert!(Path::new(directory).join("snapshot/state").is_file());
    house.flyrun(&["snapshot", "rm", &id]).code(0);
    house.flyrun(&["snapshot", "inspect", &id]).code(125).complains_about("flyrun snapshot ls");
}

#[test]
fn snapshots_are_carried_to_other_hosts() {
    let here = Flyrun::fresh();
    let mut house = House(&here, vec![]);
    house.start("traveller", &["--network", "none"], WAITER);
    house.flyrun(&["snapshot", "create", "--name", "trip", "traveller"]).code(0);
    let files = scratch();
    let file = files.path().join("trip.snapshot");
    let path = file.to_str().unwrap();
    house.flyrun(&["snapshot", "export", "trip", "-o", path]).code(0);
    let size = file.metadata().unwrap().len();
    assert!(size < 40 << 20, "{size} bytes");
    let piped = house.flyrun(&["snapshot", "export", "--without-rootfs", "trip"]).code(0).stdout;
    assert!((piped.len() as u64) < size);

    // One that has nothing, and one that has unpacked the image itself: both go on with the root filesystem that came along.
    for has_image in [false, true] {
        let other = Flyrun::fresh();
        let there = House(&other, vec![]);
        if has_image {
            other.run(&["--network", "none", &busybox(), "true"]).end().code(0);
        }
        let before = other.contents();
        other.command(&["snapshot", "import"]).stdin(piped.clone()).end().fails_clearly();
        assert_eq!(other.contents(), before);
        there.flyrun(&["snapshot", "import", path]).code(0);
        let ended = there.flyrun(&["run", "--rm", "--from-snapshot", "trip"]).code(7).prints("woke up");
        assert_eq!(ended.errors(), "elsewhere\n");
        // The same once more needs no root filesystem.
        other.command(&["snapshot", "import", "--name", "second"]).stdin(piped.clone()).end().code(0);
        there.flyrun(&["prune", "--all"]).code(0);
        there.flyrun(&["run", "--rm", "--from-snapshot", "second"]).code(7).prints("woke up");
    }

    // Back again where it came from.
    house.flyrun(&["snapshot", "rm", "trip"]).code(0);
    house.flyrun(&["snapshot", "import", path]).code(0);
    house.flyrun(&["run", "--rm", "--from-snapshot", "trip"]).code(7).prints("woke up");

    let bytes = std::fs::read(&file).unwrap();
    let before = here.contents();
    let mut flipped = bytes.clone();
    flipped[bytes.len() / 2] ^= 4;
    for damaged in [&bytes[..bytes.len() / 2], &bytes[..bytes.len() - 3], &flipped, b"nonsense", b""] {
        here.command(&["snapshot", "import", "--name", "bad"]).stdin(damaged).end().fails_clearly();
        assert_eq!(here.contents(), before);
    }
    house.flyrun(&["snapshot", "import", path]).fails_clearly().complains_about("the name 'trip'");
    assert_eq!(here.contents(), before);
}

#[test]
fn snapshots_that_cannot_be_gone_on_from_are_booted_from_their_disk() {
    let mut house = House(Flyrun::shared(), vec![]);
    house.start("damaged-model", &["--network", "none"], COUNTER);
    house.exec("damaged-model", "echo kept > /file");
    house.flyrun(&["snapshot", "create", "--name", "damaged", "damaged-model"]).code(0);
    let inspected = house.flyrun(&["snapshot", "inspect", "damaged"]).code(0).json()[0].clone();
    let state = Path::new(inspected["directory"].as_str().unwrap()).join("snapshot/state");
    let mut bytes = std::fs::read(&state).unwrap();
    let end = bytes.len() - 100;
    bytes[end] ^= 1;
    std::fs::write(&state, bytes).unwrap();
    house.go_on("damaged-1", "damaged", &[]);
    let last_start = house.inspect("damaged-1")["last_start"].clone();
    assert_eq!(last_start["kind"], "cold_boot");
    assert!(last_start["reason"].as_str().unwrap().contains("corrupted"), "{last_start}");
    assert_eq!(house.counts_on("damaged-1"), 1);
    assert_eq!(house.exec("damaged-1", "cat /file"), "kept");
    house.flyrun(&["snapshot", "rm", "damaged"]).code(0);
}

/// The process that owns a machine in the background.
fn monitor_of(id: &str) -> Pid {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let is_monitor = |line: &[u8]| {
        let words: Vec<_> = line.split(|byte| *byte == 0).collect();
        words.contains(&&b"monitor"[..]) && words.contains(&id.as_bytes())
    };
    let mut pids = entries.filter_map(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        is_monitor(&line).then(|| entry.file_name().to_str()?.parse().ok())?
    });
    Pid::from_raw(pids.next().unwrap()).unwrap()
}

#[test]
fn snapshots_whose_taking_is_interrupted_are_whole_or_not_there() {
    let flyrun = Flyrun::fresh();
    let mut house = House(&flyrun, vec![]);
    house.start("busy", &["--network", "none"], COUNTER);
    for delay_ms in [0, 30, 100, 200, 400, 800] {
        let mut command = flyrun.command(&["snapshot", "create", "busy"]).build(&[]);
        let mut taking = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(delay_ms));
        let _ = taking.kill();
        taking.wait().unwrap();
        house.counts_on("busy");
        assert_eq!(house.inspect("busy")["state"], "started");
    }
    // A stop that comes in between gives the snapshot up, or comes behind it.
    let mut command = flyrun.command(&["snapshot", "create", "busy"]).build(&[]);
    let mut taking = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    house.flyrun(&["stop", "-t", "0", "busy"]).code(0);
    taking.wait().unwrap();
    assert_eq!(house.inspect("busy")["state"], "stopped");
    house.flyrun(&["snapshot", "create", "busy"]).code(125).complains_about("flyrun start");
    // With its monitor the machine ends, and what was being made of it goes.
    house.flyrun(&["start", "busy"]).code(0);
    house.wait_for_lines("busy", 1);
    let monitor = monitor_of(house.inspect("busy")["id"].as_str().unwrap());
    let mut command = flyrun.command(&["snapshot", "create", "busy"]).build(&[]);
    let mut taking = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    kill_process(monitor, Signal::KILL).unwrap();
    taking.wait().unwrap();
    for _ in 0..600 {
        // The VMM may be writing to its end.
        if house.inspect("busy")["state"] == "failed" {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    house.flyrun(&["prune"]).code(0);
    for entry in std::fs::read_dir(flyrun.root().join("snapshots")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(name == ".names" || !name.starts_with('.'), "{name} was left");
    }
    for listed in house.snapshots() {
        let id = listed["id"].as_str().unwrap();
        house.go_on(&format!("busy-{id}"), id, &[]);
        assert_eq!(house.inspect(&format!("busy-{id}"))["last_start"]["kind"], "resumed");
        house.counts_on(&format!("busy-{id}"));
    }
}

#[test]
fn snapshots_are_refused_of_what_cannot_be_in_two_machines() {
    let mut house = House(Flyrun::shared(), vec![]);
    house.start("writer", &["--network", "none", "-v", "written:/data"], COUNTER);
    house.flyrun(&["snapshot", "create", "writer"]).code(125).complains_about("'written'");
    house.flyrun(&["pause", "writer"]).code(0);
    house.flyrun(&["snapshot", "create", "writer"]).code(125).complains_about("flyrun unpause");
    house.flyrun(&["rm", "-f", "writer"]).code(0);
    house.flyrun(&["volume", "rm", "written"]).code(0);
}
