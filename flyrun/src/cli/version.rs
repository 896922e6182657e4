//! `flyrun version`.

use clap::Args;
use serde::Serialize;

use super::{print_json, print_line};
use crate::error::Result;
use crate::exit_code::ExitCode;
use crate::paths::Library;

/// Print the versions of flyrun and of what it speaks
#[derive(Debug, Args)]
pub struct Arguments {
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

/// The fields of `--json`; their names are stable.
#[derive(Serialize)]
struct Version {
    flyrun: &'static str,
    /// Of host and guest-init.
    protocol: u32,
    /// The directory of flyrun's parts, if it was found.
    library: Option<String>,
}

pub fn execute(arguments: &Arguments) -> Result<ExitCode> {
    let library = Library::find().ok().map(|library| library.directory().display().to_string());
    let version =
        Version { flyrun: env!("CARGO_PKG_VERSION"), protocol: protocol::PROTOCOL_VERSION, library };
    if arguments.json {
        return print_json(&version);
    }
    print_line(&format!("flyrun {}", version.flyrun))?;
    print_line(&format!("guest protocol {}", version.protocol))?;
    print_line(&format!("parts {}", version.library.as_deref().unwrap_or("not found")))?;
    Ok(ExitCode::Success)
}
