//! What the web page shows: groups, as they are now, what has happened, and how long requests take.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use page::{App, LastStart, Machine, State};

use super::engine::Engine;
use super::events::what;
use super::group::{MachineView, View};
use super::host::Kind;
use super::latencies::Latencies;

/// However many look, it is found out no more often than this.
const MAX_AGE: Duration = Duration::from_millis(100);

/// Where the page's state comes from.
#[derive(Debug)]
pub struct Shown {
    engine: Arc<Engine>,
    latencies: Arc<Latencies>,
    last: Mutex<Option<(Instant, State)>>,
}

impl Shown {
    pub fn new(engine: Arc<Engine>, latencies: Arc<Latencies>) -> Shown {
        Shown { engine, latencies, last: Mutex::default() }
    }

    fn now(&self, now: Instant) -> State {
        let views = self.engine.views();
        self.latencies.keep(|app| views.iter().any(|view| view.app == app));
        let latencies = |view: &View| {
            // Only the app of a request is known, not its group.
            if self.engine.is_asked(&view.app, &view.group) {
                self.latencies.of(&view.app, now)
            } else {
                page::Latencies::default()
            }
        };
        let apps = views.iter().map(|view| app(view, latencies(view))).collect();
        State { apps, events: self.engine.shared().events.all() }
    }
}

impl page::Source for Shown {
    fn state(&self) -> State {
        let now = Instant::now();
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some((at, state)) if now.saturating_duration_since(*at) < MAX_AGE => state.clone(),
            _ => last.insert((now, self.now(now))).1.clone(),
        }
    }
}

fn app(view: &View, latencies: page::Latencies) -> App {
    App {
        name: view.app.clone(),
        group: view.group.clone(),
        machines: view.machines.iter().map(machine).collect(),
        queue: u32::try_from(view.waiting).unwrap_or(u32::MAX),
        latencies,
    }
}

fn machine(view: &MachineView) -> Machine {
    let kind = Kind::ALL.into_iter().find(|kind| view.last_start.as_deref() == Some(kind.name()));
    Machine {
        // One that was never made is told from others by its name, and so it is in events.
        id: view.id.clone().unwrap_or_else(|| view.name.clone()),
        name: view.name.clone(),
        state: state(view).to_string(),
        load: view.load,
        limit: view.limit,
        last_start: kind.zip(view.last_start_at).map(|(kind, at)| LastStart {
            kind: what(kind),
            ms: view.last_start_ms.map_or(0, |ms| ms.round() as u64),
            at: at.saturating_mul(1000),
        }),
    }
}

/// As `flyrun ps` has it.
fn state(view: &MachineView) -> &str {
    match view.state.as_str() {
        "ready" | "failing" | "draining" => "started",
        "cold" if view.trouble.is_some() => "failed",
        "cold" if view.id.is_none() => "created",
        "cold" => "stopped",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_shown_as_ps_has_it() {
        let made = MachineView { id: Some("0123".into()), ..MachineView::example() };
        let failed = MachineView { trouble: Some("no kernel".into()), ..made.clone() };
        for (view, id, state) in [
            (MachineView::example(), "web-app-0", "created"),
            (made.clone(), "0123", "stopped"),
            (failed, "0123", "failed"),
            (MachineView { state: "draining".into(), ..made.clone() }, "0123", "started"),
            (MachineView { state: "suspended".into(), ..made.clone() }, "0123", "suspended"),
        ] {
            let shown = machine(&view);
            assert_eq!((shown.id.as_str(), shown.state.as_str(), shown.limit), (id, state, Some(25)));
            assert_eq!((shown.name.as_str(), shown.last_start), ("web-app-0", None));
        }
    }

    #[test]
    fn a_group_is_shown_with_what_it_has() {
        let ready = MachineView {
            state: "ready".into(),
            load: 3,
            last_start: Some("resumed".into()),
            last_start_at: Some(7),
            last_start_ms: Some(12.6),
            ..MachineView::example()
        };
        let view = View::example(vec![ready]);
        let latencies = page::Latencies { p50: Some(1.0), count: 1, ..page::Latencies::default() };
        let shown = app(&view, latencies);
        assert_eq!((shown.name.as_str(), shown.group.as_str(), shown.queue), ("web", "app", 2));
        assert_eq!((shown.latencies, shown.machines[0].load), (latencies, 3));
        let last_start = LastStart { kind: page::What::Resumed, ms: 13, at: 7000 };
        assert_eq!(shown.machines[0].last_start, Some(last_start));
    }
}
