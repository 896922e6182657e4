//! What one tenant's attack costs another: the same work beside a neighbour that only computes, and beside one that attacks.
//!
//! There is one CPU, and each machine has an equal share of it (`--cpu-shares`): beside whoever wants all that he gets, work takes twice as
//! long as alone, by design. An attack succeeds as far as it takes more than that: in time of the host's kernel, of vhost's threads, of
//! the host's processes that serve the machine. So the figure is the time beside the attacker by that beside an honest neighbour.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::{report::Report, run::milliseconds};

/// What an attack may cost at most: 10 % beyond a neighbour that just computes.
pub const PROMISED: f64 = 1.10;
/// `--cpu-shares` of both, and the weight that flyrun makes of it.
const SHARES: &str = "1024";
const WEIGHT: &str = "39";
/// Rounds of a shell's loop: some tenths of a second alone.
const LOOP: u32 = 20_000;
/// Lines that are sent to the machine and come back.
const ECHOES: u32 = 100;
/// Attacks of tests/attacker, with the backend of the network each.
const ATTACKS: [(&str, &str); 7] = [
    ("exits", "vhost"),
    ("registers", "vhost"),
    ("blocks", "vhost"),
    ("frames", "vhost"),
    ("frames", "user"),
    ("flood", "vhost"),
    ("connections", "vhost"),
];
/// Those that any workload can make with its own hands.
const WORKLOADS: [(&str, &str); 2] = [
    ("output", "while :; do echo 0123456789012345678901234567890123456789; done"),
    ("files", "while :; do echo x > /file; cat /file > /dev/null; done"),
];

/// Computes as many rounds as each line says, and answers with a line.
const VICTIM: &str =
    "echo ready; while read n; do i=0; while [ $i -lt $n ]; do i=$((i+1)); done; echo done; done";
const HONEST: &str = "while :; do :; done";

/// What is measured with.
#[derive(Debug)]
pub struct Scene<'a> {
    pub library: &'a Path,
    pub flyrun: &'a Path,
    pub image: &'a str,
    /// The kernel of tests/attacker.
    pub attacker: &'a Path,
}

impl Scene<'_> {
    /// tenants.alone and tenants.fair, how long the work takes; tenants.slowdown of each attack, and of the worst, which it gives.
    pub fn measure(&self, report: &mut Report) -> Result<f64> {
        eprintln!("bench: tenants: starts the victim");
        let mut victim = Victim::start(&mut self.run(&["--rm", "-i"], VICTIM))?;
        eprintln!("bench: tenants: the victim alone");
        victim.work()?.add("tenants.alone", report);
        eprintln!("bench: tenants: beside an honest neighbour");
        let honest = Neighbour::start(self, HONEST)?;
        let fair = victim.work()?;
        drop(honest);
        fair.add("tenants.fair", report);
        let mut worst: f64 = 0.0;
        let mut judge = |name: &str, work: Work, report: &mut Report| {
            let (compute, echo) = work.beside(fair);
            report.add(format!("tenants.slowdown.{name}"), "ratio", &[compute]);
            report.add(format!("tenants.slowdown.{name}.echo"), "ratio", &[echo]);
            worst = worst.max(compute).max(echo);
        };
        for (name, script) in WORKLOADS {
            eprintln!("bench: tenants: beside {name}");
            let attack = Neighbour::start(self, script)?;
            judge(name, victim.work()?, report);
            drop(attack);
        }
        for (name, net) in ATTACKS {
            eprintln!("bench: tenants: beside {name} ({net})");
            let attack = Attack::start(self, name, net).with_context(|| format!("the attack {name}"))?;
            judge(&format!("{name}.{net}"), victim.work()?, report);
            attack.end()?;
        }
        report.add("tenants.slowdown", "ratio", &[worst]);
        Ok(worst)
    }

    fn run(&self, flags: &[&str], script: &str) -> Command {
        let mut command = Command::new(self.flyrun);
        command.arg("run").args(flags).args(["--network", "none", "--cpu-shares", SHARES]);
        command.args([self.image, "sh", "-c", script]);
        command
    }
}

/// How long the victim took.
#[derive(Clone, Copy, Debug)]
struct Work {
    /// For what needs the CPU all the time.
    compute: Duration,
    /// For what waits most of the time, and wants to be quick when its turn comes.
    echo: Duration,
}

impl Work {
    fn add(self, name: &str, report: &mut Report) {
        report.add(format!("{name}.compute"), "ms_virtual", &[milliseconds(self.compute)]);
        report.add(format!("{name}.echo"), "ms_virtual", &[milliseconds(self.echo) / f64::from(ECHOES)]);
    }

    fn beside(self, fair: Work) -> (f64, f64) {
        let ratio = |ours: Duration, fair: Duration| ours.as_secs_f64() / fair.as_secs_f64();
        (ratio(self.compute, fair.compute), ratio(self.echo, fair.echo))
    }
}

/// The machine that does the work.
struct Victim {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Victim {
    fn start(command: &mut Command) -> Result<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("flyrun has no streams")
        };
        let mut victim = Self { child, input, output: BufReader::new(output) };
        victim.expect("ready")?;
        Ok(victim)
    }

    fn expect(&mut self, word: &str) -> Result<()> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        anyhow::ensure!(line.trim_end() == word, "the machine says {line:?} instead of {word:?}");
        Ok(())
    }

    fn ask(&mut self, rounds: u32) -> Result<()> {
        writeln!(self.input, "{rounds}")?;
        self.expect("done")
    }

    fn work(&mut self) -> Result<Work> {
        // What has just started is past its first moments then.
        self.ask(LOOP / 10)?;
        let began = Instant::now();
        self.ask(LOOP)?;
        let compute = began.elapsed();
        let began = Instant::now();
        for _ in 0..ECHOES {
            self.ask(0)?;
        }
        Ok(Work { compute, echo: began.elapsed() })
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// A machine of somebody else's, in the background as such machines are.
struct Neighbour<'a>(&'a Path);

