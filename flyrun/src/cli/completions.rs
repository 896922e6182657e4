//! `flyrun completions`.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, print_line};
use crate::error::Result;
use crate::exit_code::ExitCode;

/// Print the completions of a shell
#[derive(Debug, Args)]
#[command(after_help = "Example:
  flyrun completions bash > /etc/bash_completion.d/flyrun")]
pub struct Arguments {
    /// The shell
    shell: Shell,
}

pub fn execute(arguments: &Arguments) -> Result<ExitCode> {
    let mut text = Vec::new();
    clap_complete::generate(arguments.shell, &mut Cli::command(), "flyrun", &mut text);
    print_line(String::from_utf8_lossy(&text).trim_end())?;
    Ok(ExitCode::Success)
}
