//! `flyrun suspend` and `flyrun resume`, with every process they take: command, monitor, flyrun-vmm, and the guest up to its
//! workload, which writes to the machine's console whenever it runs.

use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
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
};

const NAME: &str = "bench";
/// Each of its lines is one system call, with little between two.
const WORKLOAD: &str = "exec > /dev/console; while :; do echo T; done";
const SIGN: u8 = b'T';

/// resume.spawn_to_user and its steps, exits and page faults, suspend.command, and resume.network.spawn_to_user.
pub fn measure(flyrun: &Path, image: &str, runs: u32, report: &mut Report) -> Result<()> {
    let pulled = Command::new(flyrun).args(["pull", image]).stdout(Stdio::null()).status()?;
    anyhow::ensure!(pulled.success(), "flyrun pull {image} ended with {pulled}");
    let machine = Machine::start(flyrun, image, &["--network", "none"])?;
    let (mut resume, mut suspend, mut exits, mut page_faults) = (vec![], vec![], vec![], vec![]);
    // One run more than is counted: the first reads every file for the first time.
    for run in 0..=runs {
        let suspend_ms = machine.suspend()?;
        let resume_ms = machine.resume(None)?;
        if run > 0 {
            suspend.push(suspend_ms);
            resume.push(resume_ms);
            exits.push(Exits::now()?.all() as f64);
            page_faults.push(faults::of_vmm()?);
        }
    }
    report.add("resume.spawn_to_user", "ms_virtual", &resume);
    report.add("resume.exits", "count", &exits);
    report.add("resume.page_faults", "count", &page_faults);
    report.add("suspend.command", "ms_virtual", &suspend);
    machine.steps(report)?;

    // With the host's network, of which nft and the kernel's interfaces are a part.
    let machine = Machine::start(flyrun, image, &[])?;
    let mut resume = vec![];
    for run in 0..=runs {
        machine.suspend()?;
        let resume_ms = machine.resume(None)?;
        if run > 0 {
            resume.push(resume_ms);
        }
    }
    report.add("resume.network.spawn_to_user", "ms_virtual", &resume);
    Ok(())
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
        Ok(milliseconds(began.elapsed()))
    }

    /// From the command's spawn to the first sign of the workload.
    fn resume(&self, trace: Option<&Path>) -> Result<f64> {
        let length = fs::metadata(&self.console)?.len();
        let watch = self.watch()?;
        let mut command = self.command(&["resume"]);
        command.envs(trace.map(|directory| ("FLYRUN_TRACE", directory)));
        let began = Instant::now();
        let mut child = command.spawn()?;
        self.wait_for_sign(&watch, length)?;
        let elapsed = milliseconds(began.elapsed());
        let status = child.wait()?;
        anyhow::ensure!(status.success(), "flyrun resume ended with {status}");
        let told = Command::new(self.flyrun).args(["inspect", NAME]).output()?;
        let told: serde_json::Value = serde_json::from_slice(&told.stdout)?;
        let kind = told.pointer("/0/last_start/kind").and_then(serde_json::Value::as_str);
        anyhow::ensure!(kind == Some("resumed"), "the machine was not resumed: {told}");
        Ok(elapsed)
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

    /// The steps of one more resume, of all that take part.
    fn steps(self, report: &mut Report) -> Result<()> {
        let directory = tempfile::tempdir()?;
        self.suspend()?;
        let began = trace::now_us();
        self.resume(Some(directory.path()))?;
        // Removed only when its monitor has ended, which writes its steps last.
        for words in [&["stop", "-t", "0"][..], &["rm"]] {
            let status = self.command(words).status()?;
            anyhow::ensure!(status.success(), "flyrun {} ended with {status}", words.join(" "));
        }
        let mut steps = Vec::new();
        for program in ["cli", "monitor", "vmm"] {
            let own = trace::read(&directory.path().join(format!("{program}.trace")))?;
            steps.extend(
                own.into_iter().map(|step| Step { name: format!("{program}: {}", step.name), ..step }),
            );
        }
        steps.sort_by_key(|step| step.at_us);
        trace::add_steps("resume", began, &steps, report);
        Ok(())
    }
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        let _gone_already = self.command(&["rm", "-f"]).stderr(Stdio::null()).status();
    }
}
