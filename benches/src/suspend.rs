//! A bare machine that is suspended, resumed, and suspended again. Its directory is in the test host's memory, so the figures
//! are the host kernel's and flyrun-vmm's work, without a disk's.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result};

use crate::{
    bare::{MEMORY_MIB, Machine},
    exits::{self, Exits},
    faults,
    report::Report,
    run::milliseconds,
};

/// What `benches/guest/first_line.rs` writes again and again if it is told to `tick`.
const TICK: u8 = b'.';

/// What it writes if it is told to `twrite`: 8 MiB in each round besides.
const WRITES: [(&str, &str); 2] = [("tick", "suspend.second"), ("twrite", "suspend.second.of_8_mib")];

/// resume.vmm.spawn_to_user with its exits and page faults, suspend.full and suspend.second with what they write, and what it
/// costs to write all of the memory.
pub fn measure(machine: &Machine, runs: u32, report: &mut Report) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let snapshot = directory.path().join("snapshot");
    std::fs::create_dir(&snapshot)?;
    let all = write_all(directory.path())?;
    for (words, second) in WRITES {
        let mut figures = Figures::default();
        // One run more than is counted: the first reads every file for the first time.
        for run in 0..=runs {
            let once = figures_of_one(machine, words, &snapshot)?;
            if run > 0 {
                figures.add(&once);
            }
        }
        report.add(second, "ms_virtual", &figures.second_ms);
        report.add(format!("{second}.written"), "MiB", &figures.second_mib);
        if second == "suspend.second" {
            report.add("suspend.full", "ms_virtual", &figures.full_ms);
            report.add("suspend.full.written", "MiB", &figures.full_mib);
            report.add("suspend.all_of_memory", "ms_virtual", &[all]);
            let share: Vec<_> = figures.full_ms.iter().map(|full| full / all).collect();
            report.add("suspend.full.share_of_all", "ratio", &share);
            report.add("resume.vmm.spawn_to_user", "ms_virtual", &figures.resume_ms);
            report.add("resume.vmm.exits", "count", &figures.exits);
            report.add("resume.vmm.page_faults", "count", &figures.page_faults);
            steps(machine, &snapshot, report)?;
        }
    }
    Ok(())
}

/// One value of each run.
#[derive(Default)]
struct Figures {
    full_ms: Vec<f64>,
    full_mib: Vec<f64>,
    resume_ms: Vec<f64>,
    exits: Vec<f64>,
    page_faults: Vec<f64>,
    second_ms: Vec<f64>,
    second_mib: Vec<f64>,
}

impl Figures {
    fn add(&mut self, once: &[f64; 7]) {
        let Self { full_ms, full_mib, resume_ms, exits, page_faults, second_ms, second_mib } = self;
        let all = [full_ms, full_mib, resume_ms, exits, page_faults, second_ms, second_mib];
        all.into_iter().zip(once).for_each(|(values, value)| values.push(*value));
    }
}

/// Boots the machine, suspends it, resumes it, and suspends it again: in the order of [`Figures`].
fn figures_of_one(machine: &Machine, words: &str, snapshot: &Path) -> Result<[f64; 7]> {
    let mut life = Life::new(machine.flyrun(words)?)?;
    life.wait_for_tick()?;
    let (full_ms, full_mib) = life.suspend(snapshot)?;
    drop(life);

    exits::wait_for_none()?;
    let began = Instant::now();
    let mut life = Life::new(machine.restored(snapshot)?)?;
    life.wait_for_tick()?;
    let resume_ms = milliseconds(began.elapsed());
    let exits = Exits::now()?.all() as f64;
    let page_faults = faults::of(life.child.id())?;
    // A whole round, however far the first had come when the machine was brought to disk.
    life.wait_for_tick()?;
    let (second_ms, second_mib) = life.suspend(snapshot)?;
    Ok([full_ms, full_mib, resume_ms, exits, page_faults, second_ms, second_mib])
}

/// The steps of one more resume.
fn steps(machine: &Machine, snapshot: &Path, report: &mut Report) -> Result<()> {
    let file = snapshot.with_extension("trace");
    let began = crate::trace::now_us();
    let mut command = machine.restored(snapshot)?;
    command.arg("--trace").arg(&file);
    let mut life = Life::new(command)?;
    life.wait_for_tick()?;
    life.ask("pause")?;
    life.terminate()?;
    crate::trace::add_steps("resume.vmm", began, &crate::trace::read(&file)?, report);
    Ok(())
}

/// A file as large as the guest's memory, with nothing left out.
fn write_all(directory: &Path) -> Result<f64> {
    let memory = vec![1; (MEMORY_MIB as usize) << 20];
    let began = Instant::now();
    let mut file = File::create(directory.join("all"))?;
    file.write_all(&memory)?;
    file.sync_all()?;
    Ok(milliseconds(began.elapsed()))
}

/// A flyrun-vmm whose owner this is. It is killed and reaped when dropped.
struct Life {
    child: Child,
    stdout: ChildStdout,
    requests: BufReader<UnixStream>,
}

impl Life {
    fn new(mut command: Command) -> Result<Self> {
        let (owner, stdin) = UnixStream::pair()?;
        command.arg("--control").stdin(OwnedFd::from(stdin)).stdout(Stdio::piped());
        let mut child = command.spawn().context("flyrun-vmm cannot be started")?;
        let stdout = child.stdout.take().context("it has no standard output")?;
        Ok(Self { child, stdout, requests: BufReader::new(owner) })
    }

    fn wait_for_tick(&mut self) -> Result<()> {
        let mut byte = [0];
        while byte != [TICK] {
            anyhow::ensure!(
                self.stdout.read(&mut byte)? == 1,
                "flyrun-vmm ended without a tick of its guest"
            );
        }
        Ok(())
    }

    fn ask(&mut self, request: &str) -> Result<String> {
        self.requests.get_mut().write_all(format!("{request}\n").as_bytes())?;
        let mut answer = String::new();
        self.requests.read_line(&mut answer)?;
        anyhow::ensure!(answer.starts_with("ok"), "{request}: {answer}");
        Ok(answer)
    }

    /// The time it takes, and the MiB that were written.
    fn suspend(&mut self, directory: &Path) -> Result<(f64, f64)> {
        let began = Instant::now();
        self.ask("pause")?;
        let answer = self.ask(&format!("snapshot {}", directory.display()))?;
        let elapsed = milliseconds(began.elapsed());
        let figures: serde_json::Value = serde_json::from_str(answer.trim_start_matches("ok "))?;
        let written = figures.get("written_bytes").and_then(serde_json::Value::as_f64).unwrap_or(0.0);
        Ok((elapsed, written / f64::from(1 << 20)))
    }

    /// Ends it by SIGTERM, so that it writes its trace.
    fn terminate(mut self) -> Result<()> {
        Command::new("kill").arg(self.child.id().to_string()).status()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        let _gone_already = self.child.kill();
        let _reaped_already = self.child.wait();
    }
}
