//! The border to whoever starts and stops machines.

use std::any::Any;
use std::fmt;
use std::future::Future;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::opened::Opened;

/// Whoever has machines, starts them for requests, and stops them when nobody needs them.
pub trait Machines: Send + Sync + 'static {
    /// The use of a machine for one request or one connection, as the service counts. Waits while one starts; the app's
    /// limits bound how many wait and how long. A future that is dropped waits no more.
    ///
    /// # Errors
    /// No machine can be had now.
    fn lease(&self, want: Want) -> impl Future<Output = Result<Lease, Refusal>> + Send;

    /// What a machine that was lent did wrong. The next check may come at once for that.
    fn failed(&self, lease: &Lease, failure: Failure);
}

/// Whose machine is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Want {
    /// The app's name.
    pub app: Arc<str>,
    /// Which of `App::services`. Its groups are asked for a machine.
    pub service: usize,
    /// Which machine, if somebody named one.
    pub steer: Option<Steer>,
    /// Ids of machines that failed this request already.
    pub not: Vec<Arc<str>>,
}

/// Which machine a request is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Steer {
    /// This one if it can be had, else any.
    Prefer(String),
    /// This one or none.
    Force(String),
}

/// The use of a machine, which ends when this is dropped.
pub struct Lease {
    /// The machine's id.
    pub instance: Arc<str>,
    /// Tells one life of the machine from the next: what was connected in one is not used in another.
    pub life: u64,
    /// Where the machine is reached from this host.
    pub address: IpAddr,
    /// A connection to it that may be used instead of a new one, the same for all leases of one life.
    pub opened: Arc<Opened>,
    /// Turns true when this life is over, with whatever is still under way. A sender that is gone means the same.
    pub over: watch::Receiver<bool>,
    /// Whatever is to be dropped at the end.
    pub held: Box<dyn Any + Send + Sync>,
}

/// What went wrong with a machine that was lent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It does not accept connections.
    Connect,
    /// It closed or broke the connection before its answer was whole.
    Broken,
    /// It took longer than it may.
    TimedOut,
}

/// Why there is no machine: a 503, unless `not_found`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// No such app, service or machine: 404.
    pub not_found: bool,
    /// One sentence, for the client too: no paths, no addresses.
    pub why: String,
    /// Finds the line of the log that tells more.
    pub id: String,
    /// `Retry-After`; zero if to ask again changes nothing.
    pub retry_after: Duration,
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("instance", &self.instance)
            .field("life", &self.life)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (id {})", self.why, self.id)
    }
}

impl std::error::Error for Refusal {}
