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
    report::Report,
    run::milliseconds,
};

/// What `benches/guest/first_line.rs` writes again and again if it is told to `tick`.
const TICK: u8 = b'T';

/// resume.spawn_to_user, suspend.full, suspend.second, suspend.30_mib, and what it costs to write all of the memory.
pub fn measure(machine: &Machine, runs: u32, report: &mut Report) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let snapshot = directory.path().join("snapshot");
    let (mut full, mut resume, mut second) = (Vec::new(), Vec::new(), Vec::new());
    let mut written = [0.0; 2];
    // One run more than is counted: the first reads every file for the first time.
    for run in 0..=runs {
        let mut life = Life::new(machine.flyrun("tick")?)?;
        life.wait_for_tick()?;
        let (full_ms, full_mib) = life.suspend(&snapshot)?;
        drop(life);

        let began = Instant::now();
        let mut life = Life::new(machine.restored(&snapshot)?)?;
        life.wait_for_tick()?;
        let resume_ms = milliseconds(began.elapsed());
        let (second_ms, second_mib) = life.suspend(&snapshot)?;
        if run > 0 {
            full.push(full_ms);
            resume.push(resume_ms);
            second.push(second_ms);
            written = [full_mib, second_mib];
        }
    }
    report.add("resume.spawn_to_user", "ms_virtual", &resume);
    report.add("suspend.full", "ms_virtual", &full);
    report.add("suspend.second", "ms_virtual", &second);
    report.add("suspend.full.written", "MiB", &written[..1]);
    report.add("suspend.second.written", "MiB", &written[1..]);
    in_use(machine, &snapshot, runs, report)?;
    report.add("suspend.all_of_memory", "ms_virtual", &[write_all(directory.path())?]);
    steps(machine, &snapshot, report)
}

/// suspend.30_mib: with memory in use that is written, and is to take at most a quarter of suspend.all_of_memory.
fn in_use(machine: &Machine, snapshot: &Path, runs: u32, report: &mut Report) -> Result<()> {
    let (mut times, mut written) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        let mut life = Life::new(machine.flyrun("use")?)?;
        // The first is in the line before.
        life.wait_for_tick()?;
        life.wait_for_tick()?;
        let (ms, mib) = life.suspend(&snapshot.with_extension("used"))?;
        times.push(ms);
        written.push(mib);
    }
    report.add("suspend.30_mib", "ms_virtual", &times);
    report.add("suspend.30_mib.written", "MiB", &written);
    Ok(())
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
    crate::trace::add_steps("resume", began, &crate::trace::read(&file)?, report);
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
