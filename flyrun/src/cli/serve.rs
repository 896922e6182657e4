//! `flyrun serve`.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::Context;
use crate::error::{Error, Result};
use crate::exit_code::ExitCode;
use crate::serve::{self, Settings, Wanted, default_memory_mib};
use crate::size::Size;

/// Serve apps: a request boots the machine that answers it
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun serve fly.toml
  flyrun serve /etc/flyrun                    every *.toml there, told apart by host names and ports
  flyrun serve --json --metrics 127.0.0.1:9464 fly.toml 2>> /var/log/flyrun.jsonl
  flyrun serve --page 127.0.0.1:9465 fly.toml  and http://127.0.0.1:9465/ shows what runs
  flyrun status --watch                       what runs
  flyrun logs -a web                          what an app's machines write

A machine starts when a request comes, and is stopped or suspended when it was idle for [flyrun] idle_timeout. \
With auto_stop_machines = \"suspend\" the first one is started and suspended at once, so that no request waits for a boot.

SIGHUP, and a change of the files, is followed without an end of any request: if other machines would be made now, \
they are, and replace those that there are when their checks pass; see `flyrun deploy`, which does the same and tells how it ended. SIGTERM ends requests that are under way (--drain at most) and leaves all \
machines as they are; the next flyrun serve finds them. Machines are called APP-GROUP-NUMBER, and all commands of \
flyrun work on them.")]
pub struct Arguments {
    /// Write JSON, a line for each thing that happens
    #[arg(long)]
    json: bool,
    /// Tell of no request that was answered as it should be
    #[arg(long)]
    no_access_log: bool,
    /// Listen for clients on this address alone [default: all]
    #[arg(long, value_name = "ADDRESS")]
    bind: Option<IpAddr>,
    /// Listen here for Prometheus, which asks for /metrics, and finds machines that have [[metrics]] at /metrics/targets
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics: Option<SocketAddr>,
    /// Listen here, on an address of this host's loopback, for browsers: the web page is at /_flyrun/
    #[arg(long, value_name = "ADDRESS:PORT")]
    page: Option<SocketAddr>,
    /// How many machines start at a time [default: twice the host's CPUs, at least 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    max_starts: Option<u32>,
    /// Memory of all machines that run together [default: four fifths of the host's]
    #[arg(long, value_name = "SIZE")]
    memory: Option<Size>,
    /// Connections of clients at a time; one more is closed at once [default: 65536, or as many as there are descriptors for]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_connections: Option<u32>,
    /// Of these, from one address, or one IPv6 network of 64 bits, on a port: a proxy in front is one [default: three quarters]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_connections_per_client: Option<u32>,
    /// Seconds that requests have to end after SIGTERM
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(..=86_400))]
    drain: u32,
    /// A fly.toml, or a directory of them
    #[arg(value_name = "FILE|DIR")]
    path: PathBuf,
}

pub fn execute(context: Context, arguments: &Arguments) -> Result<ExitCode> {
    let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get());
    let settings = Settings {
        path: arguments.path.clone(),
        json: arguments.json,
        access: !arguments.no_access_log,
        bind: arguments.bind,
        metrics: arguments.metrics,
        page: arguments.page.map(of_this_host).transpose()?,
        max_starts: arguments.max_starts.unwrap_or(u32::try_from(cpus * 2).unwrap_or(4).max(4)),
        memory_mib: arguments.memory.map_or_else(default_memory_mib, Size::to_mib),
        drain: Duration::from_secs(arguments.drain.into()),
        clients: Wanted {
            connections: arguments.max_connections,
            of_one: arguments.max_connections_per_client,
        },
    };
    serve::run(context, settings)?;
    Ok(ExitCode::Success)
}

/// The page shows what runs here, to whoever reaches it.
fn of_this_host(address: SocketAddr) -> Result<SocketAddr> {
    if address.ip().to_canonical().is_loopback() {
        return Ok(address);
    }
    Err(Error::new(format!(
        "--page: {} is no loopback address, and the page is for this host alone",
        address.ip()
    ))
    .advice(format!(
        "Use 127.0.0.1:{0} or [::1]:{0}; `ssh -L {0}:127.0.0.1:{0} HOST` reaches it from elsewhere.",
        address.port()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_for_this_host_alone() {
        for address in ["127.0.0.1:80", "127.0.0.9:0", "[::1]:80", "[::ffff:127.0.0.1]:80"] {
            assert!(of_this_host(address.parse().unwrap()).is_ok(), "{address}");
        }
        for address in ["0.0.0.0:80", "[::]:80", "192.0.2.1:80", "[::ffff:10.0.0.1]:80"] {
            let error = of_this_host(address.parse().unwrap()).unwrap_err().to_string();
            assert!(error.starts_with("--page: ") && error.contains("127.0.0.1:80"), "{error}");
        }
    }
}
