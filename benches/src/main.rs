//! flyrun's benchmarks. `benches/run` starts this in the test host's virtual time, where 1 ns is one instruction.
#![forbid(unsafe_code)]

mod bare;
mod cached;
mod exits;
mod faults;
mod io;
mod overhead;
mod qemu;
mod report;
mod resume;
mod run;
mod serve;
mod suspend;
mod tenants;
mod trace;
mod user_space;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use qemu::Qemu;
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
    /// The initramfs whose init is `guest/io`; without it no network or disk is measured.
    #[arg(long, requires = "iperf3")]
    io_initrd: Option<PathBuf>,
    /// iperf3, the host's end of the network that is measured.
    #[arg(long)]
    iperf3: Option<PathBuf>,
    /// The program flyrun; without it no image is run.
    #[arg(long)]
    flyrun: Option<PathBuf>,
    /// The image with busybox that is run, in any form `flyrun pull` takes.
    #[arg(long, requires = "flyrun")]
    image: Option<String>,
    /// The image whose process is `guest/answer.rs`; without it no requests are measured.
    #[arg(long, requires = "flyrun")]
    web_image: Option<String>,
    /// The image with nginx that is suspended and started for a request.
    #[arg(long, requires = "web_image")]
    nginx_image: Option<String>,
    /// The kernel of tests/attacker; without it no tenants are measured.
    #[arg(long, requires = "image")]
    attacker: Option<PathBuf>,
    /// haproxy, to stand beside `flyrun serve`.
    #[arg(long)]
    haproxy: Option<PathBuf>,
    /// Where to write the figures as JSON.
    #[arg(long)]
    json: PathBuf,
    /// How often to measure each time.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// How often to measure network and disk.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    io_rounds: u32,
    /// Measure this alone; repeatable.
    #[arg(long, value_enum)]
    only: Vec<Part>,
    /// A directory with qemu-system-x86_64, all its libraries and firmware; without it QEMU is not measured.
    #[arg(long)]
    qemu: Option<PathBuf>,
}

/// What can be measured alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The boot of a machine without devices, and its memory.
    Boot,
    /// Suspending and resuming: the machine without devices, and the commands.
    Suspend,
    /// Running a cached image.
    Image,
    /// Requests through `flyrun serve` and through HAProxy.
    Serve,
    /// iperf3.
    Net,
    /// fio.
    Disk,
    /// A machine beside one that attacks.
    Tenants,
}

impl Arguments {
    fn wants(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }
}

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    let done = match (words.next(), words.next()) {
        (Some(word), Some(socket)) if word == tenants::ECHO => tenants::echo(socket.as_ref()),
        _ => benchmarks(&Arguments::parse()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Each dynamic program looks for this file. In the test host one that is missing is asked for outside, which makes the clock jump.
const PRELOAD: &str = "/etc/ld.so.preload";

fn benchmarks(arguments: &Arguments) -> Result<()> {
    if std::env::var_os("FLYRUN_IN_TEST_HOST").is_some() {
        let preload = std::fs::File::options().append(true).create(true).open(PRELOAD);
        preload.with_context(|| format!("cannot make {PRELOAD}"))?;
    }
    let mut report = Report::default();
    let qemu = arguments.qemu.as_deref().map(Qemu::new);
    if arguments.wants(Part::Boot) {
        let machine = bare::Machine::new(&arguments.library, &arguments.initrd)?;
        machine.boot_flyrun(arguments.runs, &mut report).context("booting with flyrun-vmm")?;
        if let Some(qemu) = &qemu {
            machine.boot_qemu(qemu, arguments.runs, &mut report).context("booting with QEMU")?;
        }
        overhead::measure(&machine, &mut report).context("measuring the memory of flyrun-vmm")?;
    }
    if arguments.wants(Part::Suspend) {
        let machine = bare::Machine::new(&arguments.library, &arguments.initrd)?;
        suspend::measure(&machine, arguments.runs, &mut report).context("suspending and resuming")?;
        if let (Some(flyrun), Some(image)) = (&arguments.flyrun, &arguments.image) {
            resume::measure(flyrun, image, arguments.runs, &mut report)
                .context("flyrun suspend and resume")?;
        }
    }
    if let (Some(flyrun), Some(image), true) =
        (&arguments.flyrun, &arguments.image, arguments.wants(Part::Image))
    {
        cached::run(flyrun, image, arguments.runs, &mut report).context("running a cached image")?;
    }
    if let (Some(flyrun), Some(image), true) =
        (&arguments.flyrun, &arguments.web_image, arguments.wants(Part::Serve))
    {
        let images = serve::Images { small: image, nginx: arguments.nginx_image.as_deref() };
        serve::measure(flyrun, images, arguments.haproxy.as_deref(), arguments.runs, &mut report)
            .context("serving requests")?;
    }
    if let (Some(initrd), Some(iperf3)) = (&arguments.io_initrd, &arguments.iperf3) {
        let files = io::Files::new(&arguments.library, initrd, iperf3)?;
        let comparison = io::Comparison { files: &files, qemu: qemu.as_ref(), rounds: arguments.io_rounds };
        if arguments.wants(Part::Net) {
            comparison.network(&mut report).context("measuring the network")?;
        }
        if arguments.wants(Part::Disk) {
            comparison.disk(&mut report).context("measuring the disk")?;
        }
    }
    let mut slowdown = 0.0;
    if let (Some(flyrun), Some(image), Some(attacker), true) =
        (&arguments.flyrun, &arguments.image, &arguments.attacker, arguments.wants(Part::Tenants))
    {
        let scene = tenants::Scene { library: &arguments.library, flyrun, image, attacker };
        slowdown = scene.measure(&mut report).context("measuring a tenant beside an attack")?;
    }
    print!("{}", report.table());
    report.write_json(&arguments.json)?;
    // In virtual time alone is this a fact, and no matter of what else runs.
    anyhow::ensure!(
        slowdown <= tenants::PROMISED,
        "an attack takes {slowdown:.2} times what an honest neighbour does, and {} is promised",
        tenants::PROMISED
    );
    Ok(())
}
