//! End to end: the built flyrun, real images, real virtual machines. `make e2e` runs this in the test host.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod base;
mod cp;
mod deploy;
mod doctor;
mod exec;
mod figures;
mod host_directories;
mod hostile_guest;
mod hostile_images;
mod iperf3_and_fio;
mod jail;
mod lease;
mod network;
mod one_liners;
mod rates;
mod registries;
mod run_config;
mod run_errors;
mod run_images;
mod run_streams;
mod seccomp;
mod secrets;
mod serve;
mod serve_edge;
mod signals;
mod snapshots;
mod store;
mod suspend;
mod suspend_kills;
mod suspend_network;
mod suspend_sessions;
mod tenants;
mod tty;
mod unpack_faithful;
mod unpack_hostile;
