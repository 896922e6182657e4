//! What all connections have in common.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

use arc_swap::ArcSwap;
use tokio::sync::Notify;

use crate::access::Log;
use crate::backend::Lives;
use crate::challenges::Challenges;
use crate::fields::Told;
use crate::held::Leases;
use crate::metrics::Metrics;
use crate::options::Options;
use crate::registry::Registry;
use crate::routes::Routes;
use crate::socket::Socket;
use crate::tls::Certificates;

/// One proxy.
pub(crate) struct Shared<M> {
    pub machines: Arc<M>,
    pub options: Options,
    pub log: Arc<dyn Log>,
    pub metrics: Metrics,
    pub routes: ArcSwap<Routes>,
    pub certificates: Certificates,
    pub challenges: Arc<Challenges>,
    pub lives: Arc<Lives>,
    pub door: Arc<Door>,
    /// Bytes of request bodies that are kept for fly-replay.
    pub kept: AtomicUsize,
}

/// Who is connected, and whether they are to leave.
#[derive(Default)]
pub(crate) struct Door {
    is_draining: AtomicBool,
    open: AtomicUsize,
    connections: Registry<Arc<Connection>>,
    empty: Notify,
}

/// A client's connection.
pub(crate) struct Connection {
    socket: Socket,
    door: Arc<Door>,
    waker: Mutex<Option<Waker>>,
}

impl Door {
    /// Counts a connection, which stays open as long as what is returned is held.
    pub fn enter(self: &Arc<Self>, socket: &Socket) -> Arc<Connection> {
        self.open.fetch_add(1, Ordering::Relaxed);
        let connection =
            Arc::new(Connection { socket: socket.clone(), door: self.clone(), waker: Mutex::default() });
        self.connections.add(&connection);
        connection
    }

    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    pub fn is_draining(&self) -> bool {
        self.is_draining.load(Ordering::SeqCst)
    }

    /// Connections end when nothing is under way on them.
    pub fn drain(&self) {
        self.is_draining.store(true, Ordering::SeqCst);
        self.connections.each(|connection| {
            let waker = connection.waker.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(waker) = waker {
                waker.wake();
            }
        });
    }

    /// Ends all connections, whatever is under way.
    pub fn cut(&self) {
        self.connections.each(|connection| connection.socket.cut());
    }

    /// Waits until nobody is connected.
    pub async fn empty(&self) {
        loop {
            let notified = self.empty.notified();
            if self.open() == 0 {
                return;
            }
            notified.await;
        }
    }
}

impl Connection {
    pub fn is_draining(&self) -> bool {
        self.door.is_draining()
    }

    /// The client is to see that something is missing, where the end of the connection would be an end like any.
    pub fn reset_at_end(&self) {
        self.socket.reset_at_end();
    }

    /// Ready when the connection is to end as soon as nothing is under way.
    pub fn poll_draining(&self, cx: &mut Context<'_>) -> Poll<()> {
        {
            let mut waker = self.waker.lock().unwrap_or_else(PoisonError::into_inner);
            if waker.as_ref().is_none_or(|old| !old.will_wake(cx.waker())) {
                *waker = Some(cx.waker().clone());
            }
        }
        // After the waker is in place, so that no call is missed.
        if self.is_draining() { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.door.open.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.door.empty.notify_waiters();
        }
    }
}

/// Who asks, over which port.
pub(crate) struct Peer {
    pub address: IpAddr,
    pub port: u16,
    pub told: Told,
    /// The app that the client's SNI named.
    pub named: Option<Arc<str>>,
    /// What its requests share where connections are counted, if several can be under way.
    pub leases: Option<Leases>,
    pub connection: Arc<Connection>,
}

impl Peer {
    pub fn new(
        address: IpAddr,
        port: u16,
        is_tls: bool,
        named: Option<Arc<str>>,
        connection: Arc<Connection>,
    ) -> Peer {
        let address = address.to_canonical();
        let told = Told::of(address, port, is_tls);
        Peer { address, port, told, named, leases: None, connection }
    }
}
