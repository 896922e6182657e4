//! One `flyrun serve` from its start to its end.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ::proxy::Options;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use super::control::{self, Desk, Job};
use super::engine::Engine;
use super::follow::{Serving, keep_following};
use super::front::{Front, Told};
use super::group::Shared;
use super::host::Host;
use super::latencies::Latencies;
use super::limits::HostLimits;
use super::listener::{self, Content};
use super::log::Log;
use super::page::Shown;
use super::{clients, room, status, systemd, targets};
use crate::apps::{AppFile, load, told};
use crate::cli::Context;
use crate::error::{Context as _, Result};
use crate::paths::{Library, make_private_dir};

/// So many deploys and the like wait for their turn at most.
const MAX_JOBS: usize = 16;

/// What the command line says.
#[derive(Clone, Debug)]
pub struct Settings {
    /// A file, or a directory of them.
    pub path: PathBuf,
    pub json: bool,
    /// Whether each request is told of.
    pub access: bool,
    pub bind: Option<IpAddr>,
    pub metrics: Option<SocketAddr>,
    /// Of this host alone.
    pub page: Option<SocketAddr>,
    pub max_starts: u32,
    pub memory_mib: u64,
    pub drain: Duration,
    pub clients: clients::Wanted,
}

/// Serves until it is told to end, and leaves the machines as they are.
///
/// # Errors
/// A file is wrong, an image is not to be had, or a port cannot be listened on: before anything is served.
pub fn run(context: Context, settings: Settings) -> Result<()> {
    let files = load(&settings.path).map_err(|refused| told(&refused))?;
    let host = host(context)?;
    let options = clients::bounded(settings.clients, raise_descriptors())?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start threads")?;
    let result = runtime.block_on(serve(host, files, settings, options));
    // What is under way is done by monitors: nobody waits for a thread that asks one.
    runtime.shutdown_background();
    result
}

/// Each client is a descriptor here, and so is its machine: as many as may be had are wanted. Gives how many that are.
fn raise_descriptors() -> Option<u64> {
    let limit = getrlimit(Resource::Nofile);
    // Those that there are will have to do.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    getrlimit(Resource::Nofile).current
}

fn host(context: Context) -> Result<Host> {
    let library = Library::find()?;
    crate::host::ensure_kvm(&library)?;
    let store = context.store()?;
    context.keep_house()?;
    make_private_dir(&context.paths.run)?;
    Ok(Host::new(context, library, store))
}

async fn serve(host: Host, files: Vec<AppFile>, settings: Settings, options: Options) -> Result<()> {
    let log = Log::on_stderr(settings.json).context("cannot start a thread")?;
    let run_dir = status::make_run_dir(&host.context.paths)?;
    let limits = HostLimits::new(settings.max_starts, settings.memory_mib);
    let engine = Arc::new(Engine::new(Arc::new(Shared::new(host, limits, log.clone()))));
    let host = engine.shared().host.clone();
    tokio::spawn(keep_tidy(host.clone()));
    tokio::spawn(async move { host.children.keep_reaping().await });
    tokio::spawn(room::keep_making_room(engine.shared().clone()));
    // Until the last request has ended.
    let locks = Arc::new(Mutex::new(Vec::new()));
    let latencies = settings.page.map(|_| Arc::new(Latencies::default()));
    let told = Told { log: log.clone(), access: settings.access, latencies: latencies.clone() };
    let front = Front::new(engine.clone(), told, settings.bind, options);
    let path = settings.path.clone();
    let mut serving = Serving::new(engine.clone(), front.clone(), locks.clone(), log.clone(), path);
    // Signals from now on are heard, also while images are fetched.
    let mut ends = [SignalKind::terminate(), SignalKind::interrupt()].map(signal);
    let listeners = listeners(settings.metrics, settings.page).await?;
    tokio::select! {
        begun = serving.begin(files) => begun?,
        () = any(&mut ends) => return Ok(()),
    }
    let socket = status::listen(&run_dir)?;
    tokio::spawn(status::answer(socket, engine.clone()));
    let (desk, jobs) = desk(&log);
    let (control, is_busy) = (status::listen_for_control(&run_dir)?, desk.is_busy.clone());
    tokio::spawn(control::answer(control, desk));
    let content = content(&engine, &front, latencies);
    let mut page = None;
    for (listener, has) in listeners {
        if has.page {
            page = listener.local_addr().ok().map(|address| format!("http://{address}{}/", ::page::PREFIX));
        }
        let metrics = content.metrics.clone().filter(|_| has.metrics);
        let targets = content.targets.clone().filter(|_| has.metrics);
        let page = content.page.clone().filter(|_| has.page);
        tokio::spawn(listener::serve(listener, Content { metrics, targets, page }));
    }
    let follows = tokio::spawn(keep_following(serving, jobs, is_busy));
    log.line("serving").with("pid", std::process::id()).with_some("page", page).end();
    systemd::notify("READY=1");
    any(&mut ends).await;
    systemd::notify("STOPPING=1");
    log.line("ending").end();
    follows.abort();
    tokio::select! {
        () = front.drain(settings.drain) => {}
        // Who asks twice does not want to wait.
        () = any(&mut ends) => {}
    }
    drop(locks);
    log.line("ended").end();
    log.flush();
    Ok(())
}

