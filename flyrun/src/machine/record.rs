//! machine.json: what a machine is, how it is started, and what became of it.

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU64;
use std::path::PathBuf;

use protocol::RunConfig;
use serde::{Deserialize, Serialize};
use vmm::spec::{NetBackend, RateSpec};

use super::health::Healthcheck;
use super::restart::RestartPolicy;
use super::state::State;
use crate::guest_files::GuestFile;
use crate::serve::SLOT;
use crate::size::Size;
use crate::{network, share, volume};

/// The version of the file's format.
pub const VERSION: u32 = 2;

/// A machine as it is kept on disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    pub version: u32,
    pub id: String,
    /// The user's name for it, or its id.
    pub name: String,
    pub image: String,
    /// The root filesystem it runs on: its image's, or one that came with a snapshot.
    pub chain_id: String,
    pub config: Config,
    /// Seconds since the epoch.
    pub created_at: u64,
    pub state: State,
    /// Seconds since the epoch of the last start of its process.
    pub started_at: Option<u64>,
    /// How often its restart policy has started it again since the user did.
    pub restarts: u32,
    /// How its last life ended.
    pub outcome: Option<Outcome>,
    /// What there is to go on from.
    #[serde(default)]
    pub snapshot: Option<Snapshot>,
    /// How it came to run the last time.
    #[serde(default)]
    pub last_start: Option<LastStart>,
    /// The boot of the host in which it is about to go on from its snapshot: if it got no further there, and `state` is still
    /// there, the snapshot is what counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resuming_in_boot: Option<String>,
}

/// A machine's memory on disk, whole and true of its disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Milliseconds since the epoch.
    pub taken_at_ms: u64,
    /// Its number in the network, which it gets again if it is free.
    pub network_number: Option<u16>,
}

/// How a machine came to run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum LastStart {
    /// By a boot.
    ColdBoot {
        /// Why not from the snapshot that there was, its own or a base that was gone on from in vain.
        reason: Option<String>,
        /// Why there was no base snapshot to go on from, where one would have suited.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        no_base: Option<String>,
    },
    /// From a snapshot.
    Resumed,
    /// From the base snapshot of its shape, in place of a boot.
    Base,
}

impl fmt::Display for LastStart {
    /// The kind's name, with the reason where there is one.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LastStart::Resumed => write!(f, "resumed"),
            LastStart::Base => write!(f, "base"),
            LastStart::ColdBoot { reason: None, .. } => write!(f, "cold_boot"),
            // In one line.
            LastStart::ColdBoot { reason: Some(reason), .. } => {
                write!(f, "cold_boot: {}", reason.lines().next().unwrap_or_default())
            }
        }
    }
}

/// All that decides how a machine starts, fixed when it is made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Config {
    pub cpus: u8,
    pub memory: Size,
    /// The size of its own disk; `None` for a read-only machine.
    pub disk: Option<Size>,
    /// A kernel other than flyrun's own.
    pub kernel: Option<PathBuf>,
    /// Whether it boots also where it could go on from a base snapshot.
    #[serde(default)]
    pub cold: bool,
    /// What guest-init is told, but for the randomness and the terminal's size, which belong to each start.
    pub run: RunConfig,
    /// Whether its process gets a terminal.
    pub tty: bool,
    /// Whether it goes when it ends (`--rm`).
    pub auto_remove: bool,
    pub restart: RestartPolicy,
    /// The signal that asks its process to end, and the seconds until it is killed.
    pub stop_signal: i32,
    pub stop_timeout_s: u32,
    /// Bytes after which the log is rotated, and how many files are kept; none without a log.
    pub log: Option<LogLimits>,
    pub labels: BTreeMap<String, String>,
    pub volumes: Vec<volume::Use>,
    /// Directories of the host.
    #[serde(default)]
    pub shares: Vec<share::Use>,
    pub network: network::Wishes,
    /// The app whose secrets its workload has; what they are is in no record.
    #[serde(default)]
    pub secrets: Option<String>,
    /// What is put into its root filesystem at each start.
    #[serde(default)]
    pub files: Vec<GuestFile>,
    #[serde(default)]
    pub health: Option<Healthcheck>,
    #[serde(default)]
    pub limits: Limits,
}

/// What a machine may take of its host, apart from memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Thousandths of a host's CPU, all vCPUs together; none is as many as it has vCPUs.
    pub cpu_milli: Option<u32>,
    /// Its share among machines that all want the CPU, from 2 to 262144; none is 1024.
    pub cpu_shares: Option<u32>,
    /// Processes and threads of its workload.
    pub pids: Option<u32>,
    /// Bytes per second of each of its disks, reads and writes together.
    pub disk_bandwidth: Option<NonZeroU64>,
    /// Requests per second of each of its disks.
    pub disk_iops: Option<NonZeroU64>,
    /// Bytes per second of its network, each way.
    pub net_bandwidth: Option<NonZeroU64>,
    /// Packets per second, each way.
    pub net_packets: Option<NonZeroU64>,
}

