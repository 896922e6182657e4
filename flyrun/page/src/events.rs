//! The state as server-sent events (HTML standard, section 9.2): whole, whenever it has changed.

use std::time::{Duration, Instant};

use crate::Source;

/// How often [`Events::next`] is to be asked: nobody sees less.
pub const TICK: Duration = Duration::from_millis(250);
/// After so much silence a comment is sent: a reader that is gone is noticed by writing.
const SILENCE: Duration = Duration::from_secs(15);

/// One reader's stream of events.
#[derive(Debug, Default)]
pub struct Events {
    sent: String,
    at: Option<Instant>,
}

impl Events {
    /// What is to be sent now, if anything. An answer's headers are those of [`crate::Answer::headers`].
    pub fn next(&mut self, source: &dyn Source, now: Instant) -> Option<String> {
        let state = source.state().to_json();
        if state != self.sent {
            self.at = Some(now);
            // JSON has no line breaks of its own.
            let chunk = format!("event: state\ndata: {state}\n\n");
            self.sent = state;
            return Some(chunk);
        }
        let is_silent = self.at.is_none_or(|at| now.duration_since(at) >= SILENCE);
        is_silent.then(|| {
            self.at = Some(now);
            ": still here\n\n".to_string()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{App, State};

    #[test]
    fn a_state_is_sent_when_it_has_changed_and_a_comment_when_nothing_does() {
        let named = |name: &str| {
            let app = App { name: name.to_string(), ..App::default() };
            move || State { apps: vec![app.clone()], ..State::default() }
        };
        let mut events = Events::default();
        let start = Instant::now();
        let first = events.next(&named("a\nb"), start).unwrap();
        assert!(first.starts_with("event: state\ndata: {") && first.ends_with("}\n\n"));
        assert_eq!(first.lines().count(), 3, "{first}");
        assert_eq!(events.next(&named("a\nb"), start + TICK), None);
        assert!(events.next(&named("b"), start + TICK).unwrap().contains("\"b\""));
        assert_eq!(events.next(&named("b"), start + SILENCE), None);
        assert_eq!(events.next(&named("b"), start + TICK + SILENCE).unwrap(), ": still here\n\n");
        assert_eq!(events.next(&named("b"), start + SILENCE + SILENCE), None);
    }

    #[test]
    fn no_more_events_are_shown_than_can_be_read() {
        use crate::{Event, What};
        let event = |at| Event { at, app: "a".into(), machine: "m".into(), what: What::Base, ms: None };
        let state = State { events: (0..500).map(event).collect(), ..State::default() };
        let shown: State = serde_json::from_str(&state.to_json()).unwrap();
        assert_eq!((shown.events.len(), shown.events[0].at), (200, 300));
    }
}
