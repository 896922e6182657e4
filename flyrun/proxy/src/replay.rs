//! The answer header `fly-replay`: a machine asks for its request to be answered by another. Pure.

use crate::machines::Steer;

/// A request is passed on so often at most.
pub(crate) const MAX_HOPS: usize = 10;

/// What a machine asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Replay {
    /// Another app.
    pub app: Option<String>,
    /// The machine.
    pub steer: Option<Steer>,
    /// Any but the one that asks.
    pub elsewhere: bool,
    /// What the machine has to say to the other.
    pub state: Option<String>,
}

/// `key=value` in a list with semicolons. A region is where this host is, wherever that is; `timeout` and `fallback` tell
/// what to do while other regions do not answer, of which there are none. Unknown keys are Fly's to come.
pub(crate) fn read(text: &str) -> Replay {
    let mut replay = Replay::default();
    for part in text.split([';', ',']) {
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        let value = value.trim();
        match key.trim() {
            "app" if !value.is_empty() => replay.app = Some(value.to_string()),
            "instance" if !value.is_empty() => replay.steer = Some(Steer::Force(value.to_string())),
            "prefer_instance" if !value.is_empty() && replay.steer.is_none() => {
                replay.steer = Some(Steer::Prefer(value.to_string()));
            }
            "elsewhere" => replay.elsewhere = value == "true",
            "state" => replay.state = Some(value.to_string()),
            _ => {}
        }
    }
    replay
}

/// `fly-replay-src` of the request that follows.
pub(crate) fn source(instance: &str, region: &str, micros: u128, state: Option<&str>) -> String {
    let state = state.map_or(String::new(), |state| format!(";state={state}"));
    format!("instance={instance};region={region};t={micros}{state}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_in_any_order_and_unknown_ones_passed_over() {
        let replay = read("state=a b ; instance=m1;app=other;new=1");
        assert_eq!(replay.app.as_deref(), Some("other"));
        assert_eq!(replay.steer, Some(Steer::Force("m1".into())));
        assert_eq!(replay.state.as_deref(), Some("a b"));
        assert!(!replay.elsewhere);
    }

    #[test]
    fn a_named_instance_wins_over_a_preferred_one() {
        assert_eq!(read("prefer_instance=b;instance=a").steer, Some(Steer::Force("a".into())));
        assert_eq!(read("instance=a;prefer_instance=b").steer, Some(Steer::Force("a".into())));
        assert_eq!(read("prefer_instance=b").steer, Some(Steer::Prefer("b".into())));
    }

    #[test]
    fn nothing_to_read_asks_for_nothing() {
        assert_eq!(read(""), Replay::default());
        assert_eq!(read(";;=;instance=;app="), Replay::default());
        assert!(read("elsewhere=true").elsewhere);
    }
}
