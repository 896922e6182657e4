//! The proxy as its owner sees it.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use app::config::model::{App, Carries};
use arc_swap::ArcSwap;
use rustls::server::Acceptor;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

use crate::access::Log;
use crate::backend::Lives;
use crate::challenges::{self, Challenges};
use crate::h1::{self, Limits};
use crate::held::Leases;
use crate::machines::Machines;
use crate::metrics::{self, Metrics};
use crate::options::Options;
use crate::routes::{PortRoutes, Route, Routes};
use crate::shared::{Connection, Door, Peer, Shared};
use crate::socket::{self, Read, Socket, Write};
use crate::tls::Certificates;
use crate::{h2, proxy_protocol, tcp};

/// An app, and where the files that it names are.
#[derive(Clone, Debug)]
pub struct Site {
    /// The app.
    pub app: Arc<App>,
    /// The directory of its fly.toml.
    pub directory: PathBuf,
}

/// Serves apps on listeners, until it is dropped or drained. Its methods are called within a Tokio runtime.
pub struct Proxy<M> {
    shared: Arc<Shared<M>>,
    listeners: Mutex<HashMap<SocketAddr, watch::Sender<bool>>>,
}

/// How a drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Connections that had to be cut.
    pub cut: usize,
}

impl<M: Machines> Proxy<M> {
    /// A proxy that serves nothing yet.
    pub fn new(machines: Arc<M>, options: Options, log: Arc<dyn Log>) -> Proxy<M> {
        let shared = Arc::new(Shared {
            machines,
            options,
            log,
            metrics: Metrics::default(),
            routes: ArcSwap::from_pointee(Routes::default()),
            certificates: Certificates::default(),
            challenges: Arc::default(),
            lives: Arc::new(Lives::default()),
            door: Arc::new(Door::default()),
            kept: 0.into(),
        });
        tokio::spawn(look_at_certificates(Arc::downgrade(&shared)));
        Proxy { shared, listeners: Mutex::default() }
    }

    /// From the next request on these apps are served, and no others. Requests under way are not touched. What is wrong with
    /// certificates is returned; a port whose certificates cannot be read at all refuses clients until they can. Blocks on
    /// the filesystem if there are certificates that are new.
    pub fn serve(&self, sites: &[Site]) -> Vec<String> {
        let mut problems = Vec::new();
        let apps: Vec<_> = sites.iter().map(|site| site.app.clone()).collect();
        let directories: HashMap<_, _> =
            sites.iter().map(|site| (site.app.name.as_str(), site.directory.as_path())).collect();
        let routes = Routes::new(&apps, &self.shared.metrics, |app, port| {
            let directory = directories.get(app.name.as_str())?;
            self.shared.certificates.offer(app, directory, port.tls.as_ref()?, &mut problems)
        });
        self.shared.routes.store(Arc::new(routes));
        problems
    }

    /// Accepts connections as ones to `port`, which is what apps know, whatever port the listener has itself. It is accepted from
    /// until [`Proxy::close`] or [`Proxy::drain`].
    ///
    /// # Errors
    /// The listener has no address.
    pub fn listen(&self, port: u16, listener: TcpListener) -> io::Result<()> {
        let address = listener.local_addr()?;
        let (close, closed) = watch::channel(false);
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.insert(address, close);
        tokio::spawn(accept(self.shared.clone(), port, listener, closed));
        Ok(())
    }

    /// Closes the listener with this address. Connections that were accepted go on.
    pub fn close(&self, address: SocketAddr) {
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(close) = listeners.remove(&address) {
            let _ = close.send(true);
        }
    }

    /// The ports of the apps that are served.
    pub fn ports(&self) -> Vec<u16> {
        let mut ports: Vec<_> = self.shared.routes.load().numbers().collect();
        ports.sort_unstable();
        ports
    }

    /// Reads certificates that have changed, as is done by itself every few seconds. What is wrong is returned. Blocks on
    /// the filesystem.
    pub fn refresh_certificates(&self) -> Vec<String> {
        self.shared.certificates.refresh()
    }

    /// What is shown to certificate authorities.
    pub fn challenges(&self) -> Arc<Challenges> {
        self.shared.challenges.clone()
    }

