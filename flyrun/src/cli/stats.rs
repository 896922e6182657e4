//! `flyrun stats`: what machines use, in the guest's own figures and the host's.

use std::io::{ErrorKind, IsTerminal, Write};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use protocol::session::{FromSession, GuestStats, Request};
use serde::Serialize;

use super::{Context, table};
use crate::error::{Context as _, Error, Result};
use crate::exit_code::ExitCode;
use crate::machine::{Record, State};
use crate::session;
use crate::size::Size;
use crate::vm_usage::{VmUsage, vm_usage};

/// Between two looks at the same machine.
const INTERVAL: Duration = Duration::from_secs(1);

/// Show what running machines use
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun stats
  flyrun stats --no-stream --json web | jq .host.pss

CPU is the workload's, in percent of one processor. MEM is what the guest uses and has; HOST MEM what the machine takes
of the host's memory (PSS: pages shared by several machines count in parts), HOST CPU what its VMM takes of a processor.
With --json a line per machine is printed: counters in bytes and microseconds.

Exit codes: 0; 125 when a machine does not exist or does not run.")]
pub struct Arguments {
    /// Look once (twice within a second, to tell the CPU's use) and end
    #[arg(long)]
    no_stream: bool,
    /// Print a line of JSON for each machine
    #[arg(long)]
    json: bool,
    /// Names, ids, or beginnings of ids; without any, all that run
    #[arg(value_name = "MACHINE")]
    machines: Vec<String>,
}

/// One look at a machine.
#[derive(Clone, Copy, Debug)]
struct Look {
    at: Instant,
    guest: GuestStats,
    host: VmUsage,
}

/// What is printed as JSON.
#[derive(Debug, Serialize)]
struct Line<'a> {
    id: &'a str,
    name: &'a str,
    cpu_percent: f64,
    guest: GuestStats,
    host: VmUsage,
    host_cpu_percent: f64,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    let mut before = look_at_all(context, &arguments.machines)?;
    loop {
        thread::sleep(INTERVAL);
        let now = look_at_all(context, &arguments.machines)?;
        let lines: Vec<Line<'_>> = now
            .iter()
            .filter_map(|(machine, look)| {
                let (_, earlier) = before.iter().find(|(other, _)| other.id == machine.id)?;
                Some(line(&machine.id, &machine.name, earlier, look))
            })
            .collect();
        let is_read = show(&lines, arguments)?;
        if arguments.no_stream || !is_read {
            return Ok(ExitCode::Success);
        }
        before = now;
    }
}

fn look_at_all(context: &Context, wanted: &[String]) -> Result<Vec<(Record, Look)>> {
    if wanted.is_empty() {
        // Of all machines, one that is just starting or ending is left out.
        let running =
            context.machines().list()?.into_iter().filter(|machine| machine.state == State::Started);
        return Ok(running
            .filter_map(|machine| look(context, &machine).ok().map(|look| (machine, look)))
            .collect());
    }
    let look_at = |wanted: &String| {
        let machine = session::find_running(&context.machines(), wanted)?;
        let look = look(context, &machine)?;
        Ok((machine, look))
    };
    wanted.iter().map(look_at).collect()
}

fn look(context: &Context, machine: &Record) -> Result<Look> {
    let mut guest = None;
    session::ask(&context.paths, machine, &Request::Stats, |frame| match frame {
        FromSession::Stats(stats) => {
            guest = Some(stats);
            Ok(())
        }
        _ => Err(session::unasked()),
    })?;
    let guest = guest.ok_or_else(|| Error::new(format!("machine '{}' has just ended", machine.name)))?;
    Ok(Look { at: Instant::now(), guest, host: vm_usage(&context.paths.run_dir(&machine.id)) })
}

fn line<'a>(id: &'a str, name: &'a str, before: &Look, now: &Look) -> Line<'a> {
    let passed_usec = now.at.duration_since(before.at).as_micros().max(1) as f64;
    // A guest may tell anything, also that it has used less than before.
    let percent = |now: u64, before: u64| now.saturating_sub(before) as f64 * 100.0 / passed_usec;
    Line {
        id,
        name,
        cpu_percent: percent(now.guest.cpu_usec, before.guest.cpu_usec),
        guest: now.guest,
        host: now.host,
        host_cpu_percent: percent(now.host.cpu_usec, before.host.cpu_usec),
    }
}

/// Prints what was seen; whether somebody still reads it.
fn show(lines: &[Line<'_>], arguments: &Arguments) -> Result<bool> {
    let text = if arguments.json { json(lines)? } else { human(lines, !arguments.no_stream) };
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        other => other.context("cannot write to standard output").map(|()| true),
    }
}

fn json(lines: &[Line<'_>]) -> Result<String> {
    let texts: std::result::Result<Vec<_>, _> = lines.iter().map(serde_json::to_string).collect();
    Ok(texts.context("cannot write JSON")?.iter().map(|text| format!("{text}\n")).collect())
}

fn human(lines: &[Line<'_>], is_repeated: bool) -> String {
    let mut rows = table::new(&[
        "MACHINE", "CPU", "MEM", "HOST MEM", "HOST CPU", "PIDS", "NET IN", "NET OUT", "DISK IN", "DISK OUT",
    ]);
    for Line { name, cpu_percent, guest, host, host_cpu_percent, .. } in lines {
        let size = |bytes: u64| Size(bytes).to_string();
        rows.add_row([
            name.to_string(),
            format!("{cpu_percent:.1}%"),
            format!("{} / {}", size(guest.memory_used), size(guest.memory_total)),
            size(host.pss),
            format!("{host_cpu_percent:.1}%"),
            guest.processes.to_string(),
            size(guest.net_rx),
            size(guest.net_tx),
            size(guest.disk_read),
            size(guest.disk_written),
        ]);
    }
    let clear = if is_repeated && std::io::stdout().is_terminal() { "\x1b[H\x1b[J" } else { "" };
    format!("{clear}{}\n", table::text(&rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_whose_counters_go_back_uses_nothing() {
        let at = Instant::now();
        let guest = |cpu_usec| GuestStats { cpu_usec, ..GuestStats::default() };
        let look = |later_ms, cpu_usec| Look {
            at: at + Duration::from_millis(later_ms),
            guest: guest(cpu_usec),
            host: VmUsage::default(),
        };
        assert_eq!(line("abc1", "web", &look(0, 9), &look(1000, 1)).cpu_percent, 0.0);
        assert_eq!(line("abc1", "web", &look(0, 0), &look(1000, 500_000)).cpu_percent, 50.0);
    }
}
