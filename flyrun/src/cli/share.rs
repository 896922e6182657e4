//! `flyrun-monitor share`: the process that becomes a virtiofsd. Started by monitors, not by users.

use clap::Args;

use crate::error::Result;
use crate::exit_code::ExitCode;
use crate::share::{self, Order};

/// Serve a directory of the host to a machine
#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    order: Order,
}

pub fn execute(arguments: &Arguments) -> Result<ExitCode> {
    share::become_daemon(&arguments.order)?;
    Ok(ExitCode::Success)
}
