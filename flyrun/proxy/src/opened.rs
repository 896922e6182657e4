//! A connection to a machine that is there before somebody needs one.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::TcpStream;

/// A connection is no use to a request that comes later than this, and keeps a machine from others that serves one after another.
const SOON: Duration = Duration::from_millis(250);

/// A connection to one life of a machine that has carried nothing: whoever found out that it accepts them has made it. It goes to a
/// request that comes soon, so that the machine does not accept, read and close it in vain before it accepts that request's.
#[derive(Debug, Default)]
pub struct Opened(Mutex<Option<TcpStream>>);

impl Opened {
    /// For the next request to where it leads; closed if none comes within a quarter of a second. Within a tokio runtime.
    pub fn put(self: &Arc<Self>, stream: TcpStream) {
        *self.lock() = Some(stream);
        let opened = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(SOON).await;
            opened.close();
        });
    }

    pub(crate) fn take(&self, address: SocketAddr) -> Option<TcpStream> {
        self.lock().take_if(|stream| stream.peer_addr().is_ok_and(|leads_to| leads_to == address))
    }

    pub(crate) fn close(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<TcpStream>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt as _;
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn it_is_used_once_and_where_it_leads_or_closed_soon() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let opened = Arc::new(Opened::default());
        opened.put(TcpStream::connect(address).await.unwrap());
        assert!(opened.take(SocketAddr::new(address.ip(), 1)).is_none());
        assert!(opened.take(address).is_some());
        assert!(opened.take(address).is_none());
        listener.accept().await.unwrap();
        opened.put(TcpStream::connect(address).await.unwrap());
        let (mut other_end, _) = listener.accept().await.unwrap();
        assert_eq!(other_end.read(&mut [0]).await.unwrap(), 0);
        assert!(opened.take(address).is_none());
    }
}
