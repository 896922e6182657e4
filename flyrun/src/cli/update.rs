//! `flyrun update`.

use clap::Args;

use super::limits::{PidsLimit, RateArguments, cpu_shares};
use super::{Context, each::each, lifecycle, new_machine};
use crate::cpus::Cpus;
use crate::error::{Error, Result};
use crate::exit_code::ExitCode;
use crate::machine::restart::RestartPolicy;
use crate::machine::{Changes, Patience, Record};
use crate::monitor::{Reply, Request};
use crate::signal::Signal;
use crate::size::Size;

/// Change how machines are run
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun update --restart always web
  flyrun update --cpus 0.5 web              half a CPU from now on
  flyrun update --memory 1g web && flyrun restart web
  flyrun update --label tier=front --label-rm test web

What a running machine cannot have at once (memory, another number of vCPUs, the limit of processes, rates) it gets when it
starts next; that is told on standard error.")]
pub struct Arguments {
    /// CPUs, 0.01 to 32
    #[arg(long, value_name = "N")]
    cpus: Option<Cpus>,
    /// Share of the CPU when machines compete for it, 2 to 262144
    #[arg(long, value_name = "N", value_parser = cpu_shares)]
    cpu_shares: Option<u32>,
    /// Memory of the machine
    #[arg(short, long, value_name = "SIZE")]
    memory: Option<Size>,
    /// Most processes and threads of the workload; -1 for no limit
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pids_limit: Option<PidsLimit>,
    #[command(flatten)]
    rates: RateArguments,
    /// Start the machine again when it ends: no, on-failure[:N], always or unless-stopped
    #[arg(long, value_name = "POLICY")]
    restart: Option<RestartPolicy>,
    /// The signal that asks the process to end
    #[arg(long, value_name = "SIGNAL")]
    stop_signal: Option<Signal>,
    /// Seconds until a process that was asked to end is killed
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(..=3600))]
    stop_timeout: Option<u32>,
    /// Set a label
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    label: Vec<String>,
    /// Remove a label
    #[arg(long, value_name = "KEY")]
    label_rm: Vec<String>,
    /// Names, ids, or beginnings of ids
    #[arg(required = true, value_name = "MACHINE")]
    machines: Vec<String>,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    let changes = changes(arguments)?;
    if changes.is_empty() {
        return Err(
            Error::new("nothing is to be changed").advice("`flyrun update --help` lists what can be.")
        );
    }
    each(context, &arguments.machines, |context, record| update(context, record, &changes))
}

fn changes(arguments: &Arguments) -> Result<Changes> {
    if let Some(memory) = arguments.memory {
        new_machine::check_memory(memory)?;
    }
    Ok(Changes {
        cpus: arguments.cpus.map(|cpus| (cpus.count(), cpus.quota_milli())),
        cpu_shares: arguments.cpu_shares,
        memory: arguments.memory,
        pids: arguments.pids_limit.map(|PidsLimit(limit)| limit.unwrap_or(0)),
        rates: arguments.rates.rates(),
        restart: arguments.restart,
        stop_signal: arguments.stop_signal.map(|signal| signal.0),
        stop_timeout_s: arguments.stop_timeout,
        labels: new_machine::parse_labels(&arguments.label)?,
        remove_labels: arguments.label_rm.clone(),
    })
}

fn update(context: &Context, record: &Record, changes: &Changes) -> Result<()> {
    let machines = context.machines();
    // Between the two its monitor may come or go.
    for _ in 0..2 {
        if let Some(mut machine) = machines.acquire(&record.id, Patience::Glance)? {
            let mut config = machine.record().config.clone();
            changes.apply(&mut config).map_err(Error::new)?;
            return machine.update(|record| record.config = config);
        }
        match lifecycle::ask(context, record, &Request::Update(Box::new(changes.clone())))? {
            Reply::Updated { later } => {
                tell(record, &later);
                return Ok(());
            }
            _ => continue,
        }
    }
    Err(Error::new("the machine starts and ends all the time").advice("Stop it first with `flyrun stop`."))
}

fn tell(record: &Record, later: &[String]) {
    if !later.is_empty() {
        let what = later.join(", ");
        anstream::eprintln!("flyrun: {what} of {} will be as wanted after `flyrun restart {0}`", record.name);
    }
}
