//! `flyrun run --rm` of an image that is in the store already.

use std::{path::Path, process::Command};

use anyhow::{Context, Result};

use crate::{
    exits,
    report::Report,
    run::{Started, milliseconds},
    trace,
};

/// run.cached.first_byte with its phases, and run.cached.exits with its kinds.
pub fn run(flyrun: &Path, image: &str, runs: u32, report: &mut Report) -> Result<()> {
    let pulled = Command::new(flyrun).args(["pull", image]).status().context("flyrun cannot be started")?;
    anyhow::ensure!(pulled.success(), "flyrun pull {image} ended with {pulled}");
    let run = |words: &[&str]| {
        let mut command = Command::new(flyrun);
        command.args(["run", "--rm", image]).args(words);
        command
    };
    let mut command = run(&["echo", "first"]);
    let mut times = Vec::new();
    // One run more than is counted: the first reads every file for the first time.
    for run in 0..=runs {
        let started = Started::new(&mut command, "first")?;
        if run > 0 {
            times.push(milliseconds(started.elapsed));
        }
        started.finish()?;
    }
    report.add("run.cached.first_byte", "ms_virtual", &times);
    phases(&mut command, report)?;
    exits::measure(
        &mut run(&["sh", "-c", "echo first; sleep 1"]),
        "first",
        runs,
        "run.cached.exits",
        true,
        report,
    )
}

/// The steps of one more run, each with the time since the step before it.
fn phases(command: &mut Command, report: &mut Report) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let began = trace::now_us();
    let started = Started::new(command.env("FLYRUN_TRACE", directory.path()), "first")?;
    let first_byte = trace::now_us();
    started.finish()?;
    command.env_remove("FLYRUN_TRACE");

    let mut steps = Vec::new();
    for (program, file) in [("cli", "cli.trace"), ("vmm", "vmm.trace")] {
        for step in trace::read(&directory.path().join(file))? {
            steps.push((step.at_us, format!("{program}: {}", step.name)));
        }
    }
    steps.push((first_byte, "first byte".to_owned()));
    steps.sort();
    let mut previous = began;
    for (at_us, name) in steps.into_iter().filter(|(at_us, _)| *at_us <= first_byte) {
        report.add(
            format!("run.cached.phase {name}"),
            "ms_virtual",
            &[at_us.saturating_sub(previous) as f64 / 1000.0],
        );
        previous = at_us;
    }
    Ok(())
}
