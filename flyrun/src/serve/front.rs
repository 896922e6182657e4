//! The proxy, with the ports that apps want.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as StdListener};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use app::config::model::App;
use listenfd::ListenFd;
use proxy::{Options, Proxy, Record, Site};
use tokio::net::{TcpListener, TcpSocket};
use tokio::task::spawn_blocking;

use super::acme::Keepers;
use super::engine::Engine;
use super::latencies::Latencies;
use super::log::Log;
use crate::apps::AppFile;
use crate::error::{Context as _, Error, Result};

/// So many clients may have connected before they are accepted, as far as the kernel allows.
const BACKLOG: u32 = 4096;

/// What clients see.
#[derive(Clone)]
pub struct Front {
    proxy: Arc<Proxy<Engine>>,
    log: Log,
    /// Where apps are listened for; everywhere if nobody says.
    bind: Option<IpAddr>,
    ports: Arc<Mutex<Ports>>,
    certificates: Arc<Keepers>,
}

#[derive(Default)]
struct Ports {
    /// By their numbers, where they are listened on.
    open: BTreeMap<u16, SocketAddr>,
    /// Sockets that whoever started this process has opened, and no app has wanted yet.
    inherited: BTreeMap<u16, StdListener>,
}

/// What is to change, with sockets that listen already.
pub struct Changed {
    sites: Vec<Site>,
    new: Vec<(u16, TcpListener)>,
}

impl Front {
    /// Within a runtime. Whoever looks at latencies has them told.
    pub fn new(engine: Arc<Engine>, told: Told, bind: Option<IpAddr>, options: Options) -> Front {
        let log = told.log.clone();
        let root = engine.shared().host.context.paths.root.clone();
        let proxy = Arc::new(Proxy::new(engine, options, Arc::new(told)));
        let of_proxy = proxy.clone();
        let refresh = Box::new(move || of_proxy.refresh_certificates());
        let certificates = Arc::new(Keepers::new(root, proxy.challenges(), refresh, log.clone()));
        let inherited = inherited();
        let ports = Arc::new(Mutex::new(Ports { open: BTreeMap::new(), inherited }));
        Front { proxy, log, bind, ports, certificates }
    }

    /// Listens on all ports of these apps, and serves nothing there yet. The kernel lets clients wait meanwhile.
    ///
    /// # Errors
    /// A port cannot be listened on. Those that were are closed again.
    pub fn prepare(&self, files: &[AppFile]) -> Result<Changed> {
        let mut new = BTreeMap::new();
        for file in files {
            let ports = file.app.services.iter().flat_map(|service| &service.ports);
            for number in ports.flat_map(|port| port.numbers.clone()) {
                if self.lock().open.contains_key(&number) || new.contains_key(&number) {
                    continue;
                }
                let listener =
                    self.listen(number).map_err(|error| cannot_listen(&file.app.name, number, &error))?;
                new.insert(number, listener);
            }
        }
        let sites = files.iter().map(|file| Site {
            app: Arc::new(self.with_ordered(&file.app)),
            directory: Path::new(&file.name).parent().unwrap_or(Path::new("")).to_path_buf(),
        });
        Ok(Changed { sites: sites.collect(), new: new.into_iter().collect() })
    }

