//! `flyrun scale`.

use std::collections::BTreeMap;
use std::path::Path;

use clap::{Args, Subcommand};
use serde::Serialize;

use super::{Context, print_json, print_line, table};
use crate::apps::load_file;
use crate::error::{Error, Result};
use crate::exit_code::ExitCode;
use crate::serve::{self, Ask, Scale, View, ask_all};

const FLY_TOML: &str = "fly.toml";

/// Change how many machines an app may have, and see it
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun scale count 3 -a shop
  flyrun scale count web=3 worker=1 -a shop    groups of [processes]
  flyrun scale show -a shop

The count of a group with a service takes the place of [flyrun] max_machines: so many machines there are at most, \
which start when requests need them; min_machines_running of them run in any case. Machines beyond a lower count end \
their requests and go. A group without a service has all of its machines run. The count is kept, also for the next \
flyrun serve, until it is changed by another; 0 stops a group.")]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Set the number of machines
    Count {
        /// The app [default: the one of ./fly.toml]
        #[arg(short, long, value_name = "APP")]
        app: Option<String>,
        /// How many; of which group, where the app has several
        #[arg(required = true, value_name = "N|GROUP=N", value_parser = count)]
        counts: Vec<(String, u32)>,
    },
    /// Show the number of machines, and what each has
    Show {
        /// The app [default: the one of ./fly.toml]
        #[arg(short, long, value_name = "APP")]
        app: Option<String>,
        /// Print as JSON
        #[arg(long)]
        json: bool,
    },
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    match &arguments.command {
        Command::Count { app, counts } => {
            let app = whose(app.as_deref())?;
            let mut wanted = BTreeMap::new();
            for (group, count) in counts {
                if wanted.insert(group.clone(), *count).is_some() {
                    let which = if group.is_empty() { "the number" } else { group };
                    return Err(Error::new(format!("{which} is given twice")));
                }
            }
            let ask = Ask::Scale(Scale { app: app.clone(), counts: wanted });
            serve::ask(&context.paths, &app, &ask, |_| Ok(()))?;
            print_line(&text(&rows(context, &app)?))?;
        }
        Command::Show { app, json } => {
            let rows = rows(context, &whose(app.as_deref())?)?;
            if *json {
                return print_json(&rows);
            }
            print_line(&text(&rows))?;
        }
    }
    Ok(ExitCode::Success)
}

fn whose(app: Option<&str>) -> Result<String> {
    if let Some(app) = app {
        return Ok(app.to_string());
    }
    let no_app = || {
        Error::new("there is no fly.toml here that names an app")
            .advice("Name the app (-a APP); `flyrun status` shows the apps that are served.")
    };
    Ok(load_file(Path::new(FLY_TOML)).map_err(|_| no_app())?.app.name)
}

/// A group and its machines.
#[derive(Debug, Serialize)]
struct Row {
    group: String,
    count: u32,
    min_machines_running: u32,
    running: usize,
    cpus: u8,
    memory_mib: u64,
}

impl Row {
    fn of(view: View) -> Row {
        let rests = |state: &str| matches!(state, "cold" | "suspended");
        Row {
            count: view.max_machines,
            min_machines_running: view.min_machines_running,
            running: view.machines.iter().filter(|machine| !rests(&machine.state)).count(),
            cpus: view.cpus,
            memory_mib: view.memory_mib,
            group: view.group,
        }
    }
}

fn rows(context: &Context, app: &str) -> Result<Vec<Row>> {
    let views = ask_all(&context.paths)?.into_iter().flat_map(|status| status.groups);
    let rows: Vec<_> = views.filter(|view| view.app == app && !view.is_leaving).map(Row::of).collect();
    if rows.is_empty() {
        return Err(Error::new(format!("no app '{}' is served here", app.escape_debug()))
            .advice("`flyrun status` shows those that are."));
    }
    Ok(rows)
}

fn text(rows: &[Row]) -> String {
    let mut table = table::new(&["GROUP", "COUNT", "MIN", "RUNNING", "CPUS", "MEMORY"]);
    for row in rows {
        table.add_row([
            row.group.clone(),
            row.count.to_string(),
            row.min_machines_running.to_string(),
            row.running.to_string(),
            row.cpus.to_string(),
            format!("{} MiB", row.memory_mib),
        ]);
    }
    table::text(&table)
}

fn count(text: &str) -> std::result::Result<(String, u32), String> {
    let (group, number) = text.split_once('=').unwrap_or(("", text));
    let number = number.parse().map_err(|_| "it must be N, or GROUP=N".to_string())?;
    Ok((group.to_string(), number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_is_of_the_app_or_of_a_group() {
        assert_eq!(count("3"), Ok((String::new(), 3)));
        assert_eq!(count("web=0"), Ok(("web".to_string(), 0)));
        for wrong in ["", "web", "web=", "web=-1", "web=x"] {
            assert!(count(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_group_is_a_row() {
        let told = text(&[Row::of(View::example(vec![]))]);
        let last = told.lines().last().unwrap();
        assert_eq!(last.split_whitespace().collect::<Vec<_>>(), ["app", "1", "0", "0", "1", "256", "MiB"]);
    }
}
