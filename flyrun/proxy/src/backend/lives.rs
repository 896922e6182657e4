//! The lives of machines, and what is connected in each.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::sync::watch;

use super::h1::Idle;
use super::h2::Shared;
use crate::machines::Lease;
use crate::opened::Opened;
use crate::registry::Registry;
use crate::socket::Socket;

/// So many connections are kept for one service of one machine.
const MAX_IDLE: usize = 256;
/// A connection is kept so long without a request.
const IDLE_LIMIT: Duration = Duration::from_secs(30);
/// How often the kept ones are looked through.
const SWEEP: Duration = Duration::from_secs(10);

/// A machine and the number of its life.
type Name = (Arc<str>, u64);

/// All lives that are known.
#[derive(Default)]
pub(crate) struct Lives {
    lives: Mutex<HashMap<Name, Arc<Life>>>,
}

/// One life of one machine.
pub(crate) struct Life {
    is_over: AtomicBool,
    sockets: Registry<Socket>,
    opened: Arc<Opened>,
    idle: Mutex<Vec<(SocketAddr, Vec<Idle>)>>,
    h2: Mutex<Vec<(SocketAddr, Shared)>>,
}

impl Lives {
    /// The life that a lease is of.
    pub fn of(self: &Arc<Self>, lease: &Lease) -> Arc<Life> {
        let key = (lease.instance.clone(), lease.life);
        let mut lives = lock(&self.lives);
        if let Some(life) = lives.get(&key) {
            return life.clone();
        }
        let life = Arc::new(Life {
            is_over: AtomicBool::new(*lease.over.borrow()),
            sockets: Registry::default(),
            opened: lease.opened.clone(),
            idle: Mutex::default(),
            h2: Mutex::default(),
        });
        lives.insert(key.clone(), life.clone());
        drop(lives);
        tokio::spawn(follow(self.clone(), key, life.clone(), lease.over.clone()));
        life
    }
}

/// Waits for the end of a life, and drops what is long idle meanwhile.
async fn follow(lives: Arc<Lives>, key: Name, life: Arc<Life>, mut over: watch::Receiver<bool>) {
    // Whoever had the other end and dropped it can tell no more: the life is over.
    while let Err(_elapsed) = tokio::time::timeout(SWEEP, over.wait_for(|is_over| *is_over)).await {
        life.sweep();
    }
    lock(&lives.lives).remove(&key);
    life.end();
}

impl Life {
    /// Whether its machine is gone, or suspended.
    pub fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Acquire)
    }

    /// A connection that is to end with this life; false if the life is over.
    pub fn own(&self, socket: &Socket) -> bool {
        self.sockets.add(socket);
        // In this order, so that the end finds the socket or the socket the end.
        if self.is_over() {
            socket.cut();
            return false;
        }
        true
    }

    /// A connection that was made before, and has carried nothing.
    pub fn take_opened(&self, address: SocketAddr) -> Option<TcpStream> {
        self.opened.take(address)
    }

    fn end(&self) {
        self.is_over.store(true, Ordering::Release);
        self.opened.close();
        self.sockets.each(Socket::cut);
        lock(&self.idle).clear();
        lock(&self.h2).clear();
    }

    fn sweep(&self) {
        let now = Instant::now();
        for (_, idle) in lock(&self.idle).iter_mut() {
            idle.retain(|one| one.is_open() && now.duration_since(one.since) < IDLE_LIMIT);
        }
        lock(&self.h2).retain(|(_, shared)| shared.is_open());
    }

    /// The connection that was used last, as the others may then come to be unneeded. `fresh_for`: it has been idle no longer.
    pub fn take_idle(&self, address: SocketAddr, fresh_for: Duration) -> Option<Idle> {
        let mut all = lock(&self.idle);
        let (_, idle) = all.iter_mut().find(|(of, _)| *of == address)?;
        while let Some(one) = idle.pop() {
            if one.since.elapsed() > fresh_for {
                // All others are older, and good for other requests perhaps.
                idle.push(one);
                return None;
            }
            if one.is_open() {
                return Some(one);
            }
        }
        None
    }

    pub fn keep_idle(&self, address: SocketAddr, one: Idle) {
        if self.is_over() {
            return;
        }
        let mut all = lock(&self.idle);
        match all.iter_mut().find(|(of, _)| *of == address) {
            Some((_, idle)) if idle.len() < MAX_IDLE => idle.push(one),
            Some(_) => {}
            None => all.push((address, vec![one])),
        }
    }

    /// The connection of HTTP/2 to a service.
    pub fn h2(&self, address: SocketAddr) -> Option<Shared> {
        let all = lock(&self.h2);
        all.iter().find(|(of, shared)| *of == address && shared.is_open()).map(|(_, shared)| shared.clone())
    }

    pub fn keep_h2(&self, address: SocketAddr, shared: Shared) {
        if self.is_over() {
            return;
        }
        let mut all = lock(&self.h2);
        all.retain(|(of, old)| *of != address && old.is_open());
        all.push((address, shared));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
