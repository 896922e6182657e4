//! `flyrun images`.

use clap::Args;

use super::{Context, print_json, print_line, table};
use crate::error::{Result, from_images};
use crate::exit_code::ExitCode;
use crate::size::Size;

/// List the images in the store
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun images
  flyrun images --quiet | xargs -r -n1 flyrun rmi
  flyrun images --json | jq '.[].name'")]
pub struct Arguments {
    /// Print names only
    #[arg(short, long)]
    quiet: bool,
    /// Print all that is known as JSON
    #[arg(long, conflicts_with = "quiet")]
    json: bool,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    let images = context.store()?.list().map_err(|error| from_images(&error))?;
    if arguments.json {
        return print_json(&images);
    }
    if arguments.quiet {
        for image in &images {
            print_line(&image.name)?;
        }
        return Ok(ExitCode::Success);
    }
    let mut rows = table::new(&["IMAGE", "ID", "PULLED", "LAYERS", "COMPRESSED", "UNPACKED"]);
    for image in &images {
        rows.add_row([
            image.name.clone(),
            image.config_digest.short(),
            table::ago(image.pulled_unix_s),
            image.layers.to_string(),
            Size(image.layer_bytes).to_string(),
            image.rootfs_bytes.map_or_else(|| "-".to_string(), |bytes| Size(bytes).to_string()),
        ]);
    }
    print_line(&table::text(&rows))?;
    Ok(ExitCode::Success)
}
