//! One life of a machine from outside: until its monitor leaves, with its checks.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use app::pool::Life;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{Notify, watch};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, sleep_until};

use super::check::Probe;
use super::group::{Group, Probes};
use super::worker::is_over;
use crate::monitor::{Reply, Request, socket};

/// How often a machine is asked whose check has failed, unless its interval is shorter.
const FAILING_INTERVAL: Duration = Duration::from_secs(1);
/// No word of a monitor that is of use here is longer.
const MAX_WORD: usize = 512;
/// In so long a monitor that was told to end its machine has mostly taken away what was the machine's.
const LEAVING: Duration = Duration::from_secs(2);

/// Waits until a machine's monitor leaves, and tells what has become of the machine if nobody had ordered that.
pub async fn follow(group: Arc<Group>, life: Life, id: Arc<str>) {
    let born = Instant::now();
    let run_dir = group.shared.host.context.paths.run_dir(&id);
    until_it_leaves(&group, life, &run_dir).await;
    if group.loses(life) {
        let host = group.shared.host.clone();
        let record = spawn_blocking(move || host.aftermath(&id)).await.ok().flatten();
        group.died(life, record.as_ref(), born.elapsed());
        return;
    }
    // It may have been killed on its way out, by when nobody looks after it any more.
    sleep(LEAVING).await;
    let host = group.shared.host.clone();
    let _ = spawn_blocking(move || host.notice_leavings(&id)).await;
}

/// Returns when there is no monitor, or none any more.
async fn until_it_leaves(group: &Arc<Group>, life: Life, run_dir: &Path) {
    if !hear(group, life, run_dir, &Request::Follow).await {
        // It is of a version that knows of no lease.
        hear(group, life, run_dir, &Request::Wait).await;
    }
}

/// Until the monitor leaves; whether it understands what it is asked.
async fn hear(group: &Arc<Group>, life: Life, run_dir: &Path, request: &Request) -> bool {
    let Ok(mut stream) = UnixStream::connect(socket(run_dir)).await else { return true };
    let Ok(mut line) = serde_json::to_vec(request) else { return true };
    line.push(b'\n');
    if stream.write_all(&line).await.is_err() {
        return true;
    }
    let mut words = BufReader::with_capacity(MAX_WORD, stream);
    let mut has_heard = false;
    loop {
        line.clear();
        // Its last word is in the machine's record too. It ends with that, or with the connection.
        match (&mut words).take(MAX_WORD as u64).read_until(b'\n', &mut line).await {
            Ok(count) if count > 0 => {}
            Ok(_) | Err(_) => return true,
        }
        match serde_json::from_slice(&line) {
            Ok(Reply::Busy { seconds }) => group.busy(life, Duration::from_secs(seconds.into())),
            Ok(Reply::Failed { .. }) if !has_heard => return *request == Request::Wait,
            Ok(_) | Err(_) => return true,
        }
        has_heard = true;
    }
}

/// Asks a machine that is ready, each check at its interval, until its life is over.
pub async fn keep_checking(
    group: Arc<Group>,
    life: Life,
    address: IpAddr,
    probes: Arc<Probes>,
    mut over: watch::Receiver<bool>,
    recheck: Arc<Notify>,
) {
    tokio::select! {
        () = is_over(&mut over) => {}
        () = check_gates(&group, life, address, &probes.gates, &recheck) => {}
        () = check_named(&group, life, address, &probes.named) => {}
    }
}

/// A check, and when it is next made.
struct Watched<'p> {
    probe: &'p Probe,
    due: Instant,
    told: Result<(), String>,
}

impl Watched<'_> {
    fn new(probe: &Probe) -> Watched<'_> {
        Watched { probe, due: Instant::now() + probe.check.interval, told: Ok(()) }
    }

    async fn ask(&mut self, address: IpAddr) {
        self.told = self.probe.ask(address).await;
        let interval = self.probe.check.interval;
        self.due = Instant::now() + if self.told.is_ok() { interval } else { interval.min(FAILING_INTERVAL) };
    }
}

async fn check_gates(group: &Arc<Group>, life: Life, address: IpAddr, gates: &[Probe], recheck: &Notify) {
    let mut watched: Vec<_> = gates.iter().map(Watched::new).collect();
    loop {
        let due = watched.iter().map(|one| one.due).min();
        let is_asked = tokio::select! {
            () = due_at(due) => false,
            () = recheck.notified() => true,
        };
        for one in watched.iter_mut().filter(|one| is_asked || Some(one.due) == due) {
            one.ask(address).await;
        }
        let failed = watched.iter().find_map(|one| one.told.clone().err());
        group.checked(life, failed.map_or(Ok(()), Err));
    }
}

async fn check_named(group: &Arc<Group>, life: Life, address: IpAddr, named: &[(String, Probe)]) {
    let mut watched: Vec<_> = named.iter().map(|(name, probe)| (name, Watched::new(probe))).collect();
    loop {
        let due = watched.iter().map(|(_, one)| one.due).min();
        due_at(due).await;
        for (name, one) in watched.iter_mut().filter(|(_, one)| Some(one.due) == due) {
            one.ask(address).await;
            group.named_checked(life, name, one.told.clone());
        }
    }
}

async fn due_at(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}
