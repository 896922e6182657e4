//! `flyrun inspect`.

use clap::Args;
use serde::Serialize;

use super::{Context, health::health, network::facts, print_json};
use crate::error::Result;
use crate::exit_code::ExitCode;
use crate::machine::Record;
use crate::machine::health::Health;
use crate::monitor::busy_seconds;
use crate::network::Facts;

/// Print all that is known of machines, as JSON
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun inspect web
  flyrun inspect web | jq '.[0].state'
  flyrun inspect web | jq '.[0].config.run.env'")]
pub struct Arguments {
    /// Names, ids, or beginnings of ids
    #[arg(required = true, value_name = "MACHINE")]
    machines: Vec<String>,
}

#[derive(Serialize)]
struct Inspected {
    #[serde(flatten)]
    record: Record,
    directory: std::path::PathBuf,
    run_directory: Option<std::path::PathBuf>,
    network: Option<Facts>,
    /// How long its workload is still to be left running, though nobody may ask it anything, as it says.
    busy_seconds: Option<u64>,
    /// What its health checks have found out since its start.
    health: Option<Health>,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    let machines = context.machines();
    let records = arguments.machines.iter().map(|name| machines.find(name)).collect::<Result<Vec<_>>>()?;
    let inspected: Vec<_> = records
        .into_iter()
        .map(|record| Inspected {
            directory: context.paths.machines().join(&record.id),
            health: health(context, &record),
            network: facts(context, &record),
            busy_seconds: record
                .state
                .needs_monitor()
                .then(|| busy_seconds(&context.paths.run_dir(&record.id)))
                .flatten(),
            run_directory: record.state.needs_monitor().then(|| context.paths.run_dir(&record.id)),
            record,
        })
        .collect();
    print_json(&inspected)
}
