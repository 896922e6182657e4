//! What an app is, without any I/O: `flyrun serve` gives it bytes and gets plain values.
//!
//! [`config`] reads a `fly.toml` strictly and resolves it; [`pool`] decides which machine gets which request, and when machines
//! start and stop.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod config;
pub mod pool;
