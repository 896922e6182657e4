//! flyrun's benchmarks. `benches/run` starts this in the test host's virtual time, where 1 ns is one instruction.
#![forbid(unsafe_code)]

mod bare;
mod cached;
mod exits;
mod overhead;
mod report;
mod run;
mod suspend;
mod trace;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, Result};
use clap::Parser;
use report::Report;

/// Measures flyrun beside QEMU's microvm and prints a table.
#[derive(Debug, Parser)]
struct Arguments {
    /// The directory with flyrun-vmm, vmlinux and the initramfs archives.
    #[arg(long)]
    library: PathBuf,
    /// The initramfs whose init writes FIRST-LINE.
    #[arg(long)]
    initrd: PathBuf,
    /// The program flyrun; without it no image is run.
    #[arg(long)]
    flyrun: Option<PathBuf>,
    /// The image with busybox that is run, in any form `flyrun pull` takes.
    #[arg(long, requires = "flyrun")]
    image: Option<String>,
    /// Where to write the figures as JSON.
    #[arg(long)]
    json: PathBuf,
    /// How often to measure each time.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// A directory with qemu-system-x86_64, all its libraries and firmware; without it QEMU is not measured.
    #[arg(long)]
    qemu: Option<PathBuf>,
}

fn main() -> ExitCode {
    match benchmarks(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn benchmarks(arguments: &Arguments) -> Result<()> {
    let mut report = Report::default();
    let machine = bare::Machine::new(&arguments.library, &arguments.initrd)?;
    machine.boot_flyrun(arguments.runs, &mut report).context("booting with flyrun-vmm")?;
    if let Some(qemu) = &arguments.qemu {
        machine.boot_qemu(qemu, arguments.runs, &mut report).context("booting with QEMU")?;
    }
    suspend::measure(&machine, arguments.runs, &mut report).context("suspending and resuming")?;
    overhead::measure(&machine, &mut report).context("measuring the memory of flyrun-vmm")?;
    if let (Some(flyrun), Some(image)) = (&arguments.flyrun, &arguments.image) {
        cached::run(flyrun, image, arguments.runs, &mut report).context("running a cached image")?;
    }
    print!("{}", report.table());
    report.write_json(&arguments.json)
}
