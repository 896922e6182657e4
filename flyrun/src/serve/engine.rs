//! All apps of one `flyrun serve`, and the use of their machines that the proxy is lent.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use app::config::model::App;
use app::pool::{Found, Refusal as Why, Whom};
use proxy::{Failure, Lease, Machines, Refusal, Steer, Want};

use super::group::{Before, Denied, Grant, Group, InUse, Shared, View, Wishes};
use super::host::Known;
use super::template::Template;
use crate::error;
use crate::machine::{Record, State};

/// So many groups are asked for one request at most.
const MAX_TRIED: usize = 3;

/// The machines of all apps.
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    /// What requests look at: replaced whole when a file has changed.
    apps: RwLock<Arc<HashMap<Arc<str>, Served>>>,
    groups: Mutex<Groups>,
}

/// The names of an app and of its group.
pub(super) type Key = (Arc<str>, Arc<str>);

#[derive(Debug, Default)]
struct Groups {
    /// Every group that there was, by app and name: those that are not served any more may come back.
    current: BTreeMap<Key, Arc<Group>>,
    /// Who answers where that is not the current group alone: in a deploy.
    answering: BTreeMap<Key, Vec<Arc<Group>>>,
    /// Those on trial, and those whose place another has taken.
    others: Vec<Arc<Group>>,
    /// The apps that are served.
    served: BTreeMap<Arc<str>, App>,
}

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
    /// `flyrun scale count`, by group.
    pub counts: BTreeMap<String, u32>,
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
        let mut groups = self.lock();
        let mut found = HashMap::new();
        let mut apps = apps;
        for template in apps.iter_mut().flat_map(|app| app.templates.values_mut()) {
            let key = (template.app.clone(), template.group.clone());
            match groups.current.get(&key) {
                Some(group) => template.first = group.template().first,
                None => _ = found.insert(key, self.find(template)?),
            }
        }
        let mut wanted = Vec::new();
        groups.served.clear();
        for Prepared { app, templates, counts } in apps {
            for (name, template) in templates {
                let key = (template.app.clone(), name);
                wanted.push(key.clone());
                let wishes = Wishes::new(&app, template, &counts);
                match groups.current.get(&key) {
                    Some(group) => group.change(wishes),
                    None => {
                        let found = found.remove(&key).unwrap_or_default();
                        groups.current.insert(key, Group::open(self.shared.clone(), wishes, &found));
                    }
                }
            }
            groups.served.insert(Arc::from(app.name.as_str()), app);
        }
        self.publish(&groups);
        let is_left = |key: &Key, group: &Arc<Group>| !wanted.contains(key) && !group.is_leaving();
        for (_, group) in groups.current.iter().filter(|(key, group)| is_left(key, group)) {
            group.line("served no more").end();
            group.leave();
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Groups> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests go where they are to go now.
    fn publish(&self, groups: &Groups) {
        let of = |app: &App, name: &String| {
            let key: Key = (Arc::from(app.name.as_str()), Arc::from(name.as_str()));
            let current = groups.current.get(&key).cloned();
            groups.answering.get(&key).cloned().unwrap_or_else(|| current.into_iter().collect())
        };
        let served = groups.served.iter().map(|(name, app)| {
            let services = app.services.iter();
            let services =
                services.map(|service| service.groups.iter().flat_map(|group| of(app, group)).collect());
            (name.clone(), Served { services: services.collect() })
        });
        *self.apps.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(served.collect());
    }

    /// The group that has this name now, if its app is served.
    pub(super) fn current(&self, key: &Key) -> Option<Arc<Group>> {
        self.lock().current.get(key).filter(|group| !group.is_leaving()).cloned()
    }

    /// Whether machines of an app that is served listen on other ports than these.
    pub(super) fn has_other_ports(&self, app: &App) -> bool {
        let ports = |app: &App| app.services.iter().map(|service| service.internal_port).collect::<Vec<_>>();
        self.lock().served.get(app.name.as_str()).is_some_and(|served| ports(served) != ports(app))
    }

    /// Shows a group that is none of the current ones, as long as it has machines.
    pub(super) fn shows(&self, group: Arc<Group>) {
        self.lock().others.push(group);
    }

    /// Lets these groups answer for one, or the current one alone.
    pub(super) fn answers(&self, key: &Key, by: Option<Vec<Arc<Group>>>) {
        let mut groups = self.lock();
        match by {
            Some(by) => _ = groups.answering.insert(key.clone(), by),
            None => _ = groups.answering.remove(key),
        }
        self.publish(&groups);
    }

    /// Groups take the places of those that had their names. From now on they alone answer.
    pub(super) fn replace(&self, by: Vec<(Key, Arc<Group>)>) {
        let mut groups = self.lock();
        for (key, new) in by {
            groups.others.retain(|other| !Arc::ptr_eq(other, &new));
            groups.answering.remove(&key);
            if let Some(old) = groups.current.insert(key, new) {
                groups.others.push(old);
            }
        }
        self.publish(&groups);
    }

    /// The machines that a group has already. Of a version that is gone, only those that run are of any use, and only where
    /// none of the current version has their place: then they are what a deploy has left that was cut off. Where that has left two
    /// such versions, the one that was deployed last goes on.
    fn find(&self, template: &mut Template) -> error::Result<Vec<Before>> {
        let known = self.shared.host.machines_of(template)?;
        let kept = kept_version(&known, &template.version).map(str::to_string);
        let kept = |known: &&Known| Some(&known.version) == kept.as_ref();
        let number = |known: &Known| known.number;
        let first = known.iter().filter(kept).map(number).min().or_else(|| known.iter().map(number).min());
        template.first = first.unwrap_or(0);
        let mut found = Vec::new();
        for known in &known {
            let is_old = known.version != template.version;
            let state = known.record.state;
            let what = match state {
                State::Suspended if !is_old => Some(Found::Suspended),
                State::Stopping if is_old => None,
                state if state.needs_monitor() => Some(Found::Running { is_old }),
                _ => None,
            };
            let slot = known.number.checked_sub(template.first).filter(|_| kept(&known));
            let Some(slot) = slot.filter(|_| !is_old || what.is_some()) else {
                self.remove(known.record.clone());
                continue;
            };
            let outcome = known.record.outcome.as_ref().filter(|_| what.is_none() && !is_old);
            let succeeded = outcome.map(|outcome| outcome.exit_code == 0 && outcome.error.is_none());
            found.push(Before { succeeded, slot, id: Arc::from(known.record.id.as_str()), found: what });
        }
        Ok(found)
    }

    /// Ends a machine that nobody needs, in its own time, and takes it away.
    fn remove(&self, record: Record) {
        let shared = self.shared.clone();
        self.shared.spawn_blocking(move || {
            let _ = shared.host.stop(&record.id, None);
            if let Err(error) = shared.host.remove(&record.id) {
                shared
                    .log
                    .line("removal failed")
                    .with("machine", record.id)
                    .with("why", error.to_string())
                    .end();
            }
        });
    }

    /// The first number from which on so many machines of a group have numbers that no other has.
    pub(super) fn free_numbers(&self, template: &Template, count: usize) -> error::Result<usize> {
        let key = (template.app.clone(), template.group.clone());
        let mut taken: Vec<_> =
            self.shared.host.machines_of(template)?.iter().map(|known| known.number).collect();
        if let Some(group) = self.current(&key) {
            let first = group.template().first;
            taken.extend(first..first + group.max_machines() as usize);
        }
        Ok(free_from(taken, count))
    }

    /// All groups, as they are now.
    pub fn views(&self) -> Vec<View> {
        let mut groups = self.lock();
        groups.others.retain(|group| !group.is_retired() || group.alive() > 0);
        let groups = groups.current.values().chain(&groups.others);
        groups.map(|group| group.view()).filter(|view| !view.is_leaving || !view.is_at_rest()).collect()
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

/// The version whose machines keep their places: the current one, or, where there is none of that, the one that was deployed last of
/// those that run. What is being stopped has been replaced.
fn kept_version<'k>(known: &'k [Known], current: &'k str) -> Option<&'k str> {
    if known.iter().any(|known| known.version == current) {
        return Some(current);
    }
    let runs = |known: &&Known| known.record.state.needs_monitor() && known.record.state != State::Stopping;
    let last = known.iter().filter(runs).max_by_key(|known| (known.record.created_at, known.number))?;
    Some(&last.version)
}

/// The first number from which on so many are free.
fn free_from(mut taken: Vec<usize>, count: usize) -> usize {
    taken.sort_unstable();
    let mut free = 0;
    for number in taken {
        if number >= free + count {
            break;
        }
        free = free.max(number + 1);
    }
    free
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
        let mut tried: Vec<Arc<Group>> = Vec::new();
        let (group, grant) = loop {
            let Some(mut groups) = self.groups_of(&want) else {
                return Err(self.not_found(&want, "there is no such app"));
            };
            groups.retain(|group| !tried.iter().any(|other| Arc::ptr_eq(other, group)));
            let Some((group, whom)) = choose(&groups, want.steer.as_ref()) else {
                return Err(self.not_found(&want, "there is no such machine"));
            };
            let not: Vec<usize> = want.not.iter().filter_map(|id| group.slot_of(id)).collect();
            match group.ask(whom, &not).await {
                Ok(grant) => break (group, grant),
                // Another may have taken its place meanwhile, or be about to.
                Err(denied) if denied.why == Why::NotStarted && tried.len() < MAX_TRIED => {
                    tried.push(group);
                    let is_tried = |group: &Arc<Group>| tried.iter().any(|other| Arc::ptr_eq(other, group));
                    if self.groups_of(&want).is_none_or(|groups| groups.iter().all(is_tried)) {
                        return Err(self.refusal(&want, &denied));
                    }
                }
                Err(denied) => return Err(self.refusal(&want, &denied)),
            }
        };
        let Grant { life, epoch, id, address, opened, over } = grant;
        let held = InUse { group, life };
        // Another may have taken its slot meanwhile.
        if let Some(Steer::Force(wanted)) = &want.steer
            && **wanted != *id
        {
            return Err(self.not_found(&want, "there is no such machine"));
        }
        Ok(Lease { instance: id, life: epoch, address, opened, over, held: Box::new(held) })
    }

    fn failed(&self, lease: &Lease, failure: Failure) {
        let Some(held) = lease.held.downcast_ref::<InUse>() else { return };
        match failure {
            Failure::Connect => held.group.suspect(held.life, "it does not accept connections"),
            Failure::Broken | Failure::TimedOut => held.group.recheck(held.life),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_deploy_that_was_cut_off_the_newest_machines_go_on() {
        let known = |number, version: &str, state, created_at| {
            let record = Record { state, created_at, ..Record::example("") };
            Known { number, version: version.to_string(), record }
        };
        let of = |known: &[Known]| kept_version(known, "three").map(str::to_string);
        let one = known(0, "one", State::Started, 10);
        let two = known(2, "two", State::Started, 20);
        assert_eq!(of(&[]), None);
        assert_eq!(of(std::slice::from_ref(&one)).as_deref(), Some("one"));
        for both in [[one.clone(), two.clone()], [two.clone(), one.clone()]] {
            assert_eq!(of(&both).as_deref(), Some("two"));
        }
        // What does not run any more, or is about to end, has no place to keep.
        for state in [State::Stopping, State::Stopped, State::Failed, State::Suspended] {
            let ending = known(2, "two", state, 20);
            assert_eq!(of(&[ending.clone(), one.clone()]).as_deref(), Some("one"), "{state}");
            assert_eq!(of(&[ending]), None, "{state}");
        }
        assert_eq!(of(&[one, two, known(4, "three", State::Stopped, 5)]).as_deref(), Some("three"));
    }

    #[test]
    fn machines_of_a_deploy_have_the_first_numbers_that_are_free() {
        for (taken, count, first) in [
            (vec![], 1, 0),
            (vec![0], 1, 1),
            (vec![1], 1, 0),
            (vec![1], 2, 2),
            (vec![5, 0, 1, 2, 2], 2, 3),
            (vec![5, 0, 1, 2, 4], 2, 6),
        ] {
            assert_eq!(free_from(taken.clone(), count), first, "{taken:?} {count}");
        }
    }
}
