//! `flyrun rmi`.

use clap::Args;

use super::{Context, print_json, print_line};
use crate::error::{Result, from_images};
use crate::exit_code::ExitCode;
use crate::rootfs;
use crate::size::Size;

/// Remove images from the store
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun rmi alpine
  flyrun rmi 3f57d9401f8d          (the first digits of an image's id or digest)")]
pub struct Arguments {
    /// Print what was removed as JSON
    #[arg(long)]
    json: bool,
    /// Names or digests
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    let store = context.store()?;
    let keep = rootfs::in_use(&context.machines().list()?, &context.snapshots().list()?);
    let mut reports = Vec::new();
    for name in &arguments.images {
        let report = store.remove(name, &keep).map_err(|error| from_images(&error))?;
        if !arguments.json {
            let removed = report.images.join(", ");
            print_line(&format!("removed {removed}, {} freed", Size(report.freed_bytes)))?;
        }
        reports.push(report);
    }
    if arguments.json { print_json(&reports) } else { Ok(ExitCode::Success) }
}
