//! All apps of one `flyrun serve`, and the use of their machines that the proxy is lent.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use app::config::model::App;
use app::pool::{Found, Refusal as Why, Whom};
use proxy::{Failure, Lease, Machines, Refusal, Steer, Want};

use super::group::{Before, Denied, Grant, Group, InUse, Shared, View, Wishes};
use super::template::Template;
use crate::error;
use crate::machine::State;

/// The machines of all apps.
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    /// What requests look at: replaced whole when a file has changed.
    apps: RwLock<Arc<HashMap<Arc<str>, Served>>>,
    /// Every group that there was, by app and name: those that are not served any more may come back.
    groups: Mutex<BTreeMap<Key, Arc<Group>>>,
}

/// The names of an app and of its group.
type Key = (Arc<str>, Arc<str>);

/// An app that is served.
#[derive(Debug)]
struct Served {
    /// For each of `App::services`, the groups that answer.
    services: Vec<Vec<Arc<Group>>>,
}

/// An app whose image is there.
#[derive(Debug)]
pub struct Prepared {
    pub app: App,
    pub templates: BTreeMap<Arc<str>, Template>,
}

impl Engine {
    pub fn new(shared: Arc<Shared>) -> Engine {
        Engine { shared, apps: RwLock::default(), groups: Mutex::default() }
    }

    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Serves these apps from now on. Machines that are there are taken over as they are. Blocks for a moment.
    ///
    /// # Errors
    /// The store cannot be read. Nothing has changed then.
    pub fn serve(&self, apps: Vec<Prepared>) -> error::Result<()> {
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        let mut found = HashMap::new();
        for template in apps.iter().flat_map(|app| app.templates.values()) {
            let key = (template.app.clone(), template.group.clone());
            if !groups.contains_key(&key) {
                found.insert(key, self.find(template)?);
            }
        }
        let (mut served, mut wanted) = (HashMap::new(), Vec::new());
        for Prepared { app, templates } in apps {
            for (name, template) in templates {
                let key = (template.app.clone(), name);
                wanted.push(key.clone());
                let wishes = Wishes::new(&app, template);
                match groups.get(&key) {
                    Some(group) => group.change(wishes),
                    None => {
                        let found = found.remove(&key).unwrap_or_default();
                        groups.insert(key, Group::open(self.shared.clone(), wishes, &found));
                    }
                }
            }
            let group = |name: &String| {
                groups.get(&(Arc::from(app.name.as_str()), Arc::from(name.as_str()))).cloned()
            };
            let services = app
                .services
                .iter()
                .map(|service| service.groups.iter().filter_map(group).collect())
                .collect();
            served.insert(Arc::from(app.name.as_str()), Served { services });
        }
        *self.apps.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(served);
        for (_, group) in groups.iter().filter(|(key, group)| !wanted.contains(key) && !group.is_leaving()) {
            group.line("served no more").end();
            group.leave();
        }
        Ok(())
    }

    /// The machines that a group has already. Of a version that is gone, only those that run are of any use.
    fn find(&self, template: &Template) -> error::Result<Vec<Before>> {
        let mut found = Vec::new();
        for known in self.shared.host.machines_of(template)? {
            let is_old = known.version != template.version;
            let what = match known.record.state {
                State::Suspended if is_old => {
                    self.shared.host.remove(&known.record.id)?;
                    continue;
                }
                State::Suspended => Some(Found::Suspended),
                state if state.needs_monitor() => Some(Found::Running { is_old }),
                _ => None,
            };
            let outcome = known.record.outcome.as_ref().filter(|_| what.is_none() && !is_old);
            let succeeded = outcome.map(|outcome| outcome.exit_code == 0 && outcome.error.is_none());
            found.push(Before {
                succeeded,
                slot: known.slot,
                id: Arc::from(known.record.id.as_str()),
                found: what,
            });
        }
        Ok(found)
    }

    /// All groups, as they are now.
    pub fn views(&self) -> Vec<View> {
        let groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        groups
            .values()
            .map(|group| group.view())
            .filter(|view| !view.is_leaving || !view.is_at_rest())
            .collect()
    }

