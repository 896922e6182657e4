//! The command line of `flyrun-monitor`.

use clap::{Parser, Subcommand};

use super::{Context, Places, monitor, share};
use crate::error::Result;
use crate::exit_code::ExitCode;
use crate::paths::Paths;

/// What flyrun starts by itself.
#[derive(Debug, Parser)]
#[command(name = "flyrun-monitor", version, disable_help_subcommand = true)]
pub struct Background {
    #[command(flatten)]
    places: Places,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Monitor(monitor::Arguments),
    Share(share::Arguments),
}

impl Background {
    /// Reads the command line.
    ///
    /// # Errors
    /// It is not understood, or asks for help.
    pub fn read() -> std::result::Result<Background, clap::Error> {
        Background::try_parse()
    }

    /// Does what the command line says.
    ///
    /// # Errors
    /// It cannot be done.
    pub fn execute(self) -> Result<ExitCode> {
        let context = Context { paths: Paths { root: self.places.root, run: self.places.run_dir } };
        match self.command {
            Command::Monitor(arguments) => monitor::execute(&context, &arguments),
            Command::Share(arguments) => share::execute(&arguments),
        }
    }
}
