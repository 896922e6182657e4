//! `flyrun run --rm` of an image that is in the store already.

use std::{fs::File, path::Path, process::Command, thread::sleep, time::Duration};

use anyhow::{Context, Result};

use crate::{
    exits,
    report::Report,
    run::{Started, milliseconds},
    trace::{self, Step},
};

/// The start of a machine alone: the host's share of a network is measured by itself, as run.network.first_byte.
const ALONE: [&str; 3] = ["--network", "none", "--cold"];
/// The same from a base snapshot.
const BASE: [&str; 2] = ["--network", "none"];

/// How long a host has, in virtual time, to clear away what is left of a machine: its kernel takes the VMM's network namespace apart
/// behind the end of the command, some 2 ms that would be in the next figure.
const REST: Duration = Duration::from_millis(500);

/// run.cached.first_byte with its phases, run.cached.exits with its kinds, and run.network.first_byte, all by a boot; then
/// run.base.first_byte and run.base.exits, from a base snapshot, run.base.back_to_back, which is the same without a rest before, and
/// run.base.network.first_byte.
///
/// With a network, nft makes the host's rules beside the guest's boot. In virtual time there is one processor, so that its
/// whole work is in the figure; a host with two hides it.
pub fn run(flyrun: &Path, image: &str, runs: u32, report: &mut Report) -> Result<()> {
    let pulled = Command::new(flyrun).args(["pull", image]).status().context("flyrun cannot be started")?;
    anyhow::ensure!(pulled.success(), "flyrun pull {image} ended with {pulled}");
    let run = |options: &[&str], words: &[&str]| {
        let mut command = Command::new(flyrun);
        command.args(["run", "--rm"]).args(options).arg(image).args(words);
        command
    };
    let mut first_byte = |options: &[&str], rest, name| {
        first_byte(&mut run(options, &["echo", "first"]), runs, rest, name, report)
    };
    first_byte(&ALONE, REST, "run.cached.first_byte")?;
    first_byte(&["--cold"], REST, "run.network.first_byte")?;
    first_byte(&BASE, REST, "run.base.first_byte")?;
    first_byte(&BASE, Duration::ZERO, "run.base.back_to_back")?;
    first_byte(&[], REST, "run.base.network.first_byte")?;
    if let Err(error) = base_steps(&mut run(&BASE, &["echo", "first"]), report) {
        eprintln!("bench: the steps of run.base.first_byte are missing: {error:#}");
    }
    if let Err(error) = phases(&mut run(&[&ALONE[..], &["--init-log"]].concat(), &["echo", "first"]), report)
    {
        eprintln!("bench: the phases of run.cached.first_byte are missing: {error:#}");
    }
    exits::measure(
        &mut run(&ALONE, &["sh", "-c", "echo first; sleep 1"]),
        "first",
        runs,
        "run.cached.exits",
        true,
        report,
    )?;
    exits::measure(
        &mut run(&BASE, &["sh", "-c", "echo first; sleep 1"]),
        "first",
        runs,
        "run.base.exits",
        true,
        report,
    )
}

/// The steps of one more run from the base. Its guest-init has no console to tell its own on.
fn base_steps(command: &mut Command, report: &mut Report) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let began = trace::now_us();
    let started = Started::new(command.env("FLYRUN_TRACE", directory.path()), "first")?;
    report.add("run.base.traced", "ms_virtual", &[milliseconds(started.elapsed)]);
    started.finish()?;
    for program in ["cli", "vmm"] {
        let steps = trace::read(&directory.path().join(format!("{program}.trace")))?;
        trace::add_steps(&format!("run.base.{program}"), began, &steps, report);
    }
    Ok(())
}

fn first_byte(
    command: &mut Command,
    runs: u32,
    rest: Duration,
    name: &str,
    report: &mut Report,
) -> Result<()> {
    let mut times = Vec::new();
    // One run more than is counted: the first reads every file for the first time.
    for run in 0..=runs {
        sleep(rest);
        let started = Started::new(command, "first")?;
        if run > 0 {
            times.push(milliseconds(started.elapsed));
        }
        started.finish()?;
    }
    report.add(name, "ms_virtual", &times);
    Ok(())
}

/// The steps of one more run, and what they say about each part.
fn phases(command: &mut Command, report: &mut Report) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let console = directory.path().join("console");
    let began = trace::now_us();
    command.env("FLYRUN_TRACE", directory.path()).stderr(File::create(&console)?);
    let started = Started::new(command, "first")?;
    let first_byte = trace::now_us();
    started.finish()?;

    let cli = trace::read(&directory.path().join("cli.trace"))?;
    let vmm = trace::read(&directory.path().join("vmm.trace"))?;
    let guest_init = trace::guest_init(&std::fs::read_to_string(&console)?)?;
    let at = |steps: &[Step], name: &str| {
        let found = steps.iter().find(|step| step.name == name).map(|step| step.at_us);
        found.with_context(|| format!("no step {name:?} among {steps:?}"))
    };
    let (vmm_started, running) = (at(&vmm, "start")?, at(&vmm, "running")?);
    let workload_started = at(&cli, "workload started")?;
    let guest_init_us = match (guest_init.first(), guest_init.last()) {
        (Some(first), Some(last)) => last.at_us.saturating_sub(first.at_us),
        _ => anyhow::bail!("guest-init told no steps"),
    };
    let guest_us = workload_started.saturating_sub(running);
    for (phase, us) in [
        ("cli", vmm_started.saturating_sub(began)),
        ("vmm", running.saturating_sub(vmm_started)),
        ("kernel", guest_us.saturating_sub(guest_init_us)),
        ("guest_init", guest_init_us),
        ("workload", first_byte.saturating_sub(workload_started)),
    ] {
        report.add(format!("run.cached.phase.{phase}"), "ms_virtual", &[us as f64 / 1000.0]);
    }
    for (program, steps, began) in [("cli", &cli, began), ("vmm", &vmm, vmm_started)] {
        trace::add_steps(&format!("run.cached.{program}"), began, steps, report);
    }
    if let Some(first) = guest_init.first() {
        trace::add_steps("run.cached.guest_init", first.at_us, &guest_init, report);
    }
    Ok(())
}
