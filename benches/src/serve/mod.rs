//! `flyrun serve`: what a request costs whose machine is suspended, is stopped, or runs, and what it costs with HAProxy in
//! between instead.
//!
//! One processor does everything in virtual time, so a request's time is all work that it makes: the client's, the proxy's, the
//! host kernel's, the VMM's and the guest's. `serve.warm.direct`, without any proxy, tells how much of it is a proxy's.

mod app;
mod load;
mod peer;

use std::{
    net::SocketAddr,
    path::Path,
    sync::Arc,
    sync::atomic::{AtomicBool, Ordering},
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use self::{
    app::{Flyrun, Machine, Serve},
    peer::Peer,
};
use crate::report::Report;

/// Requests of one turn of a warm machine, of all turns a thousand: as many as a p99.9 needs.
const WARM: usize = 250;
/// Turns: flyrun and its peer one after another, so that what changes meanwhile is in both.
const TURNS: usize = 4;
const TICK: Duration = Duration::from_millis(100);
/// A machine's rest, of virtual time, before it is started again.
const REST: Duration = Duration::from_millis(500);

/// Images of web servers, in any form `flyrun pull` takes.
#[derive(Clone, Copy, Debug)]
pub struct Images<'a> {
    /// A static program of some hundred lines, [`benches/guest/answer.rs`]: of what it takes to start it hardly anything is its own.
    pub small: &'a str,
    /// nginx, as Debian packages it.
    pub nginx: Option<&'a str>,
}

/// serve.suspended.first_byte and serve.cold.first_byte of nginx, `serve.*.small.first_byte` of the small web server, and, of that,
/// serve.warm.flyrun, serve.warm.peer and serve.warm.direct, each with its p99 and p99.9. Of a flyrun that does not serve, those alone
/// that need no `flyrun serve`.
pub fn measure(
    program: &Path,
    images: Images<'_>,
    haproxy: Option<&Path>,
    runs: u32,
    report: &mut Report,
) -> Result<()> {
    let _ticker = Ticker::start();
    let flyrun = Flyrun { program, image: images.small, port: 8080 };
    if flyrun.can_serve() {
        let nginx = images.nginx.map(|image| Flyrun { program, image, port: 80 });
        for (app, part) in nginx.iter().map(|nginx| (nginx, "")).chain([(&flyrun, ".small")]) {
            for (auto_stop, state, kind, name) in
                [("suspend", "suspended", "resumed", "suspended"), ("stop", "stopped", "base", "cold")]
            {
                let times = first_bytes(app, auto_stop, state, kind, runs)
                    .with_context(|| format!("{name}{part}"))?;
                add(report, &format!("serve.{name}{part}.first_byte"), times);
            }
        }
        let serve = Serve::start(flyrun, "off")?;
        warm(Some(serve.address()), serve.machine()?, haproxy, report)
    } else {
        eprintln!(
            "bench: this flyrun has no `serve`: serve.suspended, serve.cold and serve.warm.flyrun are missing"
        );
        let machine = Machine::start(flyrun)?;
        warm(None, machine.address()?, haproxy, report)
    }
}

/// Of each request that finds the machine in this state, and is to start it in this way.
fn first_bytes(flyrun: &Flyrun<'_>, auto_stop: &str, state: &str, kind: &str, runs: u32) -> Result<Vec<f64>> {
    let serve = Serve::start(*flyrun, auto_stop)?;
    let mut times = Vec::new();
    // One run more than is counted: the first reads every file for the first time.
    for run in 0..=runs {
        serve.wait_until(state)?;
        // Its monitor takes the network away when that is told already, and whoever asks at once waits for it.
        std::thread::sleep(REST);
        let time = load::first_byte(serve.address()).with_context(|| serve.log())?;
        let started = serve.last_start()?;
        ensure!(started == kind, "the machine was not {kind} but {started}");
        if run > 0 {
            times.push(time);
        }
    }
    Ok(times)
}

/// Requests to a machine that runs: through flyrun, through HAProxy, and without either.
fn warm(
    flyrun: Option<SocketAddr>,
    machine: SocketAddr,
    haproxy: Option<&Path>,
    report: &mut Report,
) -> Result<()> {
    let peer = haproxy.map(|program| Peer::start(program, machine)).transpose()?;
    let ways = [
        ("serve.warm.flyrun", flyrun),
        ("serve.warm.peer", peer.as_ref().map(Peer::address)),
        ("serve.warm.direct", Some(machine)),
    ];
    let mut times = ways.map(|_| Vec::new());
    for _ in 0..TURNS {
        for ((name, address), times) in ways.iter().zip(&mut times) {
            if let Some(address) = address {
                times.extend(load::warm(*address, WARM).with_context(|| (*name).to_string())?);
            }
        }
    }
    for ((name, _), times) in ways.iter().zip(times) {
        add(report, name, times);
    }
    Ok(())
}

/// The median by the name itself, and two percentiles below it.
fn add(report: &mut Report, name: &str, mut times: Vec<f64>) {
    report.add(name, "ms_virtual", &times);
    times.sort_by(f64::total_cmp);
    for (part, per_mille) in [("p99", 990), ("p99_9", 999)] {
        report.add(format!("{name}.{part}"), "ms_virtual", percentile(&times, per_mille).as_slice());
    }
}

/// The smallest of sorted values that so many of a thousand do not exceed.
fn percentile(sorted: &[f64], per_mille: usize) -> Option<f64> {
    sorted.get((sorted.len() * per_mille).div_ceil(1000).max(1) - 1).copied()
}

/// Wakes up now and then. A test host in which nothing has a timer soon may sleep through the wake-up of a guest.
struct Ticker {
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Ticker {
    fn start() -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let over = is_over.clone();
        let thread = std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                std::thread::sleep(TICK);
            }
        });
        Self { is_over, thread: Some(thread) }
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        let _ended = self.thread.take().map(JoinHandle::join);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_one_of_the_values() {
        let values: Vec<f64> = (1..=1000).map(f64::from).collect();
        assert_eq!([990, 999, 1000].map(|part| percentile(&values, part)), [990.0, 999.0, 1000.0].map(Some));
        assert_eq!(percentile(&[7.0], 990), Some(7.0));
        assert_eq!(percentile(&[], 990), None);
    }

    #[test]
    fn the_median_and_both_percentiles_are_told() {
        let mut report = Report::default();
        add(&mut report, "serve.warm.peer", (1..=1000).map(f64::from).rev().collect());
        let table = report.table();
        for line in ["serve.warm.peer ", "serve.warm.peer.p99 ", "serve.warm.peer.p99_9 "] {
            assert!(table.contains(line), "{table}");
        }
    }
}
