//! A new version takes an old one's place: machines are made beside the old ones, and get requests when their checks pass. Until then,
//! and if one of them fails, all goes on as it was.

use std::sync::Arc;
use std::time::Duration;

use app::config::model::{App, Strategy};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, timeout};

use super::control::{Step, Tell};
use super::engine::{Engine, Key, Prepared};
use super::group::{Failure, Group, Standing, Wishes};
use super::release::last_lines;
use crate::error::{Error, Result};
use crate::machine::State;

/// How often it is looked what checks say that fail.
const LOOK: Duration = Duration::from_millis(500);
/// So long a machine that nothing is asked of must run, to be taken for one that does.
const STEADY: Duration = Duration::from_secs(5);
/// How long it may take until a machine that has ended has given back its volumes.
const SETTLE: Duration = Duration::from_secs(60);

/// Whether machines of a new version do their work.
type Tried = std::result::Result<(), Failure>;

/// How a new version comes to its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct How {
    pub strategy: Strategy,
    /// A machine may take so long until its checks pass.
    pub wait: Duration,
}

impl How {
    /// As the file says.
    pub fn of(app: &App) -> How {
        How { strategy: app.deploy.strategy, wait: app.deploy.wait_timeout }
    }
}

/// A group whose machines are replaced.
#[derive(Debug)]
struct Change {
    key: Key,
    /// Not there if the group is new in its app.
    old: Option<Arc<Group>>,
    new: Arc<Group>,
    /// How many machines ran before.
    had: usize,
    /// The new ones cannot run beside the old ones.
    in_place: bool,
}

/// What a deploy has left to do.
#[derive(Debug)]
#[must_use = "they are waited for"]
pub struct Old(Vec<Arc<Group>>);

impl Engine {
    /// Whether machines of an app that is served would be others now.
    pub fn is_changed(&self, prepared: &Prepared) -> bool {
        let is_served =
            |group: &Arc<str>| self.current(&(Arc::from(prepared.app.name.as_str()), group.clone()));
        let known: Vec<_> =
            prepared.templates.iter().map(|(name, template)| (is_served(name), template)).collect();
        // An app that is new replaces nothing.
        known.iter().any(|(group, _)| group.is_some())
            && known
                .iter()
                .any(|(group, new)| group.as_ref().is_none_or(|old| old.template().version != new.version))
    }

    /// Brings a new version of an app to its place. Requests go to it alone when this returns.
    ///
    /// # Errors
    /// A machine of it fails. The old version goes on.
    pub async fn deploy(&self, prepared: &Prepared, how: How, tell: &Tell) -> Result<Old> {
        let mut changes = Vec::new();
        if let Err(error) = self.begin(prepared, &mut changes) {
            changes.iter().for_each(|change| change.new.retire());
            return Err(error);
        }
        let mut result = Ok(());
        // Requests cannot go to both where the versions listen on different ports.
        let at_once = changes.iter().all(|change| !change.in_place) && self.has_other_ports(&prepared.app);
        if how.strategy == Strategy::Bluegreen || at_once {
            result = self.bluegreen(&changes, how, tell).await;
        } else {
            for change in &changes {
                result = self.rolling(change, how, tell).await;
                if result.is_err() {
                    break;
                }
            }
        }
        if let Err(failure) = result {
            return Err(self.roll_back(changes, &prepared.app.name, failure, tell).await);
        }
        for change in &changes {
            change.new.passes_trial(change.had == 0);
        }
        let old: Vec<_> = changes.iter().filter_map(|change| change.old.clone()).collect();
        self.replace(changes.into_iter().map(|change| (change.key, change.new)).collect());
        old.iter().for_each(|old| old.retire());
        tell.step(Step::Switched);
        Ok(Old(old))
    }

    /// Waits until nothing is left of an old version.
    pub async fn drained(&self, old: Old, tell: &Tell) {
        for group in old.0 {
            let mut changes = group.changes();
            let mut told = 0;
            loop {
                let alive = group.alive();
                if alive == 0 {
                    break;
                }
                if alive != told {
                    tell.step(Step::Draining { machines: alive });
                    told = alive;
                }
                let _ = timeout(LOOK, changes.changed()).await;
            }
        }
    }

    fn begin(&self, prepared: &Prepared, changes: &mut Vec<Change>) -> Result<()> {
        for (name, template) in &prepared.templates {
            let key: Key = (template.app.clone(), name.clone());
            let old = self.current(&key);
            if old.as_ref().is_some_and(|old| old.template().version == template.version) {
                continue;
            }
            let had = old.as_ref().map_or(0, |old| old.alive());
            let mut template = template.clone();
            let most = Wishes::new(&prepared.app, template.clone(), &prepared.counts).limits.max_machines;
            template.first = self.free_numbers(&template, (most as usize).max(had).max(1))?;
            let in_place = old.is_some() && template.has_volumes();
            let wishes = Wishes::new(&prepared.app, template, &prepared.counts);
            let new = Group::on_trial(self.shared().clone(), wishes);
            new.line("deploy").with("version", new.template().version.as_str()).end();
            self.shows(new.clone());
            changes.push(Change { key, old, new, had, in_place });
        }
        Ok(())
    }

