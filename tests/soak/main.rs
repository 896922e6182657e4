//! Kills what flyrun consists of (command, monitor, VMM) at random moments of random commands, and checks after each that
//! the next command finds out what is true and nothing has leaked. `make soak ROUNDS=300`; FLYRUN_SOAK_SEED repeats a run.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod hostile;
mod serve;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::process::{Pid, Signal, kill_process};
use tests::image::busybox;
use tests::{Flyrun, flyrun};

const MACHINES: u64 = 3;
/// How long the kernel and a monitor may take to clear away after a kill.
const SETTLE: Duration = Duration::from_secs(20);
/// How long a command may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(90);
/// In the directory of sockets: the text of base snapshots' kernels.
const KERNEL_TEXT: &str = "kernel-text";
/// Counts on standard output and in its volume, and says where each life begins.
const WORKLOAD: &str = "echo begin; i=0; while :; do i=$((i+1)); echo line $i; echo $i >> /data/count; [ $((i % 10)) = 0 ] && sync; sleep 0.02; done";

struct Random(u64);

impl Random {
    /// xorshift64: repeatable, and random enough to choose commands.
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// A process of ours, by what its command line says.
#[derive(Debug, Clone)]
struct Process {
    pid: i32,
    arguments: Vec<String>,
}

fn processes() -> Vec<Process> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let line = std::fs::read(entry.path().join("cmdline")).ok()?;
            let status = std::fs::read_to_string(entry.path().join("stat")).ok()?;
            let is_zombie = status.rsplit(')').next()?.trim_start().starts_with('Z');
            let arguments: Vec<_> = line
                .split(|&byte| byte == 0)
                .map(|part| String::from_utf8_lossy(part).into_owned())
                .collect();
            (!is_zombie).then_some(Process { pid, arguments })
        })
        .collect()
}

struct Soak {
    flyrun: Flyrun,
    image: String,
    random: Random,
    kills: [u32; 3],
}

impl Soak {
    fn root(&self) -> String {
        self.flyrun.root().display().to_string()
    }

    fn monitors(&self) -> Vec<Process> {
        let root = self.root();
        let ours = |process: &Process| {
            process.arguments.contains(&"monitor".to_string()) && process.arguments.contains(&root)
        };
        processes().into_iter().filter(ours).collect()
    }

    fn vmms(&self) -> Vec<Process> {
        let run = Path::new(&self.root()).parent().unwrap().join("run").display().to_string();
        let is_vmm = |process: &Process| {
            process.arguments.first().is_some_and(|name| name.ends_with("flyrun-vmm"))
                && process.arguments.iter().any(|argument| argument.starts_with(&run))
        };
        processes().into_iter().filter(is_vmm).collect()
    }

    fn spawn(&mut self) -> (String, Child) {
        let name = format!("m{}", self.random.below(MACHINES));
        let volume = format!("v{name}:/data");
        let image = self.image.clone();
        let halve = self.random.below(2) == 0;
        let other = format!("m{}", self.random.below(MACHINES));
        let run = [
            "run",
            "-d",
            "--name",
            &name,
            "-v",
            &volume,
            "-p",
            "80",
            "--cpus",
            "0.9",
            "--health-cmd",
            "true",
            "--health-interval",
            "200ms",
            "--stop-timeout",
            "1",
            &image,
            "sh",
            "-c",
            WORKLOAD,
        ];
        let words: Vec<&str> = match self.random.below(19) {
            0..4 => run.to_vec(),
            4 => vec!["start", &name],
            5 => vec!["stop", &name],
            6 => vec!["restart", &name],
            7 => vec!["kill", &name],
            8 => vec!["rm", "-f", &name],
            9 => {
                vec!["update", "--cpus", if halve { "0.5" } else { "1" }, "--restart", "on-failure:1", &name]
            }
            11 => vec!["pause", &name],
            12 => vec!["unpause", &name],
            13 | 14 => vec!["suspend", "--force", &name],
            15 => vec!["suspend", &name],
            16 | 17 => vec!["resume", &name],
            10 => vec!["rename", &name, &other],
            _ => vec!["exec", &name, "sync"],
        };
        let mut command = self.flyrun.command(&words).build(&[]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        (words.join(" "), command.spawn().unwrap())
    }

    /// Kills one of the three kinds of process that there are.
    fn kill_something(&mut self, command: &Child) -> &'static str {
        let kind = self.random.below(3) as usize;
        let candidates = match kind {
            0 => vec![command.id() as i32],
            1 => self.monitors().iter().map(|process| process.pid).collect(),
            _ => self.vmms().iter().map(|process| process.pid).collect(),
        };
        if candidates.is_empty() {
            return "nothing";
        }
        let chosen = candidates[self.random.below(candidates.len() as u64) as usize];
        if let Some(pid) = Pid::from_raw(chosen) {
            let _ = kill_process(pid, Signal::KILL);
        }
        self.kills[kind] += 1;
        ["the command", "a monitor", "a VMM"][kind]
    }

