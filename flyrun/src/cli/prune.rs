//! `flyrun prune`.

use clap::Args;
use images::{PruneOptions, PruneReport};
use serde::Serialize;

use super::{Context, print_json, print_line};
use crate::error::{Result, from_images};
use crate::exit_code::ExitCode;
use crate::machine::Ended;
use crate::rootfs;
use crate::size::Size;

/// Remove machines that have ended, and what of images nothing needs
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun prune              ended machines with their disks, leftovers of crashes, base snapshots
  flyrun prune --all        also every image that no machine uses")]
pub struct Arguments {
    /// Also remove every image that no machine uses
    #[arg(short, long)]
    all: bool,
    /// Print what was removed as JSON
    #[arg(long)]
    json: bool,
}

/// The fields of `--json`; their names are stable.
#[derive(Serialize)]
struct Report {
    machines: Vec<String>,
    #[serde(flatten)]
    store: PruneReport,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    let ended = context.machines().remove_ended(Ended::All)?;
    context.snapshots().sweep()?;
    context.paths.sweep_run_dirs();
    crate::network::sweep(&context.paths, &|id| context.machines().is_owned(id))?;
    context.sweep_rules()?;
    let keep = rootfs::in_use(&context.machines().list()?, &context.snapshots().list()?);
    let options = PruneOptions { all: arguments.all, keep };
    let mut store = context.store()?.prune(&options).map_err(|error| from_images(&error))?;
    store.freed_bytes += ended.iter().map(|(_, bytes)| bytes).sum::<u64>();
    store.freed_bytes += crate::base::remove_all(&context.paths);
    let report = Report { machines: ended.into_iter().map(|(id, _)| id).collect(), store };
    if arguments.json {
        return print_json(&report);
    }
    for machine in &report.machines {
        print_line(&format!("machine {machine}"))?;
    }
    for image in &report.store.images {
        print_line(&format!("image {image}"))?;
    }
    print_line(&format!("{} freed", Size(report.store.freed_bytes)))?;
    if report.store.busy {
        anstream::eprintln!("flyrun: a pull is under way, so the layers that no image needs were left");
        anstream::eprintln!("  Run `flyrun prune` again when it has ended.");
    }
    Ok(ExitCode::Success)
}
