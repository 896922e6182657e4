//! The part of an image's configuration that a machine is made of.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// An image's configuration (OCI image spec, config.md, and docker's additions to it).
///
/// A field that the image leaves out, or sets to `null`, is empty. Serialized with these field names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    /// Operating system, such as `linux`.
    pub os: String,
    /// Architecture by Go's name, such as `amd64`.
    pub architecture: String,
    /// When the image was built, RFC 3339.
    pub created: Option<String>,
    /// First words of the command line.
    pub entrypoint: Vec<String>,
    /// Last words of the command line, replaced by the user's.
    pub cmd: Vec<String>,
    /// `KEY=VALUE` entries.
    pub env: Vec<String>,
    /// `user[:group]` by name or number; empty is root.
    pub user: String,
    /// Working directory; empty is `/`.
    pub working_dir: String,
    /// Signal that asks the process to end, by name (`SIGQUIT`) or number; none means SIGTERM.
    pub stop_signal: Option<String>,
    /// Ports the process listens on, as `80/tcp`.
    pub exposed_ports: Vec<String>,
    /// Paths that hold data to keep.
    pub volumes: Vec<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// docker's health check.
    pub healthcheck: Option<Healthcheck>,
}

/// docker's health check of an image. Durations are in nanoseconds, 0 is the default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Healthcheck {
    /// `["NONE"]`, `["CMD", …]` or `["CMD-SHELL", COMMAND]`.
    pub test: Vec<String>,
    /// Nanoseconds between two checks.
    pub interval_ns: u64,
    /// Nanoseconds that one check may take.
    pub timeout_ns: u64,
    /// Nanoseconds after the start in which a failure does not count.
    pub start_period_ns: u64,
    /// Nanoseconds between two checks in the start period.
    pub start_interval_ns: u64,
    /// Failures in a row that make the machine unhealthy.
    pub retries: u32,
}
