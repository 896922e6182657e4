//! `flyrun config`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use app::config::{Refused, model::App, to_toml};
use clap::{Args, Subcommand};

use super::{print_json, print_line};
use crate::apps::{AppFile, load, load_file};
use crate::error::{Context as _, Result};
use crate::exit_code::ExitCode;

/// Check the files that describe apps (fly.toml), and see what they say
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun config validate fly.toml        what is wrong with it, all at once
  flyrun config validate /etc/flyrun     every *.toml there, and whether one proxy can serve them all
  flyrun config show fly.toml            with all defaults filled in
  flyrun config show --json fly.toml | jq .services

Exit codes: 0 when all files are fine, 125 when one is not. README.md lists the keys that are supported.")]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say what is wrong with files, or nothing
    Validate {
        /// A fly.toml, or a directory of them as one proxy would serve it
        #[arg(required = true, value_name = "FILE|DIR")]
        paths: Vec<PathBuf>,
    },
    /// Print a file with all defaults filled in
    Show {
        /// Print as JSON
        #[arg(long)]
        json: bool,
        /// A fly.toml
        #[arg(value_name = "FILE")]
        path: PathBuf,
    },
}

pub fn execute(arguments: &Arguments) -> Result<ExitCode> {
    match &arguments.command {
        Command::Validate { paths } => validate(paths),
        Command::Show { json, path } => show(path, *json),
    }
}

fn validate(paths: &[PathBuf]) -> Result<ExitCode> {
    let mut code = ExitCode::Success;
    for path in paths {
        match load(path) {
            Ok(files) => files.iter().try_for_each(|file| print_line(&summary(file)))?,
            Err(refused) => code = tell(&refused),
        }
    }
    Ok(code)
}

fn show(path: &Path, json: bool) -> Result<ExitCode> {
    let file = match load_file(path) {
        Ok(file) => file,
        Err(refused) => return Ok(tell(&refused)),
    };
    let table = to_toml(&file.app);
    if json {
        return print_json(&table);
    }
    let text = toml::to_string(&table).context("cannot write TOML")?;
    print_line(text.trim_end())?;
    Ok(ExitCode::Success)
}

/// `shop.toml: app shop, image nginx, ports 80, 443`.
fn summary(file: &AppFile) -> String {
    let App { name, image, services, .. } = &file.app;
    let ports: BTreeSet<_> = services
        .iter()
        .flat_map(|service| &service.ports)
        .map(|port| (*port.numbers.start(), *port.numbers.end()))
        .collect();
    let ports: Vec<_> = ports
        .into_iter()
        .map(|(first, last)| if first == last { first.to_string() } else { format!("{first}-{last}") })
        .collect();
    let ports = match ports.as_slice() {
        [] => "no ports".to_string(),
        [port] if !port.contains('-') => format!("port {port}"),
        ports => format!("ports {}", ports.join(", ")),
    };
    format!("{}: app {name}, image {image}, {ports}", file.name.escape_debug())
}

fn tell(refused: &Refused) -> ExitCode {
    for problem in &refused.problems {
        anstream::eprintln!("flyrun: {problem}");
    }
    if refused.left_out > 0 {
        anstream::eprintln!("flyrun: and {} more", refused.left_out);
    }
    ExitCode::Flyrun
}
