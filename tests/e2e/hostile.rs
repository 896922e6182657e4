//! A machine whose kernel is tests/attacker, and what its VMM may cost the host.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use serde_json::json;
use tempfile::TempDir;

use crate::flyrun::{program, scratch};

/// The guest's memory: what tests/attacker/src/memory.rs says.
const MEMORY_MIB: u64 = 64;
/// Beside the guest's memory: what vsock may buffer of data that nobody reads (`SHARED_BYTES` and the small allocations of all
/// other connections), and the VMM itself.
const BESIDE_MIB: u64 = 48 + 16;
/// As many connections as vsock has at most, and some descriptors of queues that come and go.
const MORE_FDS: usize = 1024 + 32;
/// All that a VMM may say about a guest that does its worst.
const STDERR_BYTES: u64 = 4096;
/// A console's file, with one write more than its limit.
const CONSOLE_BYTES: u64 = (1 << 20) + 4096;
const DISK_BYTES: u64 = 24 << 20;
const READ_ONLY_BYTES: u64 = 1 << 20;
/// The attack on the disk has good requests too, and they end before this offset or lie in the last sector.
const UNTOUCHED: std::ops::Range<u64> = 9 << 20..DISK_BYTES - 4096;
const PATTERN: u8 = 0xa5;

/// An attack that takes longer hangs, whatever the machine is busy with: normal are a few seconds.
const HANG: Duration = Duration::from_secs(100);

/// The attacks that one processor is enough for.
pub const ATTACKS: [&str; 14] = [
    "blocks",
    "registers",
    "resets",
    "rings",
    "chains",
    "available",
    "endless",
    "balloon",
    "frames",
    "flood",
    "overrun",
    "connections",
    "ports",
    "exits",
];

/// A machine that attacks.
#[derive(Clone, Debug)]
pub struct Attack<'a> {
    /// Names of attacks, in order.
    pub names: &'a [&'a str],
    /// What its random numbers begin with.
    pub seed: u64,
    /// Rounds, in percent of the normal number.
    pub percent: u32,
    /// vCPUs: 1 or 2.
    pub cpus: u8,
    /// `vhost` or `user`.
    pub net: &'a str,
    /// Whether the console is a file. Then the guest waits for nobody, and only its end is looked at.
    pub console_file: bool,
}

struct Machine {
    vmm: Child,
    output: Receiver<String>,
    dir: TempDir,
    tap: String,
    fds: usize,
    threads: usize,
}

/// The kernel, which `make e2e` has built.
pub fn kernel() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let built = root.join("target/attacker/x86_64-unknown-linux-gnu/release/attacker");
    assert!(built.is_file(), "{} is missing: run tests/attacker/build", built.display());
    built
}

impl Attack<'_> {
    /// Runs all of it and checks the VMM after each attack. Panics with the guest's console at whatever is wrong.
    pub fn run(&self) {
        let mut machine = Machine::start(self);
        let mut told = Vec::new();
        let mut done = 0;
        while let Some(line) = machine.line() {
            println!("{}: {line}", machine.tap);
            told.push(line.clone());
            let words: Vec<_> = line.split(' ').collect();
            let wrong = match words.as_slice() {
                ["attacker:", "over"] => {
                    machine.go_on();
                    None
                }
                ["attacker:", count, "devices,", ..] => {
                    (machine.fds, machine.threads) = (machine.count("fd"), machine.count("task"));
                    (*count != "6").then(|| "it does not see its six devices".to_owned())
                }
                ["did", name, _] => {
                    done += 1;
                    let wrong = machine.check(name);
                    machine.go_on();
                    wrong
                }
                ["canaries", "live"] => None,
                ["sane", "block", "block", "net", "vsock", "rng", "balloon"] => None,
                _ => Some("that is not what it should say".to_owned()),
            };
            if let Some(wrong) = wrong {
                panic!("{wrong}\n{self:?}\n{}", told.join("\n"));
            }
        }
        let status = machine.vmm.wait().unwrap();
        let errors = std::fs::read_to_string(machine.path("stderr")).unwrap();
        let expected = if self.console_file { 0 } else { self.names.len() };
        assert_eq!(
            (status.code(), errors.as_str(), done),
            (Some(0), "", expected),
            "{status}\n{self:?}\n{}",
            told.join("\n")
        );
        machine.check_files();
    }
}