    /// Waits until a command has ended; one that does not is a mistake, and all is told that may explain it.
    fn wait_for(&self, command: &mut Child, told: &str) {
        let deadline = std::time::Instant::now() + COMMAND_LIMIT;
        while command.try_wait().unwrap().is_none() {
            if std::time::Instant::now() >= deadline {
                let listed = self.flyrun.command(&["ps", "-a"]).end();
                panic!("in {told}: the command does not end\n{}\n{}", listed.text(), threads());
            }
            sleep(Duration::from_millis(5));
        }
    }

    fn list(&self) -> Vec<(String, String)> {
        let mut listed = self.flyrun.command(&["ps", "-a", "--json"]).end().code(0);
        let listed = listed.json();
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_string();
        listed.as_array().unwrap().iter().map(|row| (text(&row["id"]), text(&row["state"]))).collect()
    }

    /// What `flyrun ps` says, against what there is: `None` when both agree.
    fn disagreement(&self) -> Option<String> {
        let listed = self.list();
        let monitors = self.monitors();
        let monitored =
            |id: &str| monitors.iter().any(|process| process.arguments.iter().any(|word| word == id));
        for (id, state) in &listed {
            let active =
                ["starting", "started", "paused", "suspending", "stopping"].contains(&state.as_str());
            if active != monitored(id) {
                return Some(format!("{id} is said to be {state}; a monitor lives: {}", monitored(id)));
            }
        }
        let known = |process: &Process| listed.iter().any(|(id, _)| process.arguments.contains(id));
        if let Some(stray) = monitors.iter().find(|process| !known(process)) {
            return Some(format!("a monitor without a machine: {stray:?}"));
        }
        if self.vmms().len() > monitors.len() {
            return Some(format!("{} VMMs of {} monitors", self.vmms().len(), monitors.len()));
        }
        let interfaces = interfaces();
        if interfaces > monitors.len() {
            return Some(format!("{interfaces} interfaces of {} monitors", monitors.len()));
        }
        for (what, count) in [("cgroups", cgroups()), ("open intervals of usage", self.open_usage())] {
            if count > monitors.len() {
                return Some(format!("{count} {what} of {} monitors", monitors.len()));
            }
        }
        // A machine on disk comes back, and finds the rules as they stood.
        let comes_back = listed.iter().any(|(_, state)| state == "suspended");
        if monitors.is_empty() && !comes_back && has_rules() {
            return Some("the host still has flyrun's rules".to_string());
        }
        None
    }

    fn settle(&self, told: &str) {
        let deadline = std::time::Instant::now() + SETTLE;
        while let Some(disagreement) = self.disagreement() {
            assert!(std::time::Instant::now() < deadline, "after {told}: {disagreement}");
            sleep(Duration::from_millis(200));
        }
    }

    /// Each life's lines are there without a gap.
    fn check_logs(&self) {
        for (id, _) in self.list() {
            let log = self.flyrun.command(&["logs", &id]).end().code(0).text();
            let mut last = 0;
            for line in log.lines() {
                match line.strip_prefix("line ").map(|number| number.parse::<u64>().unwrap()) {
                    None => last = 0,
                    Some(number) => {
                        assert_eq!(number, last + 1, "a line of {id} is lost");
                        last = number;
                    }
                }
            }
        }
    }

    fn open_usage(&self) -> usize {
        std::fs::read_dir(self.flyrun.root().join("usage/open")).into_iter().flatten().count()
    }

