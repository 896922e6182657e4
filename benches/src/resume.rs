//! `flyrun suspend` and `flyrun resume`, with every process they take: command, monitor, flyrun-vmm, and the guest up to its
//! workload, which writes to the machine's console whenever it runs.

use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use rustix::fs::inotify;

use crate::{
    bare::MEMORY_MIB,
    exits::Exits,
    faults,
    report::Report,
    run::milliseconds,
    trace::{self, Step},
    user_space,
};

const NAME: &str = "bench";
/// Each of its lines is one system call, with little between two.
const WORKLOAD: &str = "exec > /dev/console; while :; do echo T; done";
const SIGN: u8 = b'T';
/// A suspended machine's rest, of virtual time.
const REST: Duration = Duration::from_millis(500);
/// Resumes whose processes write down their steps, which takes them some 50 µs. The others do not.
const TRACED: u32 = 3;

/// resume.spawn_to_user, until the guest runs in user space; resume.spawn_to_workload, until the workload wrote; exits and page
/// faults, suspend.command; of resumes with traces resume.spawn_to_hello, until guest-init, which is the first in user space, was heard
/// of, and the steps of all; and the same with a network.
pub fn measure(flyrun: &Path, image: &str, runs: u32, report: &mut Report) -> Result<()> {
    let pulled = Command::new(flyrun).args(["pull", image]).stdout(Stdio::null()).status()?;
    anyhow::ensure!(pulled.success(), "flyrun pull {image} ended with {pulled}");
    let machine = Machine::start(flyrun, image, &["--network", "none"])?;
    let (mut resumes, mut suspend, mut exits, mut page_faults) = (vec![], vec![], vec![], vec![]);
    // One run more than is counted: the first reads every file for the first time.
    for run in 0..=runs {
        let suspend_ms = machine.suspend()?;
        let resume = machine.resume(None)?;
        if run > 0 {
            suspend.push(suspend_ms);
            resumes.push(resume);
            exits.push(Exits::now()?.all() as f64);
            page_faults.push(faults::of_vmm()?);
        }
    }
    machine.trace("resume", resumes, report)?;
    report.add("resume.exits", "count", &exits);
    report.add("resume.page_faults", "count", &page_faults);
    report.add("suspend.command", "ms_virtual", &suspend);

    // With the host's network, of which nft and the kernel's interfaces are a part.
    let machine = Machine::start(flyrun, image, &[])?;
    let mut resumes = vec![];
    for run in 0..=runs {
        machine.suspend()?;
        let resume = machine.resume(None)?;
        if run > 0 {
            resumes.push(resume);
        }
    }
    machine.trace("resume.network", resumes, report)
}

/// One resume.
struct Resume {
    /// When the command was started.
    began_us: u64,
    /// From then to the first sign of the workload.
    to_workload_ms: f64,
    /// When KVM first entered the guest in user space.
    user_us: Option<u64>,
}

impl Resume {
    /// Until the guest's first instruction in user space, or a little more: KVM tells of its entries alone.
    fn to_user_ms(&self) -> f64 {
        let entered = self.user_us.map(|at_us| at_us.saturating_sub(self.began_us) as f64 / 1000.0);
        self.to_workload_ms.min(entered.unwrap_or(f64::INFINITY))
    }
}

/// The steps of all that took part in a resume, when they have ended.
fn steps(traces: &Path) -> Result<Vec<Step>> {
    let mut steps = Vec::new();
    for program in ["cli", "monitor", "vmm"] {
        let own = trace::read(&traces.join(format!("{program}.trace")))?;
        let named = own.into_iter().map(|step| Step { name: format!("{program}: {}", step.name), ..step });
        steps.extend(named);
    }
    steps.sort_by_key(|step| step.at_us);
    Ok(steps)
}

/// From the command's start until its monitor has read guest-init's first word.
fn to_hello_ms(began_us: u64, steps: &[Step]) -> Result<f64> {
    let heard = steps.iter().find(|step| step.name == "monitor: guest-init connected");
    let heard = heard.context("no monitor tells that guest-init has connected")?;
    Ok(heard.at_us.saturating_sub(began_us) as f64 / 1000.0)
}

/// A machine in the background, and its console. It is removed when dropped.
struct Machine<'a> {
    flyrun: &'a Path,
    console: PathBuf,
}