    /// Closes the listeners, and waits for connections to end: those without a request at once, those with one when it is
    /// answered, of which clients are told. What is left when `limit` is over is cut.
    pub async fn drain(&self, limit: Duration) -> Drained {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.shared.door.drain();
        if tokio::time::timeout(limit, self.shared.door.empty()).await.is_ok() {
            return Drained { cut: 0 };
        }
        let cut = self.shared.door.open();
        self.shared.door.cut();
        // What is cut ends at once, in its own task.
        let _ = tokio::time::timeout(Duration::from_secs(1), self.shared.door.empty()).await;
        Drained { cut }
    }

    /// Connections of clients.
    pub fn connections(&self) -> usize {
        self.shared.door.open()
    }

    /// All that is counted.
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// All figures there are, in Prometheus' text format, version 0.0.4.
    pub fn figures(&self) -> String {
        let mut page = self.shared.metrics.render();
        let left = self.shared.certificates.left(SystemTime::now());
        metrics::render_certificates(&mut page, &left);
        page
    }
}

async fn look_at_certificates<M: Machines>(shared: Weak<Shared<M>>) {
    loop {
        let Some(interval) = shared.upgrade().map(|shared| shared.options.certificate_interval) else {
            return;
        };
        tokio::time::sleep(interval).await;
        let Some(shared) = shared.upgrade() else { return };
        let refresh = tokio::task::spawn_blocking({
            let shared = shared.clone();
            move || shared.certificates.refresh()
        });
        for problem in refresh.await.unwrap_or_default() {
            shared.log.trouble(&problem);
        }
    }
}

