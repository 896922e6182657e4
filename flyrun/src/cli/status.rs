//! `flyrun status`.

use std::io::Write as _;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::{Context, print_json, print_line, table};
use crate::error::{Error, Result};
use crate::exit_code::ExitCode;
use crate::serve::{MachineView, View, ask_all};

const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// Puts the cursor into the upper left corner and clears what is below.
const CLEAR: &str = "\x1b[H\x1b[J";

/// Show the apps that are served, with their machines
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun status
  flyrun status --watch web
  flyrun status --json | jq '.[].machines[] | select(.state == \"ready\") | .id'

States: cold (there is none, or it is stopped), starting, ready, failing (a check fails: it gets no requests), \
draining, suspending, stopping, suspended; `busy 20 s` where the workload itself says that it works (PUT /.flyrun/busy \
on /run/flyrun/api.sock in the machine), for so long. LOAD is requests or connections, as the app counts; LAST START tells from \
what (resumed, base or cold), how long it took until the machine was ready, and when.")]
pub struct Arguments {
    /// Go on, each second anew
    #[arg(short, long, conflicts_with = "json")]
    watch: bool,
    /// Print as JSON
    #[arg(long)]
    json: bool,
    /// Only this app
    app: Option<String>,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    if !arguments.watch {
        let groups = groups(context, arguments)?;
        if arguments.json {
            return print_json(&groups);
        }
        print_line(&text(&groups))?;
        return Ok(ExitCode::Success);
    }
    loop {
        let told = text(&groups(context, arguments)?);
        let mut stdout = std::io::stdout().lock();
        if writeln!(stdout, "{CLEAR}{told}").and_then(|()| stdout.flush()).is_err() {
            return Ok(ExitCode::Success);
        }
        drop(stdout);
        std::thread::sleep(WATCH_INTERVAL);
    }
}

/// A group, and who serves it.
#[derive(Debug, Serialize)]
struct Told {
    pid: u32,
    #[serde(flatten)]
    group: View,
}

fn groups(context: &Context, arguments: &Arguments) -> Result<Vec<Told>> {
    let all = ask_all(&context.paths)?;
    let told = all.into_iter().flat_map(|status| {
        let pid = status.pid;
        status.groups.into_iter().map(move |group| Told { pid, group })
    });
    let wanted = |told: &Told| arguments.app.as_ref().is_none_or(|app| *app == told.group.app);
    let groups: Vec<_> = told.filter(wanted).collect();
    match &arguments.app {
        Some(app) if groups.is_empty() => {
            Err(Error::new(format!("no app '{}' is served here", app.escape_debug()))
                .advice("`flyrun status` shows those that are."))
        }
        _ => Ok(groups),
    }
}

fn text(groups: &[Told]) -> String {
    let rows = groups.iter().flat_map(|told| {
        let machines = told.group.machines.iter().map(|machine| row(&told.group, Some(machine)));
        let none = told.group.machines.is_empty().then(|| row(&told.group, None));
        machines.chain(none).collect::<Vec<_>>()
    });
    let mut table = table::new(&["APP", "MACHINE", "STATE", "LOAD", "WAITING", "LAST START", "TROUBLE"]);
    rows.for_each(|row| _ = table.add_row(row));
    table::text(&table)
}

fn row(group: &View, machine: Option<&MachineView>) -> Vec<String> {
    let Some(machine) = machine else {
        let nothing = String::new;
        let state = "cold".to_string();
        return vec![
            group.app.clone(),
            nothing(),
            state,
            nothing(),
            group.waiting.to_string(),
            nothing(),
            nothing(),
        ];
    };
    let troubles: Vec<_> =
        machine.trouble.iter().chain(&machine.checks).map(|text| printable(text)).collect();
    vec![
        group.app.clone(),
        machine.name.clone(),
        match machine.busy_seconds {
            Some(left) => format!("{}, busy {left} s", machine.state),
            None => machine.state.clone(),
        },
        machine.load.to_string(),
        group.waiting.to_string(),
        last_start(machine),
        troubles.join("; "),
    ]
}

fn last_start(machine: &MachineView) -> String {
    let (Some(kind), Some(ms), Some(at)) =
        (&machine.last_start, machine.last_start_ms, machine.last_start_at)
    else {
        return String::new();
    };
    format!("{kind}, {ms:.0} ms, {}", table::ago(at))
}

/// The first line, without control characters.
fn printable(text: &str) -> String {
    text.lines().next().unwrap_or_default().chars().filter(|c| !c.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_a_row_and_a_group_without_one_too() {
        let machine = MachineView {
            state: "failing".into(),
            load: 3,
            last_start: Some("resumed".into()),
            last_start_at: Some(0),
            last_start_ms: Some(12.4),
            trouble: Some("port 80: \x1b[31mstatus 500\nmore".into()),
            ..MachineView::example()
        };
        let view = View::example;
        let groups = [Told { pid: 1, group: view(vec![machine]) }, Told { pid: 1, group: view(vec![]) }];
        let told = text(&groups);
        let lines: Vec<_> = told.lines().collect();
        assert_eq!(lines.len(), 3, "{told}");
        assert!(lines[1].contains("web-app-0") && lines[1].contains("resumed, 12 ms"), "{told}");
        assert!(lines[1].ends_with("port 80: [31mstatus 500"), "{told}");
        assert!(lines[2].contains("cold"), "{told}");
    }
}