    /// No second of a machine is written down twice, and no record is damaged.
    fn check_usage(&self) {
        self.flyrun.command(&["usage"]).end().code(0);
        let mut intervals = Vec::new();
        for month in std::fs::read_dir(self.flyrun.root().join("usage")).unwrap().flatten() {
            if month.path().extension().is_some_and(|kind| kind == "jsonl") {
                for line in std::fs::read_to_string(month.path()).unwrap().lines() {
                    let interval: serde_json::Value = serde_json::from_str(line).unwrap();
                    let at = |name: &str| interval[name].as_u64().unwrap();
                    let machine = interval["machine"].as_str().unwrap().to_string();
                    intervals.push((machine, at("from_ms"), at("to_ms")));
                }
            }
        }
        intervals.sort();
        // The same interval twice is one that was closed by an owner who died before it could say so.
        intervals.dedup_by_key(|(machine, from, _)| (machine.clone(), *from));
        assert!(!intervals.is_empty());
        for pair in intervals.windows(2) {
            let [(machine, from, to), (next, next_from, _)] = pair else { unreachable!() };
            assert!(from <= to && (machine != next || to <= next_from), "{pair:?}");
        }
    }

    /// Lets each guest repair its volume as after a power cut, and then has e2fsck look at it.
    fn check_volumes(&self) {
        let mut listed = self.flyrun.command(&["volume", "ls", "--json"]).end().code(0);
        for volume in listed.json().as_array().unwrap() {
            let name = volume["name"].as_str().unwrap();
            let mount = format!("{name}:/data");
            self.flyrun.run(&["-v", &mount, &self.image, "true"]).end().code(0);
            let data = PathBuf::from(volume["directory"].as_str().unwrap()).join("data.ext4");
            let checked = Command::new("e2fsck").args(["-f", "-n"]).arg(&data).output().unwrap();
            assert!(checked.status.success(), "{name}: {}", String::from_utf8_lossy(&checked.stdout));
        }
    }
}

fn interfaces() -> usize {
    let entries = std::fs::read_dir("/sys/class/net").unwrap().flatten();
    entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("fly")).count()
}

fn cgroups() -> usize {
    let entries = std::fs::read_dir("/sys/fs/cgroup/flyrun").into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).count()
}

/// What each thread of flyrun's is waiting for.
fn threads() -> String {
    let mut text = String::new();
    for process in entries(Path::new("/proc")) {
        let process = Path::new("/proc").join(process);
        let line = std::fs::read_to_string(process.join("cmdline")).unwrap_or_default().replace('\0', " ");
        if !line.contains("flyrun") {
            continue;
        }
        text.push_str(&format!("{}: {line}\n", process.display()));
        for thread in entries(&process.join("task")) {
            let read = |name: &str| {
                let path = process.join("task").join(&thread).join(name);
                std::fs::read_to_string(path).unwrap_or_default().trim().to_string()
            };
            text.push_str(&format!("    {} {} {}\n", read("comm"), read("wchan"), read("syscall")));
        }
    }
    text
}

fn has_rules() -> bool {
    Command::new("nft").args(["list", "table", "inet", "flyrun"]).output().unwrap().status.success()
}

/// KiB of a process's share of memory, but for `guest` bytes in neighbouring mappings: a guest's memory.
fn memory_kib(pid: i32, guest: u64) -> u64 {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut mappings: Vec<(u64, u64, u64)> = Vec::new();
    for line in smaps.lines() {
        if let Some(pss) = line.strip_prefix("Pss:") {
            mappings.last_mut().unwrap().2 = pss.trim().trim_end_matches(" kB").parse().unwrap();
        } else if let Some((start, end)) = line.split(' ').next().unwrap().split_once('-') {
            let address = |text| u64::from_str_radix(text, 16).unwrap();
            mappings.push((address(start), address(end), 0));
        }
    }
    let all: u64 = mappings.iter().map(|mapping| mapping.2).sum();
    for (first, mapping) in mappings.iter().enumerate() {
        let mut end = mapping.0;
        let mut within = 0;
        for next in mappings[first..].iter().take_while(|next| next.1 - mapping.0 <= guest) {
            if next.0 != end {
                break;
            }
            end = next.1;
            within += next.2;
            if end - mapping.0 == guest {
                return all - within;
            }
        }
    }
    all
}

