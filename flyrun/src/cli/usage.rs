//! `flyrun usage`: what machines have used, those that are gone too.

use std::time::UNIX_EPOCH;

use clap::Args;

use super::{Context, print_json, print_line, table};
use crate::error::{Context as _, Error, Result};
use crate::exit_code::ExitCode;
use crate::machine::State;
use crate::moment::Moment;
use crate::size::Size;
use crate::usage::{Interval, Ledger, Total, now_ms, totals};

/// Show what machines have used
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun usage
  flyrun usage --since 2026-11-01 --until 2026-12-01 --json > november.json
  flyrun usage --since 1h web

STARTED counts the seconds a machine ran, SUSPENDED those it was on disk; VCPU-S and GIB-S the former times the CPUs and the GiB of memory it had.
CPU-S is the host's CPU it really took. Machines that are gone are listed by their ids. All is recorded every second and
kept in the usage directory of --root, a file for each month; files of months that are settled may be removed.")]
pub struct Arguments {
    /// Only what was used after this: a time (2026-01-31T12:00:00Z), seconds since the epoch, or a duration (10m)
    #[arg(long, value_name = "TIME")]
    since: Option<Moment>,
    /// Only what was used before this
    #[arg(long, value_name = "TIME")]
    until: Option<Moment>,
    /// Print as JSON
    #[arg(long)]
    json: bool,
    /// Names, ids, or beginnings of ids; without any, all
    #[arg(value_name = "MACHINE")]
    machines: Vec<String>,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    let ledger = Ledger::new(context.paths.usage());
    let told = || "cannot read what machines have used";
    ledger.settle(&|id| context.machines().is_owned(id)).context(told())?;
    let since = arguments.since.map_or(0, milliseconds);
    let until = arguments.until.map_or(u64::MAX, milliseconds);
    let (mut intervals, damaged) = ledger.read(since, until).context(told())?;
    if damaged > 0 {
        anstream::eprintln!("flyrun: {damaged} damaged records are not counted");
    }
    // What is not over is in the machines' records.
    let records = context.machines().list()?;
    let suspended = records.iter().filter(|record| record.state == State::Suspended);
    let running_on = suspended.filter_map(|record| Interval::suspended(record, now_ms()));
    intervals.extend(running_on.filter(|interval| interval.from_ms < until && interval.to_ms >= since));
    let mut all = totals(intervals, since, until);
    for wanted in &arguments.machines {
        if !all.iter().any(|total| is_meant(total, wanted)) {
            return Err(Error::new(format!("nothing was used by a machine '{wanted}' in this time"))
                .advice("`flyrun usage` lists all that have used something."));
        }
    }
    all.retain(|total| {
        arguments.machines.is_empty() || arguments.machines.iter().any(|wanted| is_meant(total, wanted))
    });
    if arguments.json {
        return print_json(&all);
    }
    print_line(&human(&all))?;
    Ok(ExitCode::Success)
}

fn is_meant(total: &Total, wanted: &str) -> bool {
    total.name == wanted || (!wanted.is_empty() && total.id.starts_with(wanted))
}

fn milliseconds(Moment(at): Moment) -> u64 {
    at.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}

fn human(totals: &[Total]) -> String {
    let mut rows =
        table::new(&["ID", "STARTED", "SUSPENDED", "VCPU-S", "GIB-S", "CPU-S", "NET IN", "NET OUT", "NAME"]);
    let sum = (totals.len() > 1).then(|| Total::sum(totals));
    for total in totals.iter().chain(&sum) {
        rows.add_row([
            total.id.clone(),
            duration(total.started_s),
            duration(total.suspended_s),
            format!("{:.1}", total.vcpu_s),
            format!("{:.1}", total.memory_mib_s / 1024.0),
            format!("{:.1}", total.cpu_s),
            Size(total.net_in).to_string(),
            Size(total.net_out).to_string(),
            total.name.clone(),
        ]);
    }
    table::text(&rows)
}

/// Such as 4.2s, 3m20s or 12h5m: what matters of it.
fn duration(seconds: f64) -> String {
    let whole = seconds as u64;
    match whole {
        0..60 => format!("{seconds:.1}s"),
        60..3600 => format!("{}m{}s", whole / 60, whole % 60),
        _ => format!("{}h{}m", whole / 3600, whole / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_short() {
        assert_eq!([4.25, 200.0, 43_500.0].map(duration), ["4.2s", "3m20s", "12h5m"]);
    }

    #[test]
    fn moments_before_the_epoch_are_its_beginning() {
        assert_eq!(milliseconds(Moment(UNIX_EPOCH - std::time::Duration::from_secs(1))), 0);
        assert!(milliseconds(Moment(std::time::SystemTime::now())) > 1_700_000_000_000);
    }
}
