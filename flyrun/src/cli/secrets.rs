//! `flyrun secrets`.

use std::io::{IsTerminal, Read};
use std::path::PathBuf;

use clap::{Args, Subcommand};
use zeroize::Zeroizing;

use super::{Context, print_json, print_line, table};
use crate::apps;
use crate::error::{Context as _, Error, Result};
use crate::exit_code::ExitCode;
use crate::secrets::{Name, Secrets, Value, check_app, name};

/// What is read where neither app nor file is given.
const FLY_TOML: &str = "fly.toml";
/// The most bytes that `import` reads.
const MAX_IMPORT_BYTES: usize = 1 << 20;

/// Keep what an app's machines may know and nobody else
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun secrets set -a shop DATABASE_URL=- < url   a value that no command line shows
  flyrun secrets import -a shop < .env              lines of NAME=VALUE
  flyrun secrets set -a shop MODE=test DEBUG=1      whoever sees this host's processes sees them
  flyrun secrets list -a shop
  flyrun run --secrets shop alpine env              a machine that has them

Secrets are encrypted on disk (ChaCha20-Poly1305). The key is secrets.key below the root, or the
file that FLYRUN_SECRETS_KEY_FILE names. They come to machines over vsock alone: as variables, over
others of the same name, and as files (--file-secret; secret_name in [[files]]). A machine is told
them at each start, and has those until its next one. Its memory holds them as it holds everything,
so a suspended machine and a snapshot have them on disk.")]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