    /// Whether requests go to this group of an app.
    pub fn is_asked(&self, app: &str, group: &str) -> bool {
        let apps = self.apps.read().unwrap_or_else(PoisonError::into_inner).clone();
        let groups = apps.get(app).into_iter().flat_map(|served| served.services.iter().flatten());
        groups.into_iter().any(|known| *known.name == *group)
    }

    fn groups_of(&self, want: &Want) -> Option<Vec<Arc<Group>>> {
        let apps = self.apps.read().unwrap_or_else(PoisonError::into_inner).clone();
        apps.get(&want.app)?.services.get(want.service).cloned()
    }

    fn refusal(&self, want: &Want, denied: &Denied) -> Refusal {
        let why = match denied.why {
            Why::QueueFull => "too many requests wait for this app",
            Why::TimedOut => "no machine of this app was ready in time",
            Why::StartFailed { .. } => "the machine of this app does not start",
            Why::NotStarted => "no machine of this app runs, and requests start none",
            Why::NoSuchSlot => "there is no such machine",
        };
        let id = denied.id.clone().unwrap_or_else(|| {
            let line = self.shared.log.line("refused").with("app", &*want.app).with("why", why);
            line.end_with_id()
        });
        let not_found = denied.why == Why::NoSuchSlot;
        Refusal { not_found, why: why.to_string(), id, retry_after: denied.retry_after }
    }

    fn not_found(&self, want: &Want, why: &str) -> Refusal {
        let line = self.shared.log.line("refused").with("app", &*want.app).with("why", why);
        Refusal { not_found: true, why: why.to_string(), id: line.end_with_id(), retry_after: Duration::ZERO }
    }
}

/// Which group is asked, and for which of its machines.
fn choose(groups: &[Arc<Group>], steer: Option<&Steer>) -> Option<(Arc<Group>, Whom)> {
    let found = |id: &str| groups.iter().find_map(|group| Some((group.clone(), group.slot_of(id)?)));
    match steer {
        Some(Steer::Force(id)) => return found(id).map(|(group, slot)| (group, Whom::Only(slot))),
        Some(Steer::Prefer(id)) => {
            if let Some((group, slot)) = found(id) {
                return Some((group, Whom::Rather(slot)));
            }
        }
        None => {}
    }
    if let [group] = groups {
        return Some((group.clone(), Whom::Any));
    }
    // Where none runs, the first is started.
    let loads = groups.iter().map(|group| group.least_load().unwrap_or(u32::MAX));
    let least = loads.enumerate().min_by_key(|(_, load)| *load)?.0;
    groups.get(least).map(|group| (group.clone(), Whom::Any))
}

impl Machines for Engine {
    async fn lease(&self, want: Want) -> Result<Lease, Refusal> {
        let Some(groups) = self.groups_of(&want) else {
            return Err(self.not_found(&want, "there is no such app"));
        };
        let Some((group, whom)) = choose(&groups, want.steer.as_ref()) else {
            return Err(self.not_found(&want, "there is no such machine"));
        };
        let not: Vec<usize> = want.not.iter().filter_map(|id| group.slot_of(id)).collect();
        let grant = group.ask(whom, &not).await.map_err(|denied| self.refusal(&want, &denied))?;
        let Grant { life, epoch, id, address, over } = grant;
        let held = InUse { group, life };
        // Another may have taken its slot meanwhile.
        if let Some(Steer::Force(wanted)) = &want.steer
            && **wanted != *id
        {
            return Err(self.not_found(&want, "there is no such machine"));
        }
        Ok(Lease { instance: id, life: epoch, address, over, held: Box::new(held) })
    }

    fn failed(&self, lease: &Lease, failure: Failure) {
        let Some(held) = lease.held.downcast_ref::<InUse>() else { return };
        match failure {
            Failure::Connect => held.group.suspect(held.life, "it does not accept connections"),
            Failure::Broken | Failure::TimedOut => held.group.recheck(held.life),
        }
    }
}