async fn accept<M: Machines>(
    shared: Arc<Shared<M>>,
    port: u16,
    listener: TcpListener,
    mut closed: watch::Receiver<bool>,
) {
    /// The kernel is out of something, which does not change within the same moment.
    const PAUSE: Duration = Duration::from_millis(100);
    let mut told: Option<Instant> = None;
    let mut of_clients = PerClient::new(shared.options.max_connections_per_client);
    loop {
        let accepted = tokio::select! {
            // Also when the proxy itself is gone.
            _ = closed.changed() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, client)) => {
                let is_full = shared.door.open() >= shared.options.max_connections;
                let Some(place) = of_clients.enter(client.ip()).filter(|_| !is_full) else {
                    shared.metrics.too_many.fetch_add(1, Relaxed);
                    continue;
                };
                let socket = Socket::new(stream);
                let connection = shared.door.enter(&socket);
                shared.metrics.connections.fetch_add(1, Relaxed);
                let shared = shared.clone();
                tokio::spawn(async move {
                    serve(&shared, port, socket, client, connection).await;
                    shared.metrics.connections.fetch_sub(1, Relaxed);
                    drop(place);
                });
            }
            // That client is gone; others are not.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                shared.metrics.accept_errors.fetch_add(1, Relaxed);
                if told.is_none_or(|told| told.elapsed() > Duration::from_secs(10)) {
                    told = Some(Instant::now());
                    shared.log.trouble(&format!("no connection can be accepted on port {port}: {error}"));
                }
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// How many connections each client has on a listener.
struct PerClient {
    limit: Option<usize>,
    counts: HashMap<IpAddr, Weak<()>>,
    sweep_at: usize,
}

impl PerClient {
    fn new(limit: Option<usize>) -> PerClient {
        PerClient { limit, counts: HashMap::new(), sweep_at: 1024 }
    }

    /// What a connection holds while it is open; `None` if the client has as many as it may.
    fn enter(&mut self, client: IpAddr) -> Option<Option<Arc<()>>> {
        let Some(limit) = self.limit else { return Some(None) };
        if self.counts.len() >= self.sweep_at {
            self.counts.retain(|_, count| count.strong_count() > 0);
            self.sweep_at = (self.counts.len() * 2).max(1024);
        }
        // Who has a /64 has as many addresses as it likes.
        let client = match client.to_canonical() {
            IpAddr::V6(address) => IpAddr::V6((u128::from(address) & !u128::from(u64::MAX)).into()),
            four => four,
        };
        let count = self.counts.entry(client).or_default();
        if count.strong_count() >= limit {
            return None;
        }
        let place = count.upgrade().unwrap_or_default();
        *count = Arc::downgrade(&place);
        Some(Some(place))
    }
}

/// Serves one connection.
async fn serve<M: Machines>(
    shared: &Arc<Shared<M>>,
    port: u16,
    mut socket: Socket,
    mut client: SocketAddr,
    connection: Arc<Connection>,
) {
    let routes = shared.routes.load_full();
    // Nobody answers here since a moment ago.
    let Some(of_port) = routes.port(port) else { return };
    let Some(first) = of_port.first().cloned() else { return };
    let server = socket.local_addr().unwrap_or(SocketAddr::from(([0, 0, 0, 0], port)));
    let mut server = SocketAddr::new(server.ip(), port);
    if of_port.begins_with_a_header(client.ip()) {
        let header = proxy_protocol::read(&mut socket);
        match tokio::time::timeout(shared.options.tls_handshake_timeout, header).await {
            Ok(Ok(Some(ends))) => (client, server) = ends,
            Ok(Ok(None)) => {}
            Ok(Err(_)) | Err(_) => {
                shared.metrics.proxy_protocol_errors.fetch_add(1, Relaxed);
                return;
            }
        }
    }
    if !first.is_tls {
        let (read, write) = socket::plain(&socket);
        let route = of_port.without_name().cloned().unwrap_or(first);
        drop(routes);
        let peer = Peer::new(client.ip(), port, false, None, connection);
        return carry(shared, peer, &route, (client, server), read, write, false).await;
    }
    let start = Instant::now();
    let shaken = tokio::time::timeout(shared.options.tls_handshake_timeout, shake(shared, of_port, socket));
    let (stream, route, is_named) = match shaken.await {
        Ok(Some(Shaken::Client(stream, route, is_named))) => (stream, route, is_named),
        Ok(Some(Shaken::Authority)) => return,
        Ok(None) | Err(_) => {
            shared.metrics.tls_errors.fetch_add(1, Relaxed);
            return;
        }
    };
    drop(routes);
    route.metrics.handshake_seconds.add(start.elapsed());
    let is_h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    let (read, write) = socket::tls(*stream);
    let named = is_named.then(|| route.name.clone());
    let peer = Peer::new(client.ip(), port, true, named, connection);
    carry(shared, peer, &route, (client, server), read, write, is_h2).await;
}

/// Who it was that TLS was agreed on with.
enum Shaken {
    /// For this app, and whether its name was told.
    Client(Box<TlsStream<Socket>>, Arc<Route>, bool),
    /// It has seen what it wanted.
    Authority,
}

async fn shake<M: Machines>(shared: &Shared<M>, of_port: &PortRoutes, socket: Socket) -> Option<Shaken> {
    let hello = LazyConfigAcceptor::new(Acceptor::default(), socket).await.ok()?;
    let name = hello.client_hello().server_name().map(str::to_string);
    if hello.client_hello().alpn().is_some_and(challenges::is_authority) {
        let proof = shared.challenges.certificate(name.as_deref()?)?;
        hello.into_stream(proof).await.ok()?.shutdown().await.ok()?;
        return Some(Shaken::Authority);
    }
    let route = match &name {
        Some(name) => of_port.find(name.as_bytes()),
        None => of_port.without_name(),
    }?;
    let offer = route.tls.clone()?;
    let stream = hello.into_stream(offer.config.clone()).await.ok()?;
    Some(Shaken::Client(Box::new(stream), route.clone(), name.is_some()))
}

async fn carry<M: Machines>(
    shared: &Arc<Shared<M>>,
    mut peer: Peer,
    route: &Arc<Route>,
    ends: (SocketAddr, SocketAddr),
    read: Read,
    write: Write,
    is_h2: bool,
) {
    match &route.carries {
        Carries::Tcp { .. } => tcp::serve(shared, &peer, route, ends, read, write).await,
        Carries::Http(http) => {
            let metrics = route.metrics.clone();
            metrics.tcp_connects.fetch_add(1, Relaxed);
            let limits = Limits { idle: http.idle_timeout, head: http.headers_read_timeout };
            if is_h2 {
                peer.leases = Some(Leases::default());
                let whole = crate::socket::Whole::new(bytes::BytesMut::new(), read, write);
                h2::serve(shared, peer, whole, limits).await;
            } else {
                h1::serve(shared, peer, read, write, limits).await;
            }
            metrics.tcp_disconnects.fetch_add(1, Relaxed);
        }
    }
}