impl<'a> Machine<'a> {
    fn start(flyrun: &'a Path, image: &str, options: &[&str]) -> Result<Self> {
        let memory = format!("{MEMORY_MIB}m");
        let mut command = Command::new(flyrun);
        command.args(["run", "-d", "--name", NAME, "--memory", &memory]).args(options);
        let status = command.arg(image).args(["sh", "-c", WORKLOAD]).stdout(Stdio::null()).status()?;
        anyhow::ensure!(status.success(), "flyrun run -d ended with {status}");
        let told = Command::new(flyrun).args(["inspect", NAME]).output()?;
        let told: serde_json::Value = serde_json::from_slice(&told.stdout)?;
        let directory = told.pointer("/0/directory").and_then(serde_json::Value::as_str);
        let console = Path::new(directory.context("inspect tells no directory")?).join("console.log");
        let machine = Self { flyrun, console };
        machine.wait_for_sign(&machine.watch()?, 0)?;
        Ok(machine)
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(self.flyrun);
        command.args(words).arg(NAME).stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    fn suspend(&self) -> Result<f64> {
        let began = Instant::now();
        let status = self.command(&["suspend"]).status()?;
        anyhow::ensure!(status.success(), "flyrun suspend ended with {status}");
        let elapsed = milliseconds(began.elapsed());
        // Its monitor takes the network away when the answer is given already, and whoever resumes at once waits for that.
        sleep(REST);
        Ok(elapsed)
    }

    /// Tells of these resumes, and of some more that are traced; then the machine ends, as a monitor writes its steps last.
    fn trace(self, name: &str, resumes: Vec<Resume>, report: &mut Report) -> Result<()> {
        let to_user: Vec<_> = resumes.iter().map(Resume::to_user_ms).collect();
        let to_workload: Vec<_> = resumes.iter().map(|resume| resume.to_workload_ms).collect();
        report.add(format!("{name}.spawn_to_user"), "ms_virtual", &to_user);
        report.add(format!("{name}.spawn_to_workload"), "ms_virtual", &to_workload);
        let mut traced = vec![];
        for _ in 0..TRACED {
            self.suspend()?;
            let traces = tempfile::tempdir()?;
            traced.push((self.resume(Some(traces.path()))?.began_us, traces));
        }
        self.end()?;
        let traced = traced.iter().map(|(began_us, traces)| Ok((*began_us, steps(traces.path())?)));
        let traced = traced.collect::<Result<Vec<_>>>()?;
        let to_hello = traced.iter().map(|(began_us, steps)| to_hello_ms(*began_us, steps));
        report.add(format!("{name}.spawn_to_hello"), "ms_virtual", &to_hello.collect::<Result<Vec<_>>>()?);
        if let Some((began_us, steps)) = traced.last() {
            trace::add_steps(name, *began_us, steps, report);
        }
        Ok(())
    }

    fn resume(&self, traces: Option<&Path>) -> Result<Resume> {
        let length = fs::metadata(&self.console)?.len();
        let watch = self.watch()?;
        let mut command = self.command(&["resume"]);
        command.envs(traces.map(|traces| ("FLYRUN_TRACE", traces)));
        let entries = user_space::Watch::begin()?;
        let (began, began_us) = (Instant::now(), trace::now_us());
        let mut child = command.spawn()?;
        self.wait_for_sign(&watch, length)?;
        let to_workload_ms = milliseconds(began.elapsed());
        let user_us = entries.first_us()?;
        let status = child.wait()?;
        anyhow::ensure!(status.success(), "flyrun resume ended with {status}");
        let told = Command::new(self.flyrun).args(["inspect", NAME]).output()?;
        let told: serde_json::Value = serde_json::from_slice(&told.stdout)?;
        let kind = told.pointer("/0/last_start/kind").and_then(serde_json::Value::as_str);
        anyhow::ensure!(kind == Some("resumed"), "the machine was not resumed: {told}");
        Ok(Resume { began_us, to_workload_ms, user_us })
    }

    fn watch(&self) -> Result<OwnedFd> {
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC)?;
        inotify::add_watch(&watch, &self.console, inotify::WatchFlags::MODIFY)?;
        Ok(watch)
    }

    fn wait_for_sign(&self, watch: &OwnedFd, length: u64) -> Result<()> {
        let mut events = [0; 512];
        loop {
            let mut console = File::open(&self.console)?;
            console.seek(SeekFrom::Start(length))?;
            let mut bytes = Vec::new();
            console.take(64).read_to_end(&mut bytes)?;
            if bytes.contains(&SIGN) {
                return Ok(());
            }
            rustix::io::read(watch, &mut events)?;
        }
    }

    /// Returns when it is removed, and thus its monitor has ended.
    fn end(self) -> Result<()> {
        for words in [&["stop", "-t", "0"][..], &["rm"]] {
            let status = self.command(words).status()?;
            anyhow::ensure!(status.success(), "flyrun {} ended with {status}", words.join(" "));
        }
        Ok(())
    }
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        let _gone_already = self.command(&["rm", "-f"]).stderr(Stdio::null()).status();
    }
}
