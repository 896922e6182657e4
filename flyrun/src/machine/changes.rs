//! What `flyrun update` changes of a machine, and when each change takes effect. Pure.

use std::collections::BTreeMap;
use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

use super::record::{Config, Limits};
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
    /// 0 is without a limit.
    pub pids: Option<u32>,
    pub rates: Rates,
    pub restart: Option<RestartPolicy>,
    pub stop_signal: Option<i32>,
    pub stop_timeout_s: Option<u32>,
    pub labels: BTreeMap<String, String>,
    pub remove_labels: Vec<String>,
}

/// The rates among a machine's limits; 0 is without a limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Rates {
    pub disk_bandwidth: Option<u64>,
    pub disk_iops: Option<u64>,
    pub net_bandwidth: Option<u64>,
    pub net_packets: Option<u64>,
}

impl Rates {
    /// Makes these limits of the others; names those that are different then.
    pub fn apply(self, limits: &mut Limits) -> Vec<String> {
        let mut changed = Vec::new();
        for (value, wanted, name) in [
            (&mut limits.disk_bandwidth, self.disk_bandwidth, "the bandwidth of the disks"),
            (&mut limits.disk_iops, self.disk_iops, "the rate of disk requests"),
            (&mut limits.net_bandwidth, self.net_bandwidth, "the bandwidth of the network"),
            (&mut limits.net_packets, self.net_packets, "the rate of packets"),
        ] {
            if let Some(wanted) = wanted {
                change(value, NonZeroU64::new(wanted), name, &mut changed);
            }
        }
        changed
    }
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
        let mut limits = config.limits;
        let rates = self.rates.apply(&mut limits);
        limits.check_network(&config.network)?;
        config.limits = limits;
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
            change(&mut config.limits.pids, (pids > 0).then_some(pids), "the limit of processes", &mut later);
        }
        later.extend(rates);
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
    use vmm::spec::NetBackend;

    use super::*;
    use crate::machine::Record;
    use crate::network::{Mode, Wishes};

    #[test]
    fn what_a_running_machine_cannot_have_waits_for_its_next_start() {
        let mut config = Record::example("").config;
        let changes = Changes {
            cpus: Some((2, Some(1500))),
            memory: Some(Size::mib(512)),
            pids: Some(10),
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
    fn a_running_machine_s_monitor_is_told_that_a_limit_goes() {
        let mut config = Record::example("").config;
        config.limits.pids = Some(10);
        config.limits.disk_iops = NonZeroU64::new(10);
        let rates = Rates { disk_iops: Some(0), ..Rates::default() };
        let changes = Changes { pids: Some(0), rates, ..Changes::default() };
        let told: Changes = serde_json::from_str(&serde_json::to_string(&changes).unwrap()).unwrap();
        assert_eq!(told, changes);
        told.apply(&mut config).unwrap();
        assert_eq!((config.limits.pids, config.limits.disk_iops), (None, None));
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
    fn rates_wait_for_the_next_start_and_zero_takes_them_away() {
        let mut config = Record::example("").config;
        let rates = Rates { disk_iops: Some(100), net_bandwidth: Some(1 << 20), ..Rates::default() };
        let mut changes = Changes { rates, ..Changes::default() };
        let later = changes.apply(&mut config).unwrap();
        assert_eq!(later, ["the rate of disk requests", "the bandwidth of the network"]);
        assert_eq!(config.limits.disk_rate().unwrap().operations, NonZeroU64::new(100));
        assert_eq!(config.limits.net_rate().unwrap().bytes, NonZeroU64::new(1 << 20));
        changes.rates = Rates { disk_iops: Some(0), disk_bandwidth: Some(0), ..Rates::default() };
        assert_eq!(changes.apply(&mut config).unwrap(), ["the rate of disk requests"]);
        assert_eq!(config.limits.disk_rate(), None);
        assert!(config.limits.net_rate().is_some());
    }

    #[test]
    fn a_network_that_cannot_be_limited_stays_as_it_is() {
        let changes = |net_packets| {
            let rates = Rates { net_packets: Some(net_packets), ..Rates::default() };
            Changes { rates, cpu_shares: Some(7), ..Changes::default() }
        };
        for (mode, backend) in [(Mode::Default, NetBackend::Vhost), (Mode::None, NetBackend::Auto)] {
            let mut config = Record::example("").config;
            config.network = Wishes { mode, backend, ..Wishes::default() };
            let before = config.limits;
            assert!(changes(9).apply(&mut config).is_err());
            assert_eq!(config.limits, before);
            assert!(changes(0).apply(&mut config).is_ok());
        }
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