/// The smallest log that holds a few lines.
pub const MIN_LOG: Size = Size(16 << 10);
/// The most files of a log.
pub const MAX_LOG_FILES: u32 = 100;
/// An hour, in seconds: more patience than any process needs to end.
pub const MAX_STOP_TIMEOUT_S: u32 = 3600;
/// The largest disk of a machine: ext4's with 32-bit block numbers.
pub const MAX_DISK: Size = Size::gib(16 << 10);

/// How much of a machine's output is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLimits {
    pub max_size: Size,
    pub max_files: u32,
}

impl Limits {
    /// Whether the host's kernel has to hold the machine to anything.
    pub fn needs_cgroup(self) -> bool {
        self.cpu_milli.is_some() || self.cpu_shares.is_some()
    }

    /// What each disk is held to.
    pub fn disk_rate(self) -> Option<RateSpec> {
        rate(self.disk_bandwidth, self.disk_iops)
    }

    /// What each direction of the network is held to.
    pub fn net_rate(self) -> Option<RateSpec> {
        rate(self.net_bandwidth, self.net_packets)
    }

    /// Whether a machine in such a network can be held to its limits.
    ///
    /// # Errors
    /// Why it cannot.
    pub fn check_network(self, network: &network::Wishes) -> Result<(), &'static str> {
        match (self.net_rate(), &network.mode, network.backend) {
            (Some(_), network::Mode::None, _) => {
                Err("--net-bandwidth and --net-packets limit nothing without a network")
            }
            (Some(_), _, NetBackend::Vhost) => Err(
                "--net-bandwidth and --net-packets cannot be kept to by --net-backend vhost: choose user or auto",
            ),
            _ => Ok(()),
        }
    }
}

fn rate(bytes: Option<NonZeroU64>, operations: Option<NonZeroU64>) -> Option<RateSpec> {
    (bytes.is_some() || operations.is_some()).then_some(RateSpec { bytes, operations })
}

impl Default for LogLimits {
    fn default() -> Self {
        LogLimits { max_size: Size::mib(10), max_files: 3 }
    }
}

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    pub exit_code: u8,
    pub oom_killed: bool,
    /// Why flyrun failed, if it did.
    pub error: Option<String>,
    /// Seconds since the epoch.
    pub finished_at: u64,
}

impl Record {
    /// A machine's first record, called by its id.
    pub fn new(id: &str, image: &str, chain_id: &str, config: Config, state: State) -> Record {
        Record {
            version: VERSION,
            id: id.to_string(),
            name: id.to_string(),
            image: image.to_string(),
            chain_id: chain_id.to_string(),
            config,
            created_at: super::now(),
            state,
            started_at: None,
            restarts: 0,
            outcome: None,
            snapshot: None,
            last_start: None,
            resuming_in_boot: None,
        }
    }

    /// Whether it comes back when somebody needs it: it is on disk, or an app's slot, which `flyrun serve` starts for a request.
    /// The host's rules wait for it.
    pub fn comes_back(&self) -> bool {
        self.state == State::Suspended || self.config.labels.contains_key(SLOT)
    }
}

#[cfg(test)]
impl Record {
    /// A record for tests; an empty name means the id.
    pub fn example(name: &str) -> Record {
        let id = super::new_id().unwrap();
        let config = Config {
            cpus: 1,
            memory: Size::mib(128),
            disk: None,
            kernel: None,
            cold: false,
            run: RunConfig::default(),
            tty: false,
            auto_remove: false,
            restart: RestartPolicy::No,
            stop_signal: 15,
            stop_timeout_s: 10,
            log: Some(LogLimits::default()),
            labels: BTreeMap::new(),
            volumes: Vec::new(),
            shares: Vec::new(),
            network: network::Wishes::default(),
            secrets: None,
            files: Vec::new(),
            health: None,
            limits: Limits::default(),
        };
        let record = Record::new(&id, "busybox", "sha256:0", config, State::Created);
        Record { name: if name.is_empty() { id } else { name.into() }, created_at: 1, ..record }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_on_disk_or_started_by_requests_comes_back() {
        let mut record = Record::example("web");
        record.state = State::Stopped;
        assert!(!record.comes_back());
        assert!(Record { state: State::Suspended, ..record.clone() }.comes_back());
        record.config.labels.insert(SLOT.to_string(), "0".to_string());
        assert!(record.comes_back());
    }

    #[test]
    fn limits_that_were_written_before_there_were_rates_are_read() {
        let limits: Limits = serde_json::from_str(r#"{"cpu_milli": 500, "pids": 7}"#).unwrap();
        assert_eq!(limits, Limits { cpu_milli: Some(500), pids: Some(7), ..Limits::default() });
        assert_eq!((limits.disk_rate(), limits.net_rate()), (None, None));
    }
}
