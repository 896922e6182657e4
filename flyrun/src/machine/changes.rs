//! What `flyrun update` changes of a machine, and when each change takes effect. Pure.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::record::Config;
use super::restart::RestartPolicy;
use crate::size::Size;

/// What is to be different; `None` and empty leave things as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Changes {
    /// vCPUs, and the thousandths of a CPU that they may use if that is less.
    pub cpus: Option<(u8, Option<u32>)>,
    pub cpu_shares: Option<u32>,
    pub memory: Option<Size>,
    /// `Some(None)` is without a limit.
    pub pids: Option<Option<u32>>,
    pub restart: Option<RestartPolicy>,
    pub stop_signal: Option<i32>,
    pub stop_timeout_s: Option<u32>,
    pub labels: BTreeMap<String, String>,
    pub remove_labels: Vec<String>,
}

impl Changes {
    pub fn is_empty(&self) -> bool {
        *self == Changes::default()
    }

    /// Makes the changes. Returns those that a machine which runs sees only when it starts next.
    ///
    /// # Errors
    /// They do not go together with what the machine is; nothing is changed then.
    pub fn apply(&self, config: &mut Config) -> Result<Vec<String>, String> {
        let restart = self.restart.unwrap_or(config.restart);
        if config.auto_remove && restart != RestartPolicy::No {
            return Err("a machine made with --rm is not started again".to_string());
        }
        config.restart = restart;
        let mut later = Vec::new();
        if let Some((cpus, quota)) = self.cpus {
            change(&mut config.cpus, cpus, "the number of vCPUs", &mut later);
            config.limits.cpu_milli = quota;
        }
        if let Some(memory) = self.memory {
            change(&mut config.memory, memory, "the memory", &mut later);
        }
        if let Some(pids) = self.pids {
            change(&mut config.limits.pids, pids, "the limit of processes", &mut later);
        }
        config.limits.cpu_shares = self.cpu_shares.or(config.limits.cpu_shares);
        config.stop_signal = self.stop_signal.unwrap_or(config.stop_signal);
        config.stop_timeout_s = self.stop_timeout_s.unwrap_or(config.stop_timeout_s);
        config.labels.retain(|key, _| !self.remove_labels.contains(key));
        config.labels.extend(self.labels.clone());
        Ok(later)
    }
}

fn change<T: PartialEq>(value: &mut T, wanted: T, name: &str, later: &mut Vec<String>) {
    if *value != wanted {
        *value = wanted;
        later.push(name.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Record;

    #[test]
    fn what_a_running_machine_cannot_have_waits_for_its_next_start() {
        let mut config = Record::example("").config;
        let changes = Changes {
            cpus: Some((2, Some(1500))),
            memory: Some(Size::mib(512)),
            pids: Some(Some(10)),
            restart: Some(RestartPolicy::Always),
            labels: [("a".to_string(), "1".to_string())].into(),
            ..Changes::default()
        };
        let later = changes.apply(&mut config).unwrap();
        assert_eq!(later, ["the number of vCPUs", "the memory", "the limit of processes"]);
        assert_eq!((config.cpus, config.limits.cpu_milli, config.memory), (2, Some(1500), Size::mib(512)));
        assert_eq!((config.limits.pids, config.restart), (Some(10), RestartPolicy::Always));
        assert_eq!(changes.apply(&mut config).unwrap(), [""; 0], "nothing has changed the second time");
    }

    #[test]
    fn what_is_not_spoken_of_stays() {
        let mut config = Record::example("").config;
        config.limits.cpu_shares = Some(7);
        config.labels.insert("a".into(), "1".into());
        let before = serde_json::to_value(&config).unwrap();
        Changes::default().apply(&mut config).unwrap();
        assert_eq!(serde_json::to_value(&config).unwrap(), before);
        assert!(Changes::default().is_empty());
        let changes = Changes { remove_labels: vec!["a".into()], ..Changes::default() };
        changes.apply(&mut config).unwrap();
        assert!(config.labels.is_empty());
    }

    #[test]
    fn one_that_goes_by_itself_is_not_started_again() {
        let mut config = Record::example("").config;
        config.auto_remove = true;
        let changes =
            Changes { restart: Some(RestartPolicy::Always), cpu_shares: Some(2), ..Changes::default() };
        assert!(changes.apply(&mut config).is_err());
        assert_eq!(config.limits.cpu_shares, None);
    }
}
