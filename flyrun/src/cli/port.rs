//! `flyrun port`: which ports of the host lead to a machine.

use clap::Args;

use super::{Context, network::facts, print_line};
use crate::error::{Error, Result};
use crate::exit_code::ExitCode;
use crate::network::publish::{Publish, parse};

/// List the ports of the host that lead to a machine
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun port web
  curl http://$(flyrun port web 80 | head -n 1)/

Exit codes: 0; 125 when the machine does not exist or run, or nothing leads to that port of it.")]
pub struct Arguments {
    /// Name, id, or beginning of the id
    machine: String,
    /// Only those that lead to this port of the machine
    #[arg(value_name = "PORT[/PROTOCOL]")]
    port: Option<String>,
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    let record = context.machines().find(&arguments.machine)?;
    if !record.state.needs_monitor() {
        return Err(Error::new(format!("machine '{}' does not run, so no port leads to it", record.name))
            .advice(format!("Start it with `flyrun start {}`.", record.name)));
    }
    let ports = facts(context, &record).map_or(vec![], |facts| facts.ports);
    let Some(wanted) = &arguments.port else {
        for port in &ports {
            print_line(&format!("{}/{} -> {}", port.guest, port.protocol, host(port)))?;
        }
        return Ok(ExitCode::Success);
    };
    let wanted = parse(wanted).map_err(|error| Error::new(error.to_string()))?;
    let leads =
        |port: &&Publish| wanted.iter().any(|one| (one.guest, one.protocol) == (port.guest, port.protocol));
    let found: Vec<_> = ports.iter().filter(leads).collect();
    if found.is_empty() {
        let told = format!("no port of this host leads to {} of machine '{}'", told(&wanted), record.name);
        return Err(Error::new(told).advice("Ports are published with -p when the machine is made."));
    }
    for port in found {
        print_line(&host(port))?;
    }
    Ok(ExitCode::Success)
}

fn told(ports: &[Publish]) -> String {
    ports.iter().map(|port| format!("{}/{}", port.guest, port.protocol)).collect::<Vec<_>>().join(", ")
}

/// What a client on this host connects to.
fn host(port: &Publish) -> String {
    match port.host_ip {
        Some(std::net::IpAddr::V6(address)) => format!("[{address}]:{}", port.host),
        Some(address) => format!("{address}:{}", port.host),
        None => format!("0.0.0.0:{}", port.host),
    }
}

/// As docker shows it in a list.
pub fn arrow(port: &Publish) -> String {
    format!("{}->{}/{}", host(port), port.guest, port.protocol)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_told_as_docker_does() {
        let told = |word: &str| parse(word).unwrap().iter().map(arrow).collect::<Vec<_>>().join(", ");
        assert_eq!(told("8080:80"), "0.0.0.0:8080->80/tcp");
        assert_eq!(told("127.0.0.1:53:53/udp"), "127.0.0.1:53->53/udp");
        assert_eq!(told("[2001:db8::1]:1-2:3-4"), "[2001:db8::1]:1->3/tcp, [2001:db8::1]:2->4/tcp");
    }
}