/// Where deploys and the like are handed in, and where they come out.
fn desk(log: &Log) -> (Desk, mpsc::Receiver<Job>) {
    let (jobs, receiver) = mpsc::channel(MAX_JOBS);
    (Desk { jobs, is_busy: Arc::default(), log: log.clone() }, receiver)
}

/// Takes away what is left when a monitor was killed: there may be no other command that does.
async fn keep_tidy(host: Arc<Host>) {
    loop {
        host.children.leavings().await;
        let own = host.clone();
        let _ = spawn_blocking(move || own.tidy()).await;
    }
}

/// Returns when one of these signals has come.
async fn any(signals: &mut [std::io::Result<Signal>; 2]) {
    let [first, second] = signals;
    tokio::select! {
        () = heard(first) => {}
        () = heard(second) => {}
    }
}

async fn heard(signal: &mut std::io::Result<Signal>) {
    let heard = match signal {
        Ok(signal) => signal.recv().await,
        Err(_) => None,
    };
    if heard.is_none() {
        std::future::pending().await
    }
}

/// What a listener is asked for.
#[derive(Clone, Copy, Debug)]
struct Has {
    metrics: bool,
    page: bool,
}

/// One for each address, which may be that of both.
async fn listeners(metrics: Option<SocketAddr>, page: Option<SocketAddr>) -> Result<Vec<(TcpListener, Has)>> {
    let has_both = metrics.is_some() && metrics == page;
    let mut listeners = Vec::new();
    if let Some(address) = metrics {
        listeners.push((listen("--metrics", address).await?, Has { metrics: true, page: has_both }));
    }
    if let Some(address) = page.filter(|_| !has_both) {
        listeners.push((listen("--page", address).await?, Has { metrics: false, page: true }));
    }
    Ok(listeners)
}

async fn listen(flag: &str, address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .context(format!("{flag}: cannot listen on {address}"))
        .map_err(|error| error.advice("Choose another address or port."))
}

/// All that listeners may have.
fn content(engine: &Arc<Engine>, front: &Front, latencies: Option<Arc<Latencies>>) -> Content {
    let (asked, requests) = (engine.clone(), front.figures());
    let metrics = move || asked.shared().counts.render(&asked.views(), &asked.shared().limits) + &requests();
    let asked = engine.clone();
    let targets = move || targets::render(&asked.views());
    let shown = latencies.map(|latencies| Arc::new(Shown::new(engine.clone(), latencies)));
    let page = shown.map(|shown| shown as Arc<listener::Source>);
    Content { metrics: Some(Arc::new(metrics)), targets: Some(Arc::new(targets)), page }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_address_has_one_listener() {
        let address = |number: u8| Some(SocketAddr::from(([127, 0, 0, number], 0)));
        let has = async |metrics, page| {
            let listeners = listeners(metrics, page).await.unwrap();
            listeners.iter().map(|(_, has)| (has.metrics, has.page)).collect::<Vec<_>>()
        };
        assert_eq!(has(None, None).await, []);
        assert_eq!(has(address(1), None).await, [(true, false)]);
        assert_eq!(has(None, address(1)).await, [(false, true)]);
        assert_eq!(has(address(1), address(1)).await, [(true, true)]);
        assert_eq!(has(address(1), address(2)).await, [(true, false), (false, true)]);
        let taken = listen("--page", SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let error = listeners(None, taken.local_addr().ok()).await.unwrap_err().to_string();
        assert!(error.starts_with("--page: cannot listen on 127.0.0.1:"), "{error}");
    }
}
