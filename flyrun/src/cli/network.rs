//! The flags of commands that start a machine, as far as they concern its network.

use std::net::IpAddr;

use clap::Args;
use vmm::spec::NetBackend;

use crate::network::publish::{self, Publish, PublishError};
use crate::network::{Mode, Wishes};

/// What can be said about a machine's network.
#[derive(Clone, Debug, Args)]
pub struct NetworkArguments {
    /// The machine's network: default (it reaches the outside), none, or a name that machines share to reach one
    /// another. The host then forwards IPv4 and IPv6 packets, and goes on to do so
    #[arg(long = "network", value_name = "NAME", default_value = "default")]
    mode: Mode,
    /// Let a port of the host lead to the machine, such as 8080:80, 127.0.0.1:8080:80 or 53:53/udp
    #[arg(short, long, value_name = "[IP:][PORT:]PORT[/PROTOCOL]", value_parser = ports)]
    publish: Vec<Ports>,
    /// Ask this name server instead of the host's
    #[arg(long, value_name = "IP")]
    dns: Vec<IpAddr>,
    /// Add a line to the machine's /etc/hosts
    #[arg(long, value_name = "NAME:IP", value_parser = host)]
    add_host: Vec<(IpAddr, String)>,
    /// Who moves the packets: vhost (the host's kernel), user (flyrun-vmm), or auto
    #[arg(long, value_name = "BACKEND", default_value = "auto")]
    net_backend: NetBackend,
}

/// What one `-p` publishes.
#[derive(Clone, Debug)]
struct Ports(Vec<Publish>);

fn ports(word: &str) -> Result<Ports, PublishError> {
    publish::parse(word).map(Ports)
}

fn host(word: &str) -> Result<(IpAddr, String), String> {
    let wrong = || "write NAME:IP, such as db:192.0.2.7".to_string();
    let (name, address) = word.split_once(':').ok_or_else(wrong)?;
    let address = address.trim_start_matches('[').trim_end_matches(']').parse().map_err(|_| wrong())?;
    if crate::launch::is_hostname(name) { Ok((address, name.to_string())) } else { Err(wrong()) }
}

impl NetworkArguments {
    /// The same, as the network is told.
    pub fn wishes(&self) -> Wishes {
        Wishes {
            mode: self.mode.clone(),
            publish: self.publish.iter().flat_map(|ports| ports.0.clone()).collect(),
            dns: self.dns.clone(),
            hosts: self.add_host.clone(),
            backend: self.net_backend,
        }
    }
}