    /// All new machines are there before the first request goes to one.
    async fn bluegreen(&self, changes: &[Change], how: How, tell: &Tell) -> Tried {
        // The old version may have more machines by now; the new one gets them as it needs them.
        let wanted = |change: &Change| change.most().min(change.had.max(1));
        changes.iter().for_each(|change| change.new.target(wanted(change) as u32));
        for change in changes {
            ready(change, wanted(change), how, tell).await?;
        }
        Ok(())
    }

    /// One after another: a new one is there before an old one ends.
    async fn rolling(&self, change: &Change, how: How, tell: &Tell) -> Tried {
        if change.in_place {
            // A volume is in one machine at a time: requests wait for the new one.
            self.answers(&change.key, Some(vec![change.new.clone()]));
            if let Some(old) = &change.old {
                old.clears_out();
                gone(old).await;
            }
        }
        change.new.target(1);
        ready(change, 1, how, tell).await?;
        let Some(old) = change.old.as_ref().filter(|_| !change.in_place) else { return Ok(()) };
        if old.alive() == 0 {
            return Ok(());
        }
        self.answers(&change.key, Some(vec![change.new.clone(), old.clone()]));
        old.freeze();
        let mut count = 1;
        loop {
            let (alive, mut changes) = (old.alive(), old.changes());
            old.gives_way();
            tell.step(Step::Draining { machines: alive });
            while old.alive() == alive {
                if let Standing::Failed(failure) = change.new.standing() {
                    return Err(failure);
                }
                let _ = timeout(LOOK, changes.changed()).await;
            }
            if old.alive() == 0 {
                return Ok(());
            }
            count = change.most().min(count + 1);
            change.new.target(count as u32);
            ready(change, count, how, tell).await?;
        }
    }

    /// All is as it was before, but for the machine's last word.
    async fn roll_back(&self, changes: Vec<Change>, app: &str, failure: Failure, tell: &Tell) -> Error {
        tell.step(Step::RollingBack { why: failure.to_string() });
        let last_line = self.last_line(&failure.machine).await;
        for change in changes {
            let Change { key, old, new, had, in_place } = change;
            if !in_place {
                self.answers(&key, None);
            }
            new.line("deploy failed").with("why", failure.to_string()).end();
            new.retire();
            let Some(old) = old else { continue };
            if in_place {
                gone(&new).await;
            }
            old.comes_back(had);
            self.answers(&key, None);
        }
        let told = format!("app {app}: not deployed, the old version goes on: {failure}");
        Error::new(told).advice(match last_line {
            Some(line) => format!("Its last line was: {line}"),
            None => "It has written nothing.".to_string(),
        })
    }

    async fn last_line(&self, machine: &str) -> Option<String> {
        let (host, machine) = (self.shared().host.clone(), machine.to_string());
        let lines = spawn_blocking(move || {
            let record = host.context.machines().find(&machine).ok()?;
            last_lines(&host, &record.id, 1).pop()
        });
        lines.await.ok().flatten()
    }
}

impl Change {
    /// How many machines the new version may have; one is tried in any case.
    fn most(&self) -> usize {
        (self.new.max_machines() as usize).max(1)
    }
}

/// Waits until so many machines of the new version are ready.
async fn ready(change: &Change, count: usize, how: How, tell: &Tell) -> Tried {
    let new = &change.new;
    let deadline = Instant::now() + how.wait;
    let mut changes = new.changes();
    tell.step(Step::Starting { group: new.name.to_string(), machines: count });
    let mut told = Vec::new();
    let mut steady_at = None;
    loop {
        let (ready, trouble) = match new.standing() {
            Standing::Failed(failure) => return Err(failure),
            Standing::Goes { ready, trouble } => (ready, trouble),
        };
        if ready.len() >= count && !new.has_checks() {
            let steady_at = *steady_at.get_or_insert_with(|| Instant::now() + STEADY);
            if Instant::now() < steady_at {
                let _ = timeout(LOOK, changes.changed()).await;
                continue;
            }
        }
        for machine in &ready {
            if !tell.knows(machine) {
                tell.step(Step::Healthy { machine: machine.clone() });
            }
        }
        if ready.len() >= count {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let machine = new.template().name(ready.len());
            let why = format!("it is not healthy within {:?}", how.wait);
            return Err(match trouble {
                Some(Failure { machine, why: last }) => Failure { machine, why: format!("{why}: {last}") },
                None => Failure { machine, why },
            });
        }
        if let Some(trouble) = trouble.filter(|trouble| !told.contains(trouble)) {
            tell.step(Step::Unhealthy { machine: trouble.machine.clone(), why: trouble.why.clone() });
            told.push(trouble);
        }
        let _ = timeout(LOOK, changes.changed()).await;
    }
}

/// Waits until no machine of a group runs or is on disk.
async fn gone(group: &Arc<Group>) {
    let deadline = Instant::now() + SETTLE + group.drain_timeout();
    while Instant::now() < deadline {
        let (host, template) = (group.shared.host.clone(), group.template());
        let is_gone = spawn_blocking(move || {
            let known = host.machines_of(&template).unwrap_or_default();
            let mut theirs = known.iter().filter(|known| known.version == template.version);
            let holds = |state: State| state.needs_monitor() || state == State::Suspended;
            !theirs.any(|known| holds(known.record.state))
        });
        if group.alive() == 0 && is_gone.await.unwrap_or(true) {
            return;
        }
        sleep(LOOK).await;
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.machine, self.why)
    }
}
