//! `flyrun ps`.

use clap::Args;
use serde::Serialize;

use super::{Context, network::facts, print_json, print_line, table};
use crate::error::{Error, Result};
use crate::exit_code::ExitCode;
use crate::machine::health::Status;
use crate::machine::{Record, State};
use crate::network::publish::Publish;

/// List machines
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun ps                               those that run
  flyrun ps -a                            all
  flyrun ps -aq --filter status=stopped | xargs -r flyrun rm
  flyrun ps --json | jq -r '.[].name'")]
pub struct Arguments {
    /// Also list machines that do not run
    #[arg(short, long)]
    all: bool,
    /// Print ids only
    #[arg(short, long)]
    quiet: bool,
    /// List only some: name=TEXT, status=STATE, health=STATUS or label=KEY[=VALUE]
    #[arg(short, long, value_name = "KEY=VALUE")]
    filter: Vec<String>,
    /// Print as JSON
    #[arg(long, conflicts_with = "quiet")]
    json: bool,
}

/// The fields of `--json`; their names are stable.
#[derive(Serialize)]
struct Row<'a> {
    id: &'a str,
    name: &'a str,
    image: &'a str,
    command: &'a [String],
    state: State,
    created_at: u64,
    started_at: Option<u64>,
    restarts: u32,
    health: Option<Status>,
    ports: Vec<Publish>,
    exit_code: Option<u8>,
    error: Option<&'a str>,
    labels: &'a std::collections::BTreeMap<String, String>,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    let filters: Vec<Filter> =
        arguments.filter.iter().map(|text| Filter::parse(text)).collect::<Result<_>>()?;
    let health = |record: &Record| super::health::health(context, record).map(|health| health.status);
    let ports = |record: &Record| facts(context, record).map_or(vec![], |facts| facts.ports);
    let by_state = filters.iter().any(|filter| matches!(filter, Filter::Status(_)));
    let mut records = context.machines().list()?;
    // What a machine that is gone has left may need rights that this user has not.
    let _ = context.keep_house();
    records.retain(|record| {
        (arguments.all || by_state || record.state.needs_monitor() || record.state == State::Suspended)
            && filters.iter().all(|filter| filter.keeps(record, &health))
    });
    // The newest first, as docker lists them.
    records.reverse();
    if arguments.json {
        return print_json(
            &records.iter().map(|record| row(record, health(record), ports(record))).collect::<Vec<_>>(),
        );
    }
    if arguments.quiet {
        for record in &records {
            print_line(&record.id)?;
        }
        return Ok(ExitCode::Success);
    }
    let mut rows = table::new(&["ID", "IMAGE", "COMMAND", "CREATED", "STATUS", "PORTS", "NAME"]);
    for record in &records {
        rows.add_row([
            record.id.clone(),
            record.image.clone(),
            command(record),
            table::ago(record.created_at),
            status(record, health(record)),
            ports(record).iter().map(super::port::arrow).collect::<Vec<_>>().join(", "),
            record.name.clone(),
        ]);
    }
    print_line(&table::text(&rows))?;
    Ok(ExitCode::Success)
}

fn row(record: &Record, health: Option<Status>, ports: Vec<Publish>) -> Row<'_> {
    let outcome = record.outcome.as_ref().filter(|_| !record.state.needs_monitor());
    Row {
        id: &record.id,
        name: &record.name,
        image: &record.image,
        command: &record.config.run.argv,
        state: record.state,
        created_at: record.created_at,
        started_at: record.started_at,
        restarts: record.restarts,
        health,
        ports,
        exit_code: outcome.map(|outcome| outcome.exit_code),
        error: outcome.and_then(|outcome| outcome.error.as_deref()),
        labels: &record.config.labels,
    }
}

/// What it runs, in at most 20 characters.
fn command(record: &Record) -> String {
    let whole = record.config.run.argv.join(" ");
    let printable: String = whole.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    match printable.chars().count() {
        0..=20 => printable,
        _ => printable.chars().take(19).chain(['…']).collect(),
    }
}

