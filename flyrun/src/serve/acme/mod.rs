//! Certificates that are ordered (ACME, RFC 8555), for apps with `[flyrun.acme]`.
//!
//! Each such app has a keeper, which orders a certificate where none fits, and another in time (`due`, pure). What it gets is one file of
//! the store, key and chain, and takes the old one's place at once; the proxy reads it as it reads any certificate. An order that fails is
//! told, counted, and tried again: until then what there is is shown on, and where there is nothing, clients that speak TLS are refused.

mod client;
mod due;
mod order;
mod store;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use app::config::model::{Acme, AcmeWay, App, Certificate};
use proxy::{Challenges, Facts, Site};
use tokio::task::{AbortHandle, spawn_blocking};
use tokio::time::{sleep, timeout};

use self::due::Pauses;
use self::order::Desk;
use self::store::Store;
use super::log::Log;
use crate::error::{Error, Result};

/// An order that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(300);
/// The clock is looked at so often: it may be set, and the host may sleep.
const LONGEST_SLEEP: Duration = Duration::from_secs(600);

/// Has the proxy look at files of certificates, and tells what is wrong with them.
pub type Refresh = dyn Fn() -> Vec<String> + Send + Sync;

/// Keeps the certificates of all apps that have theirs ordered.
pub struct Keepers {
    desk: Desk,
    refresh: Box<Refresh>,
    pauses: Pauses,
    log: Log,
    of_apps: Mutex<BTreeMap<String, Keeper>>,
}

/// One that is at work. Dropped, it stops.
struct Keeper {
    wish: Arc<Wish>,
    task: AbortHandle,
    counts: Counts,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    ordered: u64,
    failed: u64,
}

/// What an app wants.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Wish {
    app: String,
    names: Vec<String>,
    /// Never empty.
    ways: Vec<AcmeWay>,
    acme: Acme,
    /// Of its fly.toml.
    directory: PathBuf,
}

impl Wish {
    fn of(site: &Site) -> Option<Wish> {
        let app = &site.app;
        Some(Wish {
            app: app.name.clone(),
            names: app.acme_names().into_iter().map(str::to_string).collect(),
            ways: app.acme_ways(),
            acme: app.acme.clone()?,
            directory: site.directory.clone(),
        })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Keepers {
    /// Keeps nothing yet. What is ordered is below `root`.
    pub fn new(root: PathBuf, challenges: Arc<Challenges>, refresh: Box<Refresh>, log: Log) -> Keepers {
        let desk = Desk::new(Store::new(root), challenges);
        Keepers { desk, refresh, pauses: Pauses::default(), log, of_apps: Mutex::default() }
    }

    /// Where an app's certificate is, whether it has been ordered or not.
    pub fn certificate(&self, app: &App) -> Option<Certificate> {
        let path = self.desk.store.certificate(&app.acme.as_ref()?.directory, &app.name);
        let path = path.to_string_lossy().into_owned();
        Some(Certificate { certificate: path.clone(), key: path })
    }

    /// Keeps certificates for these apps and no others. One whose wishes are the same is left alone. Within a runtime.
    pub fn follow(self: &Arc<Self>, sites: &[Site]) {
        let wishes: BTreeMap<_, _> =
            sites.iter().filter_map(Wish::of).map(|wish| (wish.app.clone(), Arc::new(wish))).collect();
        let mut of_apps = self.lock();
        of_apps.retain(|app, keeper| wishes.get(app) == Some(&keeper.wish));
        for (app, wish) in wishes {
            of_apps.entry(app).or_insert_with(|| {
                let task = tokio::spawn(self.clone().keep(wish.clone())).abort_handle();
                Keeper { wish, task, counts: Counts::default() }
            });
        }
    }

    /// What Prometheus is told.
    pub fn figures(&self) -> String {
        let name = "flyrun_acme_orders_total";
        let mut text = format!("# HELP {name} Certificates that were ordered.\n# TYPE {name} counter\n");
        for (app, keeper) in &*self.lock() {
            for (outcome, count) in [("issued", keeper.counts.ordered), ("failed", keeper.counts.failed)] {
                let _ = writeln!(text, "{name}{{app=\"{app}\",outcome=\"{outcome}\"}} {count}");
            }
        }
        text
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Keeper>> {
        self.of_apps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn keep(self: Arc<Self>, wish: Arc<Wish>) {
        let mut failed = due::Failed::default();
        loop {
            let there = self.there(&wish).await;
            let now = SystemTime::now();
            let due = due::due(there.as_ref(), &wish.names, failed, &self.pauses);
            if let Ok(left) = due.duration_since(now)
                && !left.is_zero()
            {
                sleep(left.min(LONGEST_SLEEP)).await;
                continue;
            }
            match self.order(&wish, failed.count).await {
                Ok(facts) => {
                    failed = due::Failed::default();
                    self.count(&wish.app, |counts| counts.ordered += 1);
                    self.tell_ordered(&wish, &facts);
                }
                Err(error) => {
                    failed = failed.again(SystemTime::now());
                    self.count(&wish.app, |counts| counts.failed += 1);
                    self.tell_failed(&wish, &error, there.as_ref(), failed);
                }
            }
        }
    }

    async fn there(&self, wish: &Wish) -> Option<Facts> {
        let path = self.desk.store.certificate(&wish.acme.directory, &wish.app);
        let read = move || Facts::of_pair(&std::fs::read(path).ok()?).ok();
        spawn_blocking(read).await.ok().flatten()
    }

    /// Orders one and puts it in the old one's place. Where the app has several ways to prove its names, they take turns.
    async fn order(&self, wish: &Wish, failures: u32) -> Result<Facts> {
        let turn = usize::try_from(failures).unwrap_or_default() % wish.ways.len().max(1);
        let way = wish.ways.get(turn).ok_or_else(|| Error::new("no port of the app can prove its names"))?;
        let ordered = timeout(PATIENCE, self.desk.order(wish, *way)).await;
        let pem = ordered.map_err(|_| Error::new(format!("it took longer than {PATIENCE:?}")))??;
        let facts = Facts::of_pair(pem.as_bytes())
            .map_err(|why| Error::new(format!("what the authority sent is no certificate of ours: {why}")))?;
        if !due::fits(&facts, &wish.names) {
            return Err(Error::new(format!("the certificate is for {} alone", facts.names.join(", "))));
        }
        self.desk.store.keep_certificate(&wish.acme.directory, &wish.app, &pem)?;
        for problem in (self.refresh)() {
            self.log.line("certificate").with("why", problem).end();
        }
        Ok(facts)
    }

    fn count(&self, app: &str, change: impl FnOnce(&mut Counts)) {
        if let Some(keeper) = self.lock().get_mut(app) {
            change(&mut keeper.counts);
        }
    }

    fn tell_ordered(&self, wish: &Wish, facts: &Facts) {
        self.log
            .line("certificate ordered")
            .with("app", wish.app.as_str())
            .with("names", facts.names.join(" "))
            .with("until", time(facts.not_after))
            .end();
    }

    fn tell_failed(&self, wish: &Wish, error: &Error, there: Option<&Facts>, failed: due::Failed) {
        let shown = match there {
            Some(facts) => format!("the one that holds until {}", time(facts.not_after)),
            None => "none: clients that speak TLS are refused".to_string(),
        };
        self.log
            .line("certificate not ordered")
            .with("app", wish.app.as_str())
            .with("why", error.to_string())
            .with("shown", shown)
            .with("next_try_seconds", self.pauses.after(failed.count).as_secs())
            .end();
    }
}

fn time(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}
