//! One `flyrun serve` from its start to its end.

use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use app::config::Refused;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use super::engine::{Engine, Prepared};
use super::front::Front;
use super::group::Shared;
use super::host::Host;
use super::latencies::Latencies;
use super::limits::HostLimits;
use super::listener::{self, Content};
use super::log::Log;
use super::page::Shown;
use super::reload::Changes;
use super::template::Templates;
use super::{release, room, status, systemd, template};
use crate::apps::{AppFile, load};
use crate::cli::{Context, MIN_MEMORY_MIB};
use crate::error::{Context as _, Error, Result};
use crate::files;
use crate::paths::{Library, make_private_dir};

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
}

/// Serves until it is told to end, and leaves the machines as they are.
///
/// # Errors
/// A file is wrong, an image is not to be had, or a port cannot be listened on: before anything is served.
pub fn run(context: Context, settings: Settings) -> Result<()> {
    let files = load(&settings.path).map_err(|refused| told(&refused))?;
    let host = host(context)?;
    raise_descriptors();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start threads")?;
    let result = runtime.block_on(serve(host, files, settings));
    // What is under way is done by monitors: nobody waits for a thread that asks one.
    runtime.shutdown_background();
    result
}

/// Each client is a descriptor here, and so is its machine: as many as may be had are wanted.
fn raise_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    // Those that there are will have to do.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

fn host(context: Context) -> Result<Host> {
    let library = Library::find()?;
    crate::host::ensure_kvm(&library)?;
    let store = context.store()?;
    context.keep_house()?;
    make_private_dir(&context.paths.run)?;
    Ok(Host::new(context, library, store))
}

async fn serve(host: Host, files: Vec<AppFile>, settings: Settings) -> Result<()> {
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
    let front = Front::new(engine.clone(), log.clone(), settings.bind, settings.access, latencies.clone());
    let mut serving =
        Serving { engine: engine.clone(), front: front.clone(), locks: locks.clone(), log: log.clone() };
    // Signals from now on are heard, also while images are fetched.
    let mut ends = [SignalKind::terminate(), SignalKind::interrupt()].map(signal);
    let listeners = listeners(settings.metrics, settings.page).await?;
    tokio::select! {
        begun = serving.follow(files, true) => begun?,
        () = any(&mut ends) => return Ok(()),
    }
    let socket = status::listen(&run_dir)?;
    tokio::spawn(status::answer(socket, engine.clone()));
    let content = content(&engine, &front, latencies);
    let mut page = None;
    for (listener, has) in listeners {
        if has.page {
            page = listener.local_addr().ok().map(|address| format!("http://{address}{}/", ::page::PREFIX));
        }
        let metrics = content.metrics.clone().filter(|_| has.metrics);
        let page = content.page.clone().filter(|_| has.page);
        tokio::spawn(listener::serve(listener, Content { metrics, page }));
    }
    let reloads = tokio::spawn(keep_reloading(serving, settings.path.clone()));
    log.line("serving").with("pid", std::process::id()).with_some("page", page).end();
    systemd::notify("READY=1");
    any(&mut ends).await;
    systemd::notify("STOPPING=1");
    log.line("ending").end();
    reloads.abort();
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
    let shown = latencies.map(|latencies| Arc::new(Shown::new(engine.clone(), latencies)));
    Content { metrics: Some(Arc::new(metrics)), page: shown.map(|shown| shown as Arc<listener::Source>) }
}

/// What follows the files.
struct Serving {
    engine: Arc<Engine>,
    front: Front,
    /// One for each app, by name: an app has one who starts its machines.
    locks: Arc<Mutex<Vec<(String, File)>>>,
    log: Log,
}