    /// An app with the certificate that is ordered for it among those that it names.
    fn with_ordered(&self, app: &App) -> App {
        let mut app = app.clone();
        app.certificates.extend(self.certificates.certificate(&app));
        app
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Ports> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listen(&self, port: u16) -> io::Result<TcpListener> {
        if let Some(inherited) = self.lock().inherited.get(&port) {
            let listener = inherited.try_clone()?;
            listener.set_nonblocking(true)?;
            return TcpListener::from_std(listener);
        }
        match self.bind {
            Some(address) => listen(SocketAddr::new(address, port)),
            // Where there is no IPv6, the other is all there is.
            None => match listen(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port)) {
                Err(error)
                    if matches!(error.kind(), ErrorKind::AddrNotAvailable | ErrorKind::Unsupported) =>
                {
                    listen(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port))
                }
                other => other,
            },
        }
    }

    /// Serves what was prepared, and nothing else any more.
    ///
    /// # Errors
    /// A listener has no address.
    pub async fn follow(&self, changed: Changed) -> Result<()> {
        let (proxy, sites) = (self.proxy.clone(), changed.sites.clone());
        // Certificates are files.
        let problems =
            spawn_blocking(move || proxy.serve(&sites)).await.context("the apps are not served")?;
        for problem in problems {
            self.log.line("certificate").with("why", problem).end();
        }
        let told = |port| format!("cannot listen on port {port}");
        for (port, listener) in changed.new {
            let address = listener.local_addr().context(told(port))?;
            self.proxy.listen(port, listener).context(told(port))?;
            self.lock().open.insert(port, address);
        }
        let wanted = self.proxy.ports();
        self.lock().open.retain(|port, address| {
            let is_wanted = wanted.contains(port);
            if !is_wanted {
                self.proxy.close(*address);
            }
            is_wanted
        });
        // Authorities come to these ports.
        self.certificates.follow(&changed.sites);
        Ok(())
    }

    /// What Prometheus is told of requests.
    pub fn figures(&self) -> impl Fn() -> String + Send + Sync + use<> {
        let (proxy, certificates) = (self.proxy.clone(), self.certificates.clone());
        move || proxy.figures() + &certificates.figures()
    }

    /// Takes no more connections, and waits for those that there are.
    pub async fn drain(&self, limit: Duration) {
        let drained = self.proxy.drain(limit).await;
        if drained.cut > 0 {
            self.log.line("connections cut").with("count", drained.cut).end();
        }
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv6() { TcpSocket::new_v6()? } else { TcpSocket::new_v4()? };
    // One that was closed a moment ago is no obstacle.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

fn cannot_listen(app: &str, port: u16, error: &io::Error) -> Error {
    let advice = match error.kind() {
        ErrorKind::AddrInUse => format!("`ss -ltnp sport = :{port}` tells who has it."),
        ErrorKind::PermissionDenied => {
            "Ports below 1024 are root's, or need CAP_NET_BIND_SERVICE.".to_string()
        }
        _ => "Choose another port, or another --bind.".to_string(),
    };
    Error::caused(format!("app {app}: cannot listen on port {port}"), error).advice(advice)
}

/// Sockets that systemd has opened (LISTEN_FDS), by their ports.
fn inherited() -> BTreeMap<u16, StdListener> {
    let mut sockets = ListenFd::from_env();
    let listeners = (0..sockets.len()).filter_map(|index| sockets.take_tcp_listener(index).ok().flatten());
    listeners.filter_map(|listener| Some((listener.local_addr().ok()?.port(), listener))).collect()
}

/// What the proxy tells.
pub struct Told {
    pub log: Log,
    /// Whether each request is told of.
    pub access: bool,
    pub latencies: Option<Arc<Latencies>>,
}

impl proxy::Log for Told {
    fn access(&self, record: &Record<'_>) {
        // A connection that is the client's own lasts as long as it likes.
        if let (Some(latencies), Some(app)) = (&self.latencies, record.app)
            && !matches!(record.status, 0 | 101)
        {
            latencies.add(app, record.duration, Instant::now());
        }
        // What was not answered as it should be is told in any case.
        if !self.access && record.error.is_none() {
            return;
        }
        let ms = |time: Duration| (time.as_secs_f64() * 1_000_000.0).round() / 1000.0;
        let is_request = record.status != 0;
        let some = |text: &str| is_request.then(|| text.to_string());
        self.log
            .line(if is_request { "request" } else { "connection" })
            .with_some("app", record.app)
            .with_some("status", is_request.then_some(record.status))
            .with_some("method", some(record.method))
            .with_some("host", some(record.host))
            .with_some("path", some(record.path))
            .with("client", record.client.to_string())
            .with("port", record.port)
            .with("protocol", record.protocol)
            .with("ms", ms(record.duration))
            .with("waited_ms", ms(record.waited))
            .with("received", record.received)
            .with("sent", record.sent)
            .with_some("machine", record.instance)
            .with("attempts", record.attempts)
            .with_some("error", record.error)
            .with("id", record.id)
            .end();
    }

    fn trouble(&self, what: &str) {
        self.log.line("trouble").with("why", what).end();
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use proxy::Log as _;

    use super::*;

    #[test]
    fn only_what_is_answered_has_a_latency() {
        let latencies = Arc::new(Latencies::default());
        let log = Log::on_stderr(false).unwrap();
        let told = Told { log, access: false, latencies: Some(latencies.clone()) };
        let record = |app, status| Record {
            time: SystemTime::UNIX_EPOCH,
            id: "0",
            app,
            client: Ipv4Addr::LOCALHOST.into(),
            port: 80,
            protocol: "HTTP/1.1",
            method: "GET",
            host: "web",
            path: "/",
            status,
            received: 0,
            sent: 0,
            duration: Duration::from_millis(u64::from(status)),
            waited: Duration::ZERO,
            instance: None,
            attempts: 1,
            error: None,
        };
        for (app, status) in [(Some("web"), 200), (Some("web"), 0), (Some("web"), 101), (None, 404)] {
            told.access(&record(app, status));
        }
        let known = latencies.of("web", Instant::now());
        assert_eq!((known.count, known.p50), (1, Some(200.0)));
    }
}