impl Machine {
    fn start(attack: &Attack<'_>) -> Machine {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        static LIMIT: LazyLock<()> = LazyLock::new(many_descriptors);
        LazyLock::force(&LIMIT);
        let dir = scratch();
        let path = |name: &str| dir.path().join(name);
        write_pattern(&path("disk"), DISK_BYTES);
        write_pattern(&path("read-only"), READ_ONLY_BYTES);
        listen(&path("vsock_1000"), echo);
        listen(&path("vsock_1001"), keep);
        if attack.console_file {
            std::fs::write(path("console"), "from another life\n".repeat(57_000)).unwrap();
        }
        let tap = format!("hg{}-{}", std::process::id() % 100_000, COUNT.fetch_add(1, Ordering::Relaxed));
        for words in [&["tuntap", "add", "dev", &tap, "mode", "tap"][..], &["link", "set", &tap, "up"]] {
            assert!(Command::new("ip").args(words).status().unwrap().success(), "ip {words:?}");
        }
        let words: Vec<_> = attack.names.iter().map(|name| format!("attack={name}")).collect();
        let Attack { seed, percent, cpus, console_file, .. } = attack;
        let console = match console_file {
            true => json!({ "file": path("console") }),
            false => json!("stdio"),
        };
        let spec = json!({
            "cpus": cpus,
            "memory_mib": MEMORY_MIB,
            "kernel": kernel(),
            "command_line": format!("seed={seed} rounds={percent} cpus={cpus} alone={} {}", u8::from(*console_file), words.join(" ")),
            "disks": [{ "files": [path("disk")] }, { "files": [path("read-only")], "read_only": true }],
            "nets": [{ "tap": tap, "mac": [2, 0, 0, 0, 0, 1], "backend": attack.net }],
            "vsock": { "guest_cid": 3, "socket": path("vsock") },
            "console": console,
            "balloon": true,
        });
        std::fs::write(path("spec"), spec.to_string()).unwrap();
        let mut vmm = Command::new(program().with_file_name("../lib/flyrun/flyrun-vmm"))
            .arg("--spec")
            .arg(path("spec"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(path("stderr")).unwrap())
            .spawn()
            .unwrap();
        let output = lines(vmm.stdout.take().unwrap());
        Machine { vmm, output, dir, tap, fds: 0, threads: 0 }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn proc(&self, name: &str) -> PathBuf {
        format!("/proc/{}/{name}", self.vmm.id()).into()
    }

    fn count(&self, directory: &str) -> usize {
        std::fs::read_dir(self.proc(directory)).unwrap().count()
    }

    /// The guest's next line; `None` at its end.
    fn line(&mut self) -> Option<String> {
        match self.output.recv_timeout(HANG) {
            Ok(line) => Some(line),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("nothing comes any more\n{}", self.threads_told()),
        }
    }

    /// What each thread of the VMM does.
    fn threads_told(&self) -> String {
        let mut text = String::new();
        for _ in 0..3 {
            for task in std::fs::read_dir(self.proc("task")).unwrap().flatten() {
                for name in ["stat", "wchan", "syscall", "stack"] {
                    let told = std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
                    text += &format!("{name}: {}\n", told.trim());
                }
            }
            thread::sleep(Duration::from_secs(1));
        }
        text
    }

    fn go_on(&mut self) {
        // A VMM that is gone is found by its exit code.
        let _gone = self.vmm.stdin.as_mut().unwrap().write_all(b"\n");
    }

    /// What is wrong with the VMM after an attack, whose devices are as it has left them.
    fn check(&self, attack: &str) -> Option<String> {
        let (before, spent_before) = self.ticks();
        thread::sleep(Duration::from_millis(400));
        let (after, spent_after) = self.ticks();
        let (vcpus, others) = (after - before, spent_after - spent_before);
        // The guest polls its serial port all the time. A thread that turns round for nothing has as much as a vCPU.
        if others > 8 + vcpus / 4 {
            return Some(format!(
                "devices spend {others} ticks while vCPUs spend {vcpus}: nothing was asked of them\n{}",
                self.threads_told()
            ));
        }
        let peak = self.peak_mib();
        if peak > MEMORY_MIB + BESIDE_MIB {
            return Some(format!("VmHWM is {peak} MiB, and {MEMORY_MIB} of it are the guest's"));
        }
        let (fds, threads) = (self.count("fd"), self.count("task"));
        // vhost's thread comes and goes with the network's driver.
        if fds > self.fds + MORE_FDS || threads > self.threads + 2 {
            return Some(format!(
                "{fds} descriptors and {threads} threads, at first {} and {}",
                self.fds, self.threads
            ));
        }
        println!("{}: {peak} MiB, {fds} descriptors, {threads} threads", self.tap);
        let said = std::fs::metadata(self.path("stderr")).unwrap().len();
        if said > STDERR_BYTES {
            return Some(format!("{said} bytes on standard error"));
        }
        (attack == "blocks").then(|| self.touched()).flatten()
    }

    /// Clock ticks of the vCPUs' threads, and of the others. vhost's worker is neither: a thread of the host's kernel that is in the
    /// machine's cgroup, it tries again for ever what a guest has made impossible to send, at the guest's expense.
    fn ticks(&self) -> (u64, u64) {
        let (mut vcpus, mut others) = (0, 0);
        for task in std::fs::read_dir(self.proc("task")).unwrap().flatten() {
            // A thread may just have ended.
            let Ok(stat) = std::fs::read_to_string(task.path().join("stat")) else { continue };
            let (name, rest) = stat.rsplit_once(')').unwrap();
            let fields: Vec<_> = rest.split_whitespace().collect();
            let ticks = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
            if name.contains("(vhost-") {
                continue;
            }
            *if name.contains("(vcpu") { &mut vcpus } else { &mut others } += ticks;
        }
        (vcpus, others)
    }

    fn peak_mib(&self) -> u64 {
        let status = std::fs::read_to_string(self.proc("status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
    }

    /// The first byte of the disk that requests outside of it, or good ones, must not have reached.
    fn touched(&self) -> Option<String> {
        let file = File::open(self.path("disk")).unwrap();
        let mut bytes = vec![0; (UNTOUCHED.end - UNTOUCHED.start) as usize];
        file.read_exact_at(&mut bytes, UNTOUCHED.start).unwrap();
        let at = bytes.iter().position(|byte| *byte != PATTERN)?;
        Some(format!("the disk has changed at {:#x}", UNTOUCHED.start + at as u64))
    }

    fn check_files(&self) {
        assert_eq!(std::fs::metadata(self.path("disk")).unwrap().len(), DISK_BYTES, "the disk's size");
        let read_only = std::fs::read(self.path("read-only")).unwrap();
        assert_eq!(read_only.len() as u64, READ_ONLY_BYTES, "the read-only disk's size");
        assert!(read_only.iter().all(|byte| *byte == PATTERN), "the read-only disk has changed");
        if let Ok(console) = std::fs::read_to_string(self.path("console")) {
            assert!(console.len() as u64 <= CONSOLE_BYTES, "the console's file has {} bytes", console.len());
            assert!(console.starts_with("[flyrun-vmm: what came before is gone"), "{}", &console[..80]);
            assert!(console.ends_with("attacker: over\n"), "the console's end is missing");
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _gone = self.vmm.kill();
        let _gone = self.vmm.wait();
        let _gone = Command::new("ip").args(["link", "delete", &self.tap]).status();
    }
}

/// The VMM may have a connection of vsock for each that is possible, and so may this process at their other ends.
fn many_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let now = getrlimit(Resource::Nofile);
    let wanted = now.maximum.map_or(8192, |most| most.min(8192));
    let wanted = Rlimit { current: Some(wanted), ..now };
    setrlimit(Resource::Nofile, wanted).unwrap();
}

fn lines(stdout: ChildStdout) -> Receiver<String> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let lines = BufReader::new(stdout).split(b'\n').map_while(Result::ok);
        // What comes behind a test that has failed is nobody's.
        lines.for_each(|line| _ = sender.send(String::from_utf8_lossy(&line).trim_end().to_owned()));
    });
    receiver
}

fn write_pattern(path: &Path, bytes: u64) {
    let file = File::create(path).unwrap();
    let block = vec![PATTERN; 1 << 20];
    (0..bytes >> 20).for_each(|mib| file.write_all_at(&block, mib << 20).unwrap());
}

fn listen(path: &Path, serve: fn(UnixStream)) {
    let listener = UnixListener::bind(path).unwrap();
    // It ends with the test's process, as nobody asks it to.
    thread::spawn(move || listener.incoming().flatten().for_each(serve));
}

fn echo(mut stream: UnixStream) {
    thread::Builder::new()
        .stack_size(64 << 10)
        .spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(length @ 1..) = stream.read(&mut bytes) {
                if stream.write_all(&bytes[..length]).is_err() {
                    return;
                }
            }
        })
        .unwrap();
}

/// Takes the connection and never reads. It stays open for as long as its peer's end does.
fn keep(stream: UnixStream) {
    thread::Builder::new()
        .stack_size(64 << 10)
        .spawn(move || {
            use rustix::event::{PollFd, PollFlags, poll};
            // Without asked events, only the end is told.
            let _end = poll(&mut [PollFd::new(&stream, PollFlags::empty())], None);
        })
        .unwrap();
}