impl Serving {
    /// Serves what these files say. What fails changes nothing, but for images that are there now.
    async fn follow(&mut self, files: Vec<AppFile>, is_first: bool) -> Result<()> {
        let host = self.engine.shared().host.clone();
        let mut locks = Vec::new();
        for file in files.iter().filter(|file| !self.has_lock(&file.app.name)) {
            locks.push((file.app.name.clone(), lock(&host, &file.app.name)?));
        }
        // Before anything that takes its time.
        let changed = self.front.prepare(&files)?;
        let prepared = spawn_blocking(move || prepare(&host, files));
        let prepared = prepared.await.context("the files were not followed")??;
        if !is_first {
            self.log.line("files followed").end();
        }
        let engine = self.engine.clone();
        let runtime = tokio::runtime::Handle::current();
        spawn_blocking(move || {
            let _runtime = runtime.enter();
            engine.serve(prepared)
        })
        .await
        .context("the files were not followed")??;
        self.front.follow(changed).await?;
        self.locks().extend(locks);
        Ok(())
    }

    fn locks(&self) -> MutexGuard<'_, Vec<(String, File)>> {
        self.locks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_lock(&self, app: &str) -> bool {
        self.locks().iter().any(|(name, _)| name == app)
    }
}

fn prepare(host: &Host, files: Vec<AppFile>) -> Result<Vec<Prepared>> {
    let mut prepared = Vec::new();
    for file in files {
        let Templates { groups, release } = template::of_app(host, &file)?;
        if let Some(small) = groups.values().find(|template| template.memory_mib() < MIN_MEMORY_MIB) {
            let told =
                format!("app {}: {} MiB are too little for a machine", file.app.name, small.memory_mib());
            return Err(Error::new(told).advice(format!("Give it {MIN_MEMORY_MIB} or more in [[vm]].")));
        }
        prepared.push((Prepared { app: file.app, templates: groups }, release));
    }
    // When nothing else can be wrong.
    for (Prepared { app, .. }, release) in &prepared {
        if let Some(release) = release {
            release::run(host, release, app.deploy.release_command_timeout)?;
        }
    }
    Ok(prepared.into_iter().map(|(prepared, _)| prepared).collect())
}

/// An app has one who starts its machines.
fn lock(host: &Host, app: &str) -> Result<File> {
    let path = host.context.paths.run.join(format!("app-{app}.lock"));
    let lock = files::open_lock(&path).context(format!("cannot open the lock {}", path.display()))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(_) => Err(Error::new(format!("app {app} is served already, by another flyrun serve"))
            .advice("`flyrun status` tells by which process.")),
    }
}

/// Follows the files when they change, or when it is told to.
async fn keep_reloading(mut serving: Serving, path: PathBuf) {
    let (changed, mut changes) = mpsc::channel(1);
    let log = serving.log.clone();
    tokio::spawn(tell_hangups(changed.clone()));
    tokio::spawn(tell_changes(changed, path.clone(), log.clone()));
    while changes.recv().await.is_some() {
        let files = match load(&path) {
            Ok(files) => files,
            Err(refused) => {
                log.line("files refused").with("why", told(&refused).to_string()).end();
                continue;
            }
        };
        if let Err(error) = serving.follow(files, false).await {
            log.line("files not followed").with("why", error.to_string()).end();
        }
    }
}

async fn tell_hangups(changed: mpsc::Sender<()>) {
    let Ok(mut hangups) = signal(SignalKind::hangup()) else { return };
    while hangups.recv().await.is_some() {
        // If one is to be followed already, that will do.
        let _ = changed.try_send(());
    }
}

async fn tell_changes(changed: mpsc::Sender<()>, path: PathBuf, log: Log) {
    match Changes::watch(&path) {
        Ok(mut changes) => loop {
            changes.next().await;
            let _ = changed.try_send(());
        },
        Err(error) => {
            log.line("changes of files are not noticed, only SIGHUP").with("why", error.to_string()).end();
        }
    }
}

/// All that is wrong with files, as one error.
fn told(refused: &Refused) -> Error {
    let mut lines: Vec<_> = refused.problems.iter().map(ToString::to_string).collect();
    if refused.left_out > 0 {
        lines.push(format!("and {} more", refused.left_out));
    }
    Error::new(lines.join("\nflyrun: "))
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
