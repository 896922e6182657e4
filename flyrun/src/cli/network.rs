//! The flags of commands that start a machine, as far as they concern its network.

use std::net::IpAddr;

use clap::Args;
use vmm::spec::NetBackend;

use super::Context;
use crate::error::{Error, Result};
use crate::machine::Record;
use crate::network::publish::{self, Publish, PublishError};
use crate::network::{Facts, Mode, Wishes};

/// What can be said about a machine's network.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Network")]
pub struct NetworkArguments {
    /// The machine's network: default (it reaches the outside), none, or a name that machines share to reach one
    /// another. The host then forwards IPv4 and IPv6 packets, and goes on to do so [default: default]
    #[arg(long = "network", value_name = "NAME")]
    mode: Option<Mode>,
    /// Let a port of the host lead to the machine, such as 8080:80, 127.0.0.1:8080:80 or 53:53/udp
    #[arg(short, long, value_name = "[IP:][PORT:]PORT[/PROTOCOL]", value_parser = ports)]
    publish: Vec<Ports>,
    /// Let ports of the host that are free lead to all that the image exposes; `flyrun port` tells which
    #[arg(short = 'P', long)]
    publish_all: bool,
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

fn ports(word: &str) -> std::result::Result<Ports, PublishError> {
    publish::parse(word).map(Ports)
}

fn host(word: &str) -> std::result::Result<(IpAddr, String), String> {
    let wrong = || "write NAME:IP, such as db:192.0.2.7".to_string();
    let (name, address) = word.split_once(':').ok_or_else(wrong)?;
    let address = address.trim_start_matches('[').trim_end_matches(']').parse().map_err(|_| wrong())?;
    if crate::launch::is_hostname(name) { Ok((address, name.to_string())) } else { Err(wrong()) }
}

/// The network of a machine that runs, if it has one.
pub fn facts(context: &Context, record: &Record) -> Option<Facts> {
    record.state.needs_monitor().then(|| Facts::read(&context.paths.run_dir(&record.id)))?
}

impl NetworkArguments {
    /// The same, as the network is told.
    ///
    /// # Errors
    /// The image exposes what is no port.
    pub fn wishes(&self, exposed: &[String]) -> Result<Wishes> {
        let mut publish: Vec<Publish> = self.publish.iter().flat_map(|ports| ports.0.clone()).collect();
        for port in exposed.iter().filter(|_| self.publish_all) {
            let all = publish::parse(port)
                .map_err(|error| Error::caused(format!("the image exposes '{port}'"), &error))?;
            let is_new = |port: &Publish| {
                !publish.iter().any(|own| (own.guest, own.protocol) == (port.guest, port.protocol))
            };
            let new: Vec<_> = all.into_iter().filter(is_new).collect();
            publish.extend(new);
        }
        Ok(Wishes {
            mode: self.mode.clone().unwrap_or_default(),
            publish,
            dns: self.dns.clone(),
            hosts: self.add_host.clone(),
            backend: self.net_backend,
        })
    }

    /// Changes the wishes of a machine that has been running, as far as that is possible.
    ///
    /// # Errors
    /// It would have a card that it had not, or not have the one it had.
    pub fn change(&self, wishes: &mut Wishes) -> Result<()> {
        if let Some(mode) = &self.mode {
            if (*mode == Mode::None) != (wishes.mode == Mode::None) {
                let told = match mode {
                    Mode::None => "the snapshot's machine has a network card, and keeps it",
                    _ => "the snapshot's machine has no network card, and gets none",
                };
                return Err(Error::new(told).advice("Leave --network away, or name a network for its card."));
            }
            wishes.mode = mode.clone();
        }
        let publish: Vec<Publish> = self.publish.iter().flat_map(|ports| ports.0.clone()).collect();
        if wishes.mode == Mode::None && !publish.is_empty() {
            return Err(
                Error::new("a machine without a network cannot publish ports").advice("Leave -p away.")
            );
        }
        if !publish.is_empty() {
            wishes.publish = publish;
        }
        Ok(())
    }

    /// Whether the machine has more than its loopback.
    pub fn has_network(&self) -> bool {
        self.mode != Some(Mode::None)
    }
}