#[test]
fn fifty_machines_at_once() {
    const COUNT: usize = 50;
    // Not 64: as much address space belongs to each of glibc's arenas, which would be taken for the guest's.
    const MEMORY_MIB: u64 = 72;
    let soak = Soak { flyrun: Flyrun::fresh(), image: busybox(), random: Random(1), kills: [0; 3] };
    let memory = format!("{MEMORY_MIB}m");
    for number in 0..COUNT {
        let name = format!("n{number}");
        let words = ["run", "-d", "--name", &name, "--memory", &memory, &soak.image, "sleep", "100000"];
        soak.flyrun.command(&words).end().code(0);
    }
    let listed = soak.list();
    assert_eq!(listed.len(), COUNT);
    assert!(listed.iter().all(|(_, state)| state == "started"), "{listed:?}");
    let told = soak.flyrun.command(&["exec", "n49", "hostname"]).end().code(0).text();
    assert_eq!(told.len(), 14, "{told}");
    let (vmms, monitors) = (soak.vmms(), soak.monitors());
    assert_eq!((vmms.len(), monitors.len()), (COUNT, COUNT));
    let share = |processes: &[Process]| {
        processes.iter().map(|process| memory_kib(process.pid, MEMORY_MIB << 20)).sum::<u64>() / COUNT as u64
    };
    println!(
        "{COUNT} machines of {MEMORY_MIB} MiB: beyond the guest's memory each takes {} KiB for its VMM, {} KiB for its monitor",
        share(&vmms),
        share(&monitors)
    );
    let names: Vec<_> = (0..COUNT).map(|number| format!("n{number}")).collect();
    let all = |first: &[&'static str]| {
        first.iter().map(|word| word.to_string()).chain(names.clone()).collect::<Vec<_>>()
    };
    let run = |words: Vec<String>| {
        soak.flyrun.command(&words.iter().map(String::as_str).collect::<Vec<_>>()).end().code(0);
    };
    run(all(&["stop", "-t", "0"]));
    assert!(soak.list().iter().all(|(_, state)| state == "stopped"));
    run(all(&["rm"]));
    soak.settle("removing fifty machines");
    assert!(soak.list().is_empty());
}

/// What is left where sockets are, but for the text of base snapshots' kernels, which the next machine has too.
fn left_in_run_dir(flyrun: &Flyrun) -> Vec<String> {
    let run = flyrun.run_dir();
    let (texts, bases) = (entries(&run.join(KERNEL_TEXT)), entries(&flyrun.root().join("bases")));
    assert!(texts.len() <= bases.len(), "{texts:?} of {bases:?}");
    entries(&run).into_iter().filter(|name| name != KERNEL_TEXT).collect()
}

fn entries(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn services_live_through_a_hundred_suspends_and_clones() {
    let cycles = setting("FLYRUN_SOAK_CYCLES", 100);
    tests::resident::survives(&Flyrun::fresh(), usize::try_from(cycles).unwrap(), 10);
}

#[test]
fn two_hundred_clones_of_one_machine() {
    let count = setting("FLYRUN_SOAK_CLONES", 200);
    tests::clones::are_somebody_each(&Flyrun::fresh(), usize::try_from(count).unwrap());
}

#[test]
fn kills_at_random_moments_leave_nothing_wrong() {
    assert!(flyrun::program().exists());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let (rounds, seed) = (setting("FLYRUN_SOAK_ROUNDS", 300), setting("FLYRUN_SOAK_SEED", now));
    println!("{rounds} rounds, FLYRUN_SOAK_SEED={seed}");
    let mut soak =
        Soak { flyrun: Flyrun::fresh(), image: busybox(), random: Random(seed | 1), kills: [0; 3] };
    soak.flyrun.command(&["run", "--rm", &soak.image, "true"]).end().code(0);
    for round in 1..=rounds {
        let (words, mut command) = soak.spawn();
        let pause = soak.random.below(900);
        sleep(Duration::from_millis(pause));
        let killed = soak.kill_something(&command);
        let told = format!("round {round}: `flyrun {words}`, {killed} killed after {pause} ms");
        soak.wait_for(&mut command, &told);
        soak.settle(&told);
        if round % 25 == 0 {
            soak.check_logs();
            soak.check_usage();
            println!("{told}; commands, monitors, VMMs killed so far: {:?}", soak.kills);
        }
    }
    soak.check_logs();
    let names: BTreeSet<_> = soak.list().into_iter().map(|(id, _)| id).collect();
    for name in &names {
        soak.flyrun.command(&["rm", "-f", name]).end().code(0);
    }
    soak.settle("removing all machines");
    soak.check_volumes();
    soak.check_usage();
    assert!(soak.list().is_empty() && soak.monitors().is_empty() && soak.vmms().is_empty());
    assert_eq!((interfaces(), soak.open_usage()), (0, 0));
    assert!(!Path::new("/sys/fs/cgroup/flyrun").exists(), "a cgroup is left");
    assert!(!has_rules(), "the host still has flyrun's rules");
    assert_eq!(left_in_run_dir(&soak.flyrun), Vec::<String>::new(), "sockets are left");
    println!("{rounds} rounds; commands, monitors, VMMs killed: {:?}", soak.kills);
}
