//! Connections to a machine that are there before somebody needs one.

use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::TcpStream;

/// Connections to one life of a machine that have carried nothing: whoever found out that it accepts them has made them. Each goes to a
/// request that comes soon, so that the machine does not accept, read and close one in vain before it accepts that request's.
#[derive(Debug, Default)]
pub struct Opened(Mutex<Vec<One>>);

#[derive(Debug)]
struct One {
    stream: TcpStream,
    address: SocketAddr,
    since: Instant,
}

impl Opened {
    /// For how long a request may come: one that is used later is no better than a new one, and keeps a machine from others that
    /// serves one connection after another. Whoever has put it in removes it then ([`Self::clear`]).
    pub const SOON: Duration = Duration::from_millis(250);

    /// A connection for the next request to where it leads.
    pub fn put(&self, stream: TcpStream) {
        let Ok(address) = stream.peer_addr() else { return };
        self.with(|all| all.push(One { stream, address, since: Instant::now() }));
    }

    /// Closes what nobody has used.
    pub fn clear(&self) {
        self.with(Vec::clear);
    }

    pub(crate) fn take(&self, address: SocketAddr) -> Option<TcpStream> {
        self.with(|all| {
            all.retain(|one| one.since.elapsed() < Self::SOON);
            let index = all.iter().position(|one| one.address == address)?;
            Some(all.swap_remove(index).stream)
        })
    }

    fn with<T>(&self, work: impl FnOnce(&mut Vec<One>) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn each_is_used_once_soon_and_where_it_leads() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let opened = Opened::default();
        for _ in 0..3 {
            opened.put(TcpStream::connect(address).await.unwrap());
        }
        assert!(opened.take(SocketAddr::new(address.ip(), 1)).is_none());
        assert!(opened.take(address).is_some());
        opened.with(|all| all[0].since -= Opened::SOON);
        assert!(opened.take(address).is_some());
        assert!(opened.take(address).is_none());
        opened.put(TcpStream::connect(address).await.unwrap());
        opened.clear();
        assert!(opened.take(address).is_none());
    }
}