fn status(record: &Record, health: Option<Status>) -> String {
    match (record.state, &record.outcome, record.started_at) {
        (State::Stopped | State::Failed, Some(outcome), _) => {
            format!("{} ({}) {}", record.state, outcome.exit_code, table::ago(outcome.finished_at))
        }
        (State::Starting, Some(outcome), _) if record.restarts > 0 => {
            format!("restarting ({}) {}", outcome.exit_code, table::ago(outcome.finished_at))
        }
        (State::Suspended, ..) if record.snapshot.is_some() => {
            let taken_at = record.snapshot.as_ref().map_or(0, |snapshot| snapshot.taken_at_ms / 1000);
            format!("{} {}", record.state, table::ago(taken_at))
        }
        (State::Paused, _, Some(at)) => format!("{} {} (paused)", State::Started, table::ago(at)),
        (State::Started | State::Stopping, _, Some(at)) => {
            let health = health.map_or(String::new(), |status| format!(" ({status})"));
            format!("{} {}{health}", record.state, table::ago(at))
        }
        (state, _, _) => state.to_string(),
    }
}

pub enum Filter {
    Name(String),
    Status(State),
    Health(Status),
    Label(String, Option<String>),
}

impl Filter {
    pub fn parse(text: &str) -> Result<Filter> {
        let bad = |advice: &str| Error::new(format!("--filter '{text}' is not understood")).advice(advice);
        let usage = "Write name=TEXT, status=STATE, health=STATUS or label=KEY[=VALUE].";
        match text.split_once('=') {
            Some(("name", part)) => Ok(Filter::Name(part.to_string())),
            Some(("label", label)) => Ok(match label.split_once('=') {
                Some((key, value)) => Filter::Label(key.to_string(), Some(value.to_string())),
                None => Filter::Label(label.to_string(), None),
            }),
            Some(("health", wanted)) => {
                let found = Status::ALL.into_iter().find(|known| known.to_string() == wanted);
                found.map(Filter::Health).ok_or_else(|| bad("Health is starting, healthy or unhealthy."))
            }
            Some(("status", state)) => {
                let found = State::ALL.into_iter().find(|known| known.to_string() == state);
                let names = State::ALL.map(|state| state.to_string()).join(", ");
                found.map(Filter::Status).ok_or_else(|| bad(&format!("The states are {names}.")))
            }
            _ => Err(bad(usage)),
        }
    }

    fn keeps(&self, record: &Record, health: &dyn Fn(&Record) -> Option<Status>) -> bool {
        match self {
            Filter::Name(part) => record.name.contains(part),
            Filter::Status(state) => record.state == *state,
            Filter::Health(wanted) => health(record) == Some(*wanted),
            Filter::Label(key, None) => record.config.labels.contains_key(key),
            Filter::Label(key, Some(value)) => record.config.labels.get(key) == Some(value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_choose_by_name_state_and_label() {
        let mut record = Record::example("web-1");
        record.config.labels.insert("app".into(), "shop".into());
        for (text, kept) in [
            ("name=web", true),
            ("name=db", false),
            ("status=created", true),
            ("status=started", false),
            ("label=app", true),
            ("label=app=shop", true),
            ("label=app=other", false),
            ("label=none", false),
            ("health=healthy", true),
            ("health=starting", false),
        ] {
            assert_eq!(
                Filter::parse(text).unwrap().keeps(&record, &|_| Some(Status::Healthy)),
                kept,
                "{text}"
            );
        }
        for text in ["", "name", "status=running", "health=fine", "size=1"] {
            assert!(Filter::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_long_command_is_cut_and_control_characters_go() {
        let mut record = Record::example("");
        record.config.run.argv = vec!["sh".into(), "-c".into(), "echo\n\x1b[31m 1234567890 1234".into()];
        let told = command(&record);
        assert_eq!(told.chars().count(), 20);
        assert!(!told.chars().any(char::is_control));
    }
}
