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
use tempfile::TempDir;

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

/// resume.spawn_to_user, until the guest runs in user space; resume.spawn_to_hello, until guest-init, which is the first there, was
/// heard of; resume.spawn_to_workload, until the workload wrote; the steps of all, exits and page faults, suspend.command, and the
/// same with a network.
pub fn measure(flyrun: &Path, image: &str, runs: u32, report: &mut Report) -> Result<()> {
    let pulled = Command::new(flyrun).args(["pull", image]).stdout(Stdio::null()).status()?;
    anyhow::ensure!(pulled.success(), "flyrun pull {image} ended with {pulled}");
    let machine = Machine::start(flyrun, image, &["--network", "none"])?;
    let (mut resumes, mut suspend, mut exits, mut page_faults) = (vec![], vec![], vec![], vec![]);
    // One run more than is counted: the first reads every file for the first time.
    for run in 0..=runs {
        let suspend_ms = machine.suspend()?;
        let resume = machine.resume()?;
        if run > 0 {
            suspend.push(suspend_ms);
            resumes.push(resume);
            exits.push(Exits::now()?.all() as f64);
            page_faults.push(faults::of_vmm()?);
        }
    }
    // A monitor writes its steps last.
    machine.end()?;
    Resume::tell(&resumes, "resume", report)?;
    report.add("resume.exits", "count", &exits);
    report.add("resume.page_faults", "count", &page_faults);
    report.add("suspend.command", "ms_virtual", &suspend);
    if let Some(last) = resumes.last() {
        trace::add_steps("resume", last.began_us, &last.steps()?, report);
    }

    // With the host's network, of which nft and the kernel's interfaces are a part.
    let machine = Machine::start(flyrun, image, &[])?;
    let mut resumes = vec![];
    for run in 0..=runs {
        machine.suspend()?;
        let resume = machine.resume()?;
        if run > 0 {
            resumes.push(resume);
        }
    }
    machine.end()?;
    Resume::tell(&resumes, "resume.network", report)?;
    if let Some(last) = resumes.last() {
        trace::add_steps("resume.network", last.began_us, &last.steps()?, report);
    }
    Ok(())
}

/// One resume.
struct Resume {
    /// When the command was started.
    began_us: u64,
    /// From then to the first sign of the workload.
    to_workload_ms: f64,
    /// When KVM first entered the guest in user space.
    user_us: Option<u64>,
    /// Where all processes that take part write down their steps.
    traces: TempDir,
}

impl Resume {
    /// The steps of all that took part, when they have ended.
    fn steps(&self) -> Result<Vec<Step>> {
        let mut steps = Vec::new();
        for program in ["cli", "monitor", "vmm"] {
            let own = trace::read(&self.traces.path().join(format!("{program}.trace")))?;
            let named =
                own.into_iter().map(|step| Step { name: format!("{program}: {}", step.name), ..step });
            steps.extend(named);
        }
        steps.sort_by_key(|step| step.at_us);
        Ok(steps)
    }

    /// From the command's start until its monitor has read guest-init's first word.
    fn to_hello_ms(&self) -> Result<f64> {
        let steps = self.steps()?;
        let heard = steps.iter().find(|step| step.name == "monitor: guest-init connected");
        let heard = heard.context("no monitor tells that guest-init has connected")?;
        Ok(heard.at_us.saturating_sub(self.began_us) as f64 / 1000.0)
    }

    /// Until its first instruction in user space, or a little more: guest-init runs there before its first word.
    fn to_user_ms(&self) -> Result<f64> {
        let entered = self.user_us.map(|at_us| at_us.saturating_sub(self.began_us) as f64 / 1000.0);
        Ok(self.to_hello_ms()?.min(entered.unwrap_or(f64::INFINITY)))
    }

    fn tell(resumes: &[Resume], name: &str, report: &mut Report) -> Result<()> {
        let to_user = resumes.iter().map(Resume::to_user_ms).collect::<Result<Vec<_>>>()?;
        let to_workload: Vec<_> = resumes.iter().map(|resume| resume.to_workload_ms).collect();
        let to_hello = resumes.iter().map(Resume::to_hello_ms).collect::<Result<Vec<_>>>()?;
        report.add(format!("{name}.spawn_to_user"), "ms_virtual", &to_user);
        report.add(format!("{name}.spawn_to_hello"), "ms_virtual", &to_hello);
        report.add(format!("{name}.spawn_to_workload"), "ms_virtual", &to_workload);
        Ok(())
    }
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

    fn resume(&self) -> Result<Resume> {
        let length = fs::metadata(&self.console)?.len();
        let watch = self.watch()?;
        let traces = tempfile::tempdir()?;
        let mut command = self.command(&["resume"]);
        command.env("FLYRUN_TRACE", traces.path());
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
        Ok(Resume { began_us, to_workload_ms, user_us, traces })
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
