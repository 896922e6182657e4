//! What can be seen of a group: for `flyrun status` and for figures.

use std::time::{Instant, SystemTime};

use app::pool::State;
use serde::{Deserialize, Serialize};

use super::{Ending, Group, Slot};
use crate::serve::targets::Scrape;

/// A group, as it is now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct View {
    pub app: String,
    pub group: String,
    pub version: String,
    /// Requests that wait for a machine.
    pub waiting: usize,
    pub max_machines: u32,
    pub min_machines_running: u32,
    pub cpus: u8,
    pub memory_mib: u64,
    /// It is not served any more.
    pub is_leaving: bool,
    /// Where its machines tell Prometheus of themselves.
    pub metrics: Option<Scrape>,
    pub machines: Vec<MachineView>,
}

/// A slot, as it is now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineView {
    pub slot: usize,
    pub name: String,
    /// While it runs.
    pub id: Option<String>,
    pub address: Option<std::net::IpAddr>,
    /// cold, starting, ready, failing, draining, suspending, stopping or suspended.
    pub state: String,
    /// Its requests, or connections.
    pub load: u32,
    /// How many seconds its workload still works, as it says, whether it has requests or not.
    pub busy_seconds: Option<u64>,
    /// How many these are at most, if there is a limit.
    pub limit: Option<u32>,
    /// resumed, base or cold.
    pub last_start: Option<String>,
    /// Seconds since the epoch.
    pub last_start_at: Option<u64>,
    /// Milliseconds until it was ready.
    pub last_start_ms: Option<f64>,
    /// What a check, or a start, said that failed.
    pub trouble: Option<String>,
    /// `[checks]` that fail.
    pub checks: Vec<String>,
}

impl View {
    /// Whether nothing of it runs.
    pub fn is_at_rest(&self) -> bool {
        self.machines.iter().all(|machine| matches!(machine.state.as_str(), "cold" | "suspended"))
    }
}

impl Group {
    /// As it is now.
    pub fn view(&self) -> View {
        let inner = self.lock();
        let template = &inner.wishes.template;
        let limit = Some(inner.wishes.limits.hard_limit).filter(|limit| *limit != u32::MAX);
        let machines = inner.pool.slots().filter_map(|(life, state)| {
            let slot = inner.slots.get(life.slot)?;
            let is_beyond = life.slot >= inner.wishes.limits.max_machines as usize && state == State::Cold;
            (!is_beyond).then(|| MachineView {
                limit,
                ..machine(slot, template.first + life.slot, state, template.name(life.slot))
            })
        });
        View {
            app: self.app.to_string(),
            group: self.name.to_string(),
            version: template.version.clone(),
            waiting: inner.pool.waiting(),
            max_machines: inner.wishes.limits.max_machines,
            min_machines_running: inner.wishes.limits.min_running,
            cpus: inner.wishes.cpus,
            memory_mib: template.memory_mib(),
            is_leaving: inner.ending != Ending::No,
            metrics: inner.wishes.metrics.clone(),
            machines: machines.collect(),
        }
    }

    /// The least load of a machine that gets requests.
    pub fn least_load(&self) -> Option<u32> {
        let inner = self.lock();
        let loads = inner.pool.slots().filter_map(|(_, state)| match state {
            State::Ready { load, failing: None } => Some(load),
            _ => None,
        });
        loads.min()
    }

    /// The slot whose machine this is.
    pub fn slot_of(&self, id: &str) -> Option<usize> {
        let inner = self.lock();
        inner.slots.iter().position(|slot| slot.id.as_deref() == Some(id))
    }
}

fn machine(slot: &Slot, number: usize, state: State, name: String) -> MachineView {
    let (word, load) = match state {
        State::Cold => ("cold", 0),
        State::Booting { .. } => ("starting", 0),
        State::Ready { load, failing: None } => ("ready", load),
        State::Ready { load, failing: Some(_) } => ("failing", load),
        State::Draining { load, .. } => ("draining", load),
        State::Suspending { rest: app::pool::Rest::Suspended } => ("suspending", 0),
        State::Suspending { rest: app::pool::Rest::Cold } => ("stopping", 0),
        State::Suspended => ("suspended", 0),
    };
    let start = slot.last_start.as_ref();
    let seconds =
        |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    MachineView {
        slot: number,
        name,
        id: slot.id.as_deref().map(str::to_string),
        address: slot
            .machine
            .as_ref()
            .filter(|_| word != "suspended" && word != "cold")
            .map(|machine| machine.address),
        state: word.to_string(),
        load,
        busy_seconds: slot
            .busy_until
            .map(|until| until.saturating_duration_since(Instant::now()).as_secs())
            .filter(|left| *left > 0 && !matches!(word, "cold" | "suspended")),
        limit: None,
        last_start: start.map(|start| start.kind.name().to_string()),
        last_start_at: start.map(|start| seconds(start.at)),
        last_start_ms: start.map(|start| start.took.as_secs_f64() * 1000.0),
        trouble: slot.trouble.clone(),
        checks: slot.named.iter().map(|(name, why)| format!("{name}: {why}")).collect(),
    }
}

#[cfg(test)]
impl View {
    /// A group for tests.
    pub fn example(machines: Vec<MachineView>) -> View {
        View {
            app: "web".into(),
            group: "app".into(),
            version: "0".into(),
            waiting: 2,
            max_machines: 1,
            min_machines_running: 0,
            cpus: 1,
            memory_mib: 256,
            is_leaving: false,
            metrics: None,
            machines,
        }
    }
}

#[cfg(test)]
impl MachineView {
    /// A slot for tests that has no machine yet.
    pub fn example() -> MachineView {
        MachineView {
            slot: 0,
            name: "web-app-0".into(),
            id: None,
            address: None,
            state: "cold".into(),
            load: 0,
            busy_seconds: None,
            limit: Some(25),
            last_start: None,
            last_start_at: None,
            last_start_ms: None,
            trouble: None,
            checks: vec![],
        }
    }
}
