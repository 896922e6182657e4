//! What has happened to machines lately, for the page.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use page::{Event, MAX_EVENTS, What};

use super::host::Kind;

/// The last events, of all apps.
#[derive(Debug, Default)]
pub struct Events(Mutex<VecDeque<Event>>);

impl Events {
    /// Something has just happened to a machine, after so long.
    pub fn add(&self, app: &str, machine: &str, what: What, took: Option<Duration>) {
        let at = millis(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default());
        let event = Event { at, app: app.into(), machine: machine.into(), what, ms: took.map(millis) };
        let mut events = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if events.len() >= MAX_EVENTS {
            events.pop_front();
        }
        events.push_back(event);
    }

    /// The oldest first.
    pub fn all(&self) -> Vec<Event> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}

/// What a start is on the page.
pub fn what(kind: Kind) -> What {
    match kind {
        Kind::Resumed => What::Resumed,
        Kind::Base => What::Base,
        Kind::Cold => What::ColdBoot,
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_events_are_kept_in_their_order() {
        let events = Events::default();
        for number in 0..MAX_EVENTS + 10 {
            let took = Duration::from_millis(number as u64);
            events.add("web", "m", what(Kind::Resumed), Some(took));
        }
        let all = events.all();
        assert_eq!((all.len(), all[0].ms, all[0].what), (MAX_EVENTS, Some(10), What::Resumed));
        assert!(all.is_sorted_by_key(|event| event.at));
    }
}