/// Whose secrets.
#[derive(Debug, Args)]
struct Whose {
    /// The app [default: the one of ./fly.toml]
    #[arg(short, long, value_name = "APP")]
    app: Option<String>,
    /// The app of this fly.toml
    #[arg(short, long, value_name = "FILE", conflicts_with = "app")]
    config: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Set secrets
    Set {
        #[command(flatten)]
        whose: Whose,
        /// Names and values; '-' reads the value from standard input, all of it
        #[arg(required = true, value_name = "NAME=VALUE|NAME=-")]
        secrets: Vec<String>,
    },
    /// Set secrets from lines of NAME=VALUE on standard input
    Import {
        #[command(flatten)]
        whose: Whose,
    },
    /// Take secrets away
    Unset {
        #[command(flatten)]
        whose: Whose,
        /// Their names
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
    /// List secrets: names, digests and times, never values
    #[command(visible_alias = "ls")]
    List {
        #[command(flatten)]
        whose: Whose,
        /// Print as JSON
        #[arg(long)]
        json: bool,
    },
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    let store = Secrets::new(&context.paths);
    match &arguments.command {
        Command::Set { whose, secrets } => set(&store, &whose.name()?, given(secrets)?),
        Command::Import { whose } => {
            let app = whose.name()?;
            let secrets = name::read_lines(&input(MAX_IMPORT_BYTES)?)?;
            if secrets.is_empty() {
                return Err(Error::new("standard input has no secrets")
                    .advice("Give lines of NAME=VALUE, such as `flyrun secrets import < .env`."));
            }
            set(&store, &app, secrets)
        }
        Command::Unset { whose, names } => {
            let names = names.iter().map(|name| Name::new(name)).collect::<Result<Vec<_>>>()?;
            let app = whose.name()?;
            store.unset(&app, &names)?;
            print_line(&format!(
                "{app}: {} unset; machines lack them from their next start on",
                count(names.len())
            ))?;
            Ok(ExitCode::Success)
        }
        Command::List { whose, json } => list(&store, &whose.name()?, *json),
    }
}

impl Whose {
    fn name(&self) -> Result<String> {
        if let Some(app) = &self.app {
            check_app(app)?;
            return Ok(app.clone());
        }
        let path = self.config.clone().unwrap_or_else(|| FLY_TOML.into());
        if self.config.is_none() && !path.exists() {
            return Err(Error::new("it is not said which app").advice("Give -a APP, or --config FILE."));
        }
        match apps::load_file(&path) {
            Ok(file) => Ok(file.app.name),
            Err(refused) => {
                let problem = refused.problems.first().map(ToString::to_string).unwrap_or_default();
                Err(Error::new(problem))
            }
        }
    }
}

fn given(words: &[String]) -> Result<Vec<(Name, Value)>> {
    let mut secrets: Vec<(Name, Value)> = Vec::new();
    let mut from_input = None;
    for word in words {
        // A word without a name may be a value, which is not for messages.
        let (name, value) = word.split_once('=').ok_or_else(|| {
            Error::new("a secret was given without '='")
                .advice("Write NAME=VALUE, or NAME=- and the value on standard input.")
        })?;
        let name = Name::new(name)?;
        if secrets.iter().any(|(other, _)| *other == name) {
            return Err(Error::new(format!("{name} is to be set twice")).advice("Give each name once."));
        }
        let value = match value {
            "-" => match from_input.replace(name.clone()) {
                None => input(name::MAX_VALUE_BYTES)?,
                Some(other) => {
                    return Err(Error::new(format!(
                        "{other} and {name} are both to be read from standard input"
                    ))
                    .advice("Use `flyrun secrets import` for several."));
                }
            },
            value => Zeroizing::new(value.to_string()),
        };
        secrets.push((name.clone(), Value::new(&name, value)?));
    }
    Ok(secrets)
}

/// All of standard input.
fn input(limit: usize) -> Result<Zeroizing<String>> {
    let stdin = std::io::stdin();
    if stdin.is_terminal() {
        return Err(Error::new(
            "secrets are read from standard input, and that is a terminal, which would show them",
        )
        .advice("Give a file or a pipe, such as `… < FILE`."));
    }
    // Room for all: a text that grows leaves copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(limit + 1));
    stdin.lock().take(limit as u64 + 1).read_to_end(&mut bytes).context("cannot read standard input")?;
    if bytes.len() > limit {
        return Err(Error::new(format!("standard input has more than {} KiB", limit >> 10))
            .advice("Secrets are short; give what is large as a volume."));
    }
    let text = std::str::from_utf8(&bytes).map_err(|_| {
        Error::new("standard input is not text in UTF-8, as a variable has it").advice("Encode it as base64.")
    })?;
    Ok(Zeroizing::new(text.to_string()))
}

fn set(store: &Secrets, app: &str, secrets: Vec<(Name, Value)>) -> Result<ExitCode> {
    let given = secrets.len();
    let changed = store.set(app, secrets)?;
    let told = match changed {
        0 => format!("{app}: {} unchanged", count(given)),
        changed => format!("{app}: {} set; machines have them from their next start on", count(changed)),
    };
    print_line(&told)?;
    Ok(ExitCode::Success)
}

fn count(secrets: usize) -> String {
    if secrets == 1 { "1 secret".into() } else { format!("{secrets} secrets") }
}

fn list(store: &Secrets, app: &str, json: bool) -> Result<ExitCode> {
    let list = store.list(app)?;
    if json {
        return print_json(&list);
    }
    let mut rows = table::new(&["NAME", "DIGEST", "CREATED"]);
    for listed in &list {
        rows.add_row([listed.name.to_string(), listed.digest.clone(), table::ago(listed.created_at)]);
    }
    print_line(&table::text(&rows))?;
    Ok(ExitCode::Success)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Result<Vec<(Name, Value)>> {
        given(&words.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    #[test]
    fn names_and_values_are_taken_apart_at_the_first_sign() {
        let secrets = words(&["A=1", "B=x=y", "C="]).unwrap();
        let secrets: Vec<_> = secrets.iter().map(|(name, value)| (name.as_str(), value.expose())).collect();
        assert_eq!(secrets, [("A", "1"), ("B", "x=y"), ("C", "")]);
    }

    #[test]
    fn what_cannot_be_set_is_refused_without_its_value() {
        for given in [&["hunter2"][..], &["1=hunter2"], &["A=hunter2", "A=hunter2"], &["FLY_X=hunter2"]] {
            let told = words(given).unwrap_err().to_string();
            assert!(!told.contains("hunter2"), "{told}");
        }
    }
}
