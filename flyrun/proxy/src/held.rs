//! The use of machines while it lasts.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use app::config::model::Load;

use crate::backend::Life;
use crate::machines::Lease;
use crate::metrics::AppMetrics;
use crate::routes::Route;

/// A lease and the connections of its life.
pub(crate) struct Held {
    pub lease: Lease,
    pub life: Arc<Life>,
    metrics: Arc<AppMetrics>,
}

impl Held {
    pub fn new(lease: Lease, life: Arc<Life>, metrics: &Arc<AppMetrics>) -> Arc<Held> {
        metrics.concurrency.fetch_add(1, Relaxed);
        Arc::new(Held { lease, life, metrics: metrics.clone() })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.metrics.concurrency.fetch_sub(1, Relaxed);
    }
}

/// What requests on one connection share while any of them is under way, where `concurrency.type` is connections. A
/// connection without requests uses no machine, so that browsers that keep theirs open keep none awake.
#[derive(Default)]
pub(crate) struct Leases(Mutex<Vec<Lent>>);

/// To which app and which of its services.
type Lent = (Arc<str>, usize, Weak<Held>);

impl Leases {
    /// The lease that a request of this connection has already.
    pub fn find(&self, route: &Route) -> Option<Arc<Held>> {
        if route.by != Load::Connections {
            return None;
        }
        let leases = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (.., held) =
            leases.iter().find(|(app, service, _)| *app == route.name && *service == route.service)?;
        held.upgrade().filter(|held| !held.life.is_over())
    }

    /// Others of this connection may use it too.
    pub fn share(&self, route: &Route, held: &Arc<Held>) {
        if route.by != Load::Connections {
            return;
        }
        let mut leases = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        leases.retain(|(app, service, held)| {
            held.strong_count() > 0 && (*app != route.name || *service != route.service)
        });
        leases.push((route.name.clone(), route.service, Arc::downgrade(held)));
    }
}
