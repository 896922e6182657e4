//! What the page shows, as JSON. Names of fields are stable; times are milliseconds since the epoch, lengths of time milliseconds.

use serde::{Deserialize, Serialize};

/// The most events that are shown; of more, the last.
pub const MAX_EVENTS: usize = 200;

/// All that is shown.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Groups of machines of apps, in the order in which they are shown.
    pub apps: Vec<App>,
    /// What has happened, the oldest first.
    pub events: Vec<Event>,
}

/// A group of an app's machines.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct App {
    /// The app's name.
    pub name: String,
    /// The group's name, `app` where there is one.
    pub group: String,
    /// Its machines.
    pub machines: Vec<Machine>,
    /// Requests that wait for a machine.
    pub queue: u32,
    /// How long the app's requests take, where the group is asked any.
    pub latencies: Latencies,
}

/// From a request's head to the end of its answer, in milliseconds, over the last minutes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Latencies {
    /// Half of all take no longer.
    pub p50: Option<f64>,
    /// 99 of 100.
    pub p99: Option<f64>,
    /// 999 of 1,000.
    #[serde(rename = "p99.9")]
    pub p99_9: Option<f64>,
    /// How many requests these are.
    pub count: u64,
}

/// A machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// What tells it from all others.
    pub id: String,
    /// What people call it.
    pub name: String,
    /// As `flyrun ps` has it.
    pub state: String,
    /// Requests or connections that it has.
    pub load: u32,
    /// How many it is to have at most; without it there is no limit.
    pub limit: Option<u32>,
    /// How it came to run the last time.
    pub last_start: Option<LastStart>,
}

/// A start that is over.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LastStart {
    /// How.
    pub kind: What,
    /// From the wish to readiness.
    pub ms: u64,
    /// When it was ready.
    pub at: u64,
}

/// Something that has happened to a machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// When it was over.
    pub at: u64,
    /// The app's name.
    pub app: String,
    /// The machine's id.
    pub machine: String,
    /// What.
    pub what: What,
    /// How long it took, if it took time.
    pub ms: Option<u64>,
}

/// What happens to machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// It runs again from its own snapshot.
    Resumed,
    /// It runs from a base snapshot.
    Base,
    /// It has booted.
    ColdBoot,
    /// It is on disk.
    Suspended,
    /// It has ended.
    Stopped,
    /// It did not start, or was lost.
    Failed,
    /// It is gone.
    Destroyed,
}

impl State {
    /// As JSON, with the last [`MAX_EVENTS`].
    pub fn to_json(&self) -> String {
        let first = self.events.len().saturating_sub(MAX_EVENTS);
        let events = self.events.get(first..).unwrap_or_default();
        // Strings and numbers: nothing in it cannot be written.
        serde_json::json!({ "apps": self.apps, "events": events }).to_string()
    }
}
