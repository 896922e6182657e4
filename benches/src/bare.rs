//! A machine with nothing but a kernel and an init that writes one line: flyrun-vmm beside QEMU's microvm.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use serde_json::json;

use crate::{
    exits,
    qemu::Qemu,
    report::Report,
    run::{Started, milliseconds},
    trace,
};

/// What `benches/guest/first_line.rs` writes.
const SIGN: &str = "FIRST-LINE";
/// Memory of the guest in MiB.
pub const MEMORY_MIB: u32 = 128;

/// The files that a bare machine is made of, and a directory for its own.
#[derive(Debug)]
pub struct Machine {
    vmm: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
    directory: tempfile::TempDir,
}

impl Machine {
    /// Finds the files.
    pub fn new(library: &Path, initrd: &Path) -> Result<Self> {
        let existing =
            |path: PathBuf| path.canonicalize().with_context(|| format!("there is no {}", path.display()));
        Ok(Self {
            vmm: existing(library.join("flyrun-vmm"))?,
            kernel: existing(library.join("vmlinux"))?,
            initrd: existing(initrd.to_path_buf())?,
            directory: tempfile::tempdir()?,
        })
    }

    /// flyrun-vmm with this machine, whose init gets the words.
    pub fn flyrun(&self, init_words: &str) -> Result<Command> {
        self.flyrun_with(init_words, false)
    }

    fn flyrun_with(&self, init_words: &str, balloon: bool) -> Result<Command> {
        let spec = self.directory.path().join("spec.json");
        let command_line = if init_words.is_empty() { String::new() } else { format!("-- {init_words}") };
        let text = json!({
            "cpus": 1, "memory_mib": MEMORY_MIB, "kernel": self.kernel, "initrd": [self.initrd],
            "command_line": command_line, "console": "stdio", "balloon": balloon,
        });
        std::fs::write(&spec, text.to_string())?;
        let mut command = Command::new(&self.vmm);
        command.arg("--spec").arg(&spec);
        Ok(command)
    }

    /// flyrun-vmm that goes on with this machine's snapshot.
    pub fn restored(&self, snapshot: &Path) -> Result<Command> {
        let mut command = Command::new(&self.vmm);
        command.arg("--restore").arg(snapshot).arg("--spec").arg(self.directory.path().join("spec.json"));
        Ok(command)
    }

    /// boot.bare.flyrun, its steps from one more run, and its exits; boot.bare.balloon, with that device.
    pub fn boot_flyrun(&self, runs: u32, report: &mut Report) -> Result<()> {
        for (name, balloon) in [("boot.bare.balloon", true), ("boot.bare.flyrun", false)] {
            let mut command = self.flyrun_with("", balloon)?;
            let mut times = Vec::new();
            // One run more than is counted: the first reads every file for the first time.
            for run in 0..=runs {
                let started = Started::new(&mut command, SIGN)?;
                if run > 0 {
                    times.push(milliseconds(started.elapsed));
                }
                started.finish()?;
            }
            report.add(name, "ms_virtual", &times);
        }
        self.steps(report)?;
        exits::measure(&mut self.flyrun("hold")?, SIGN, runs, "boot.bare.flyrun.exits", false, report)
    }

    fn steps(&self, report: &mut Report) -> Result<()> {
        let file = self.directory.path().join("vmm.trace");
        let began = trace::now_us();
        Started::new(self.flyrun("")?.arg("--trace").arg(&file), SIGN)?.finish()?;
        trace::add_steps("boot.bare.flyrun", began, &trace::read(&file)?, report);
        Ok(())
    }

    /// boot.bare.qemu.
    pub fn boot_qemu(&self, qemu: &Qemu, runs: u32, report: &mut Report) -> Result<()> {
        let mut command = qemu.command(&self.kernel, &self.initrd, MEMORY_MIB, "");
        let mut times = Vec::new();
        for run in 0..=runs {
            let started = Started::new(&mut command, SIGN)?;
            if run > 0 {
                times.push(milliseconds(started.elapsed));
            }
        }
        report.add("boot.bare.qemu", "ms_virtual", &times);
        Ok(())
    }
}