/// Its name.
const NEIGHBOUR: &str = "neighbour";

impl<'a> Neighbour<'a> {
    fn start(scene: &'a Scene<'_>, script: &str) -> Result<Self> {
        let mut command = scene.run(&["-d", "--name", NEIGHBOUR], script);
        let status = command.stdout(Stdio::null()).status()?;
        anyhow::ensure!(status.success(), "flyrun run -d ended with {status}");
        Ok(Self(scene.flyrun))
    }
}

impl Drop for Neighbour<'_> {
    fn drop(&mut self) {
        let _gone = Command::new(self.0).args(["rm", "-f", NEIGHBOUR]).stdout(Stdio::null()).status();
    }
}

/// A machine whose kernel attacks its VMM, in a cgroup like the victim's, without end. Whoever answers it is in there too, as a machine's
/// monitor is.
struct Attack {
    vmm: Child,
    listener: Child,
    cgroup: PathBuf,
    tap: String,
    _directory: tempfile::TempDir,
}

impl Attack {
    fn start(scene: &Scene<'_>, name: &str, net: &str) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let path = |name: &str| directory.path().join(name);
        for (disk, bytes) in [("disk", 24 << 20), ("read-only", 1 << 20)] {
            fs::File::create(path(disk))?.set_len(bytes)?;
        }
        let cgroup = PathBuf::from("/sys/fs/cgroup/flyrun/attack");
        fs::create_dir_all(&cgroup).with_context(|| format!("cannot make {}", cgroup.display()))?;
        fs::write(cgroup.join("cpu.weight"), WEIGHT)?;
        let listener = listen(&path("vsock_1000"), &cgroup)?;
        let tap = "attack0".to_owned();
        for words in [&["tuntap", "add", "dev", &tap, "mode", "tap"][..], &["link", "set", &tap, "up"]] {
            let status = Command::new("ip").args(words).status()?;
            anyhow::ensure!(status.success(), "ip {words:?} ended with {status}");
        }
        let spec = json!({
            "cpus": 1,
            "memory_mib": 64,
            "kernel": scene.attacker,
            "command_line": format!("seed=1 rounds=100000000 cpus=1 alone=1 attack={name}"),
            "disks": [{ "files": [path("disk")] }, { "files": [path("read-only")], "read_only": true }],
            "nets": [{ "tap": tap, "mac": [2, 0, 0, 0, 0, 1], "backend": net }],
            "vsock": { "guest_cid": 3, "socket": path("vsock") },
            "console": "stdio",
            "balloon": true,
        });
        fs::write(path("spec"), spec.to_string())?;
        let mut vmm = Command::new(scene.library.join("flyrun-vmm"))
            .arg("--spec")
            .arg(path("spec"))
            .arg("--cgroup")
            .arg(&cgroup)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let output = vmm.stdout.take().context("it has no standard output")?;
        let attack = Self { vmm, listener, cgroup, tap, _directory: directory };
        // It has found its devices, and all of them work.
        let sane =
            BufReader::new(output).lines().map_while(Result::ok).find(|line| line.starts_with("sane "));
        anyhow::ensure!(sane.is_some(), "it ended before it began");
        Ok(attack)
    }

    /// It must be under way to the end.
    fn end(mut self) -> Result<()> {
        anyhow::ensure!(self.vmm.try_wait()?.is_none(), "it was over before the victim's work was");
        Ok(())
    }
}

impl Drop for Attack {
    fn drop(&mut self) {
        end(&mut self.vmm);
        end(&mut self.listener);
        let _gone = Command::new("ip").args(["link", "delete", &self.tap]).status();
        let _gone = fs::remove_dir(&self.cgroup);
    }
}

fn end(child: &mut Child) {
    let _gone_already = child.kill();
    let _reaped_already = child.wait();
}

/// The argument with which this program answers the attacker, instead of measuring.
pub const ECHO: &str = "--echo";
/// What it says when it listens.
const LISTENS: &str = "listens";

/// Starts it, at a socket, in a cgroup.
fn listen(socket: &Path, cgroup: &Path) -> Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    let mut child = command.arg(ECHO).arg(socket).stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    let said = child.stdout.take().map(|output| BufReader::new(output).read_line(&mut line));
    let is_there = said.is_some() && line.trim_end() == LISTENS;
    let moved = fs::write(cgroup.join("cgroup.procs"), child.id().to_string());
    if !is_there || moved.is_err() {
        end(&mut child);
    }
    anyhow::ensure!(is_there, "nobody listens for the attacker");
    moved.context("cannot move the listener")?;
    Ok(child)
}

/// Sends back what comes to a socket, for as long as this process lives.
pub fn echo(socket: &Path) -> Result<()> {
    fn copy(mut stream: UnixStream) {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = stream.read(&mut bytes) {
            if stream.write_all(bytes.get(..count).unwrap_or_default()).is_err() {
                return;
            }
        }
    }
    let listener = UnixListener::bind(socket)?;
    println!("{LISTENS}");
    for stream in listener.incoming().flatten() {
        thread::spawn(move || copy(stream));
    }
    Ok(())
}
