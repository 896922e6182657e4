//! `flyrun man`.

use std::path::PathBuf;

use clap::{Args, CommandFactory};

use super::Cli;
use crate::error::{Context, Result};
use crate::exit_code::ExitCode;

/// Write the man pages
#[derive(Debug, Args)]
#[command(after_help = "Example:
  flyrun man /usr/local/share/man/man1")]
pub struct Arguments {
    /// The directory to write flyrun.1, flyrun-run.1 and the others to
    directory: PathBuf,
}

pub fn execute(arguments: &Arguments) -> Result<ExitCode> {
    let told = || format!("cannot write to {}", arguments.directory.display());
    std::fs::create_dir_all(&arguments.directory).context(told())?;
    clap_mangen::generate_to(Cli::command(), &arguments.directory).context(told())?;
    Ok(ExitCode::Success)
}
