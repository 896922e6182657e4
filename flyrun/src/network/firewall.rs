//! The host's rules: one nftables table for all machines, made by the first and gone with the last.
//!
//! The rules are the same for every machine and go by the names and addresses of flyrun's interfaces; what differs is in
//! sets. Everything that is done is one transaction of `nft`, which runs beside the machine's boot. Where the rules stand
//! ([`standing`]) and a machine has nothing of its own in the sets, nothing is done.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write};
use std::net::IpAddr;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use super::address::{Number, SUBNET4, SUBNET6};
use super::publish::Publish;
use super::standing;
use crate::error::{Context, Error, Result};

/// Debian keeps nft where only root's PATH leads.
pub const PROGRAMS: [&str; 2] = ["nft", "/usr/sbin/nft"];

/// What is for a machine that is gone would leave by the host's default route: it is refused, and its connections reset.
/// A connection to ::1 is refused, so that its client tries 127.0.0.1: IPv6 has no route_localnet, and would let it hang.
/// What the host sends to itself in the name of a machine that is gone (`connections.rs`) keeps that name.
/// A machine of another network, and the host's end of its cable, are for a machine as if they were not there: neither reached nor
/// told apart from numbers that nobody has. Names are asked of the own gateway alone, which knows the own network's.
/// Ports, by host address or without one, and pairs of interfaces that may talk to one another.
const TABLE: &str = r#"
add table inet flyrun
flush table inet flyrun
table inet flyrun {
    map ports4 { type inet_proto . inet_service : ipv4_addr . inet_service; }
    map ports6 { type inet_proto . inet_service : ipv6_addr . inet_service; }
    map ports4_at { type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service; }
    map ports6_at { type ipv6_addr . inet_proto . inet_service : ipv6_addr . inet_service; }
    set pairs { type ifname . ifname; }

    chain publish {
        dnat ip to ip daddr . meta l4proto . th dport map @ports4_at
        dnat ip6 to ip6 daddr . meta l4proto . th dport map @ports6_at
        fib daddr type local dnat ip to meta l4proto . th dport map @ports4
        ip6 daddr != ::1 fib daddr type local dnat ip6 to meta l4proto . th dport map @ports6
    }
    chain spoofed {
        type filter hook prerouting priority raw; policy accept;
        iifname "fly*" ip daddr 127.0.0.0/8 drop
        iifname "fly*" fib saddr . iif oif missing drop
    }
    chain prerouting {
        type nat hook prerouting priority dstnat; policy accept;
        jump publish
    }
    chain output {
        type nat hook output priority -100; policy accept;
        jump publish
    }
    chain postrouting {
        type nat hook postrouting priority srcnat; policy accept;
        oifname "lo" accept
        oifname "fly*" ip saddr 127.0.0.0/8 masquerade
        oifname "fly*" ct status dnat ip saddr SUBNET4 masquerade
        oifname "fly*" ct status dnat ip6 saddr SUBNET6 masquerade
        oifname != "fly*" ip saddr SUBNET4 masquerade
        oifname != "fly*" ip6 saddr SUBNET6 masquerade
    }
    chain forward {
        type filter hook forward priority filter; policy accept;
        iifname "fly*" ct state established,related accept
        oifname "fly*" ct state established,related accept
        oifname "fly*" ct status dnat accept
        iifname . oifname @pairs accept
        iifname "fly*" oifname "fly*" jump to_nobody
        oifname "fly*" drop
        ip daddr SUBNET4 jump to_nobody
        ip6 daddr SUBNET6 jump to_nobody
    }
    chain to_nobody {
        meta l4proto tcp reject with tcp reset
        reject
    }
    chain input {
        type filter hook input priority filter; policy accept;
        iifname "fly*" jump from_machine
    }
    chain from_machine {
        ct state established,related accept
        ip daddr SUBNET4 fib daddr . iif type != local jump to_nobody
        ip6 daddr SUBNET6 fib daddr . iif type != local jump to_nobody
        icmp type echo-request accept
        icmpv6 type { echo-request, nd-neighbor-solicit, nd-neighbor-advert } accept
        fib daddr . iif type local udp dport 53 accept
        fib daddr . iif type local tcp dport 53 accept
        reject
    }
}
"#;

/// Whether there is an nft.
pub fn is_installed() -> bool {
    let works = |program| Command::new(program).arg("--version").stdout(Stdio::null()).status().is_ok();
    PROGRAMS.into_iter().any(works)
}

/// A transaction under way.
#[derive(Debug)]
pub struct Pending(Option<(Child, Option<Stands>)>);

/// What is to be noted when it has succeeded: the table stands if nobody but this transaction has changed rules since this number.
#[derive(Debug)]
struct Stands {
    lock: File,
    before: Option<u32>,
}

impl Pending {
    /// Waits until the host's rules are as asked for.
    ///
    /// # Errors
    /// nft refused; its first line is told.
    pub fn wait(&mut self) -> Result<()> {
        let Some((child, stands)) = self.0.take() else { return Ok(()) };
        let output = child.wait_with_output().context("cannot wait for nft")?;
        if output.status.success() {
            if let Some(Stands { lock, before }) = stands {
                standing::note(&lock, TABLE, before);
            }
            return Ok(());
        }
        let told = String::from_utf8_lossy(&output.stderr);
        Err(Error::new(format!(
            "nft refuses the machine's rules: {}",
            told.lines().next().unwrap_or_default()
        ))
        .advice("The host's kernel needs nf_tables with NAT; `--network none` does without."))
    }
}

/// Begins to let the machine in: its ports, and the machines it may talk to.
///
/// # Errors
/// There is no nft.
pub fn admit(number: Number, ports: &[Publish], peers: &[Number], lock: &File) -> Result<Pending> {
    let stands = standing::is_noted(lock, TABLE);
    if stands && ports.is_empty() && peers.is_empty() {
        return Ok(Pending(None));
    }
    let mut script = String::new();
    if !stands {
        script = TABLE.replace("SUBNET4", SUBNET4).replace("SUBNET6", SUBNET6);
    }
    for publish in ports {
        for (map, key, value) in port_elements(number, publish) {
            let _ = writeln!(script, "add element inet flyrun {map} {{ {key} : {value} }}");
        }
    }
    let own = number.tap();
    for peer in peers.iter().map(|peer| peer.tap()) {
        let _ = writeln!(script, "add element inet flyrun pairs {{ {own} . {peer}, {peer} . {own} }}");
    }
    change(&["-f", "-"], Some(&script), lock, true)
}

/// The elements that one published port is: map, key and value.
fn port_elements(number: Number, publish: &Publish) -> Vec<(&'static str, String, String)> {
    let key = format!("{} . {}", publish.protocol, publish.host);
    let value4 = format!("{} . {}", number.guest4(), publish.guest);
    let value6 = format!("{} . {}", number.guest6(), publish.guest);
    match publish.host_ip {
        None => vec![("ports4", key.clone(), value4), ("ports6", key, value6)],
        Some(IpAddr::V4(address)) if address.is_unspecified() => vec![("ports4", key, value4)],
        Some(IpAddr::V6(address)) if address.is_unspecified() => vec![("ports6", key, value6)],
        Some(IpAddr::V4(address)) => vec![("ports4_at", format!("{address} . {key}"), value4)],
        Some(IpAddr::V6(address)) => vec![("ports6_at", format!("{address} . {key}"), value6)],
    }
}

/// Takes everything away that concerns these machines.
///
/// # Errors
/// nft refuses, or is gone.
pub fn dismiss(numbers: &[Number], lock: &File) -> Result<()> {
    let child = begin(&["-j", "list", "table", "inet", "flyrun"], None, || Ok(Stdio::piped()))?;
    let output = child.wait_with_output().context("cannot wait for nft")?;
    // Without a table there is nothing to take away.
    let Ok(listing) = serde_json::from_slice::<Value>(&output.stdout) else { return Ok(()) };
    let script = removal(&listing, numbers);
    let stands = standing::is_noted(lock, TABLE);
    if script.is_empty() { Ok(()) } else { change(&["-f", "-"], Some(&script), lock, stands)?.wait() }
}

/// Removes the table, with which the last machine's traces go.
///
/// # Errors
/// There is no nft. A table that is not there is no failure.
pub fn remove(lock: &File) -> Result<()> {
    standing::forget(lock);
    let _absent = change(&["delete", "table", "inet", "flyrun"], None, lock, false)?.wait();
    Ok(())
}

/// The elements in `nft -j list table` that name one of the machines, as commands that delete them.
fn removal(listing: &Value, numbers: &[Number]) -> String {
    let named: Vec<String> =
        numbers.iter().flat_map(|n| [n.tap(), n.guest4().to_string(), n.guest6().to_string()]).collect();
    let mut script = String::new();
    for object in listing.get("nftables").and_then(Value::as_array).into_iter().flatten() {
        let Some(set) = object.get("map").or_else(|| object.get("set")) else { continue };
        let Some(name) = set.get("name").and_then(Value::as_str) else { continue };
        for element in set.get("elem").and_then(Value::as_array).into_iter().flatten() {
            let (key, value) = match element.as_array().map(Vec::as_slice) {
                Some([key, value]) => (words(key), words(value)),
                _ => (words(element), vec![]),
            };
            if !key.iter().chain(&value).any(|word| named.contains(word)) {
                continue;
            }
            let value = if value.is_empty() { String::new() } else { format!(" : {}", value.join(" . ")) };
            let _ = writeln!(script, "delete element inet flyrun {name} {{ {}{value} }}", key.join(" . "));
        }
    }
    script
}

/// The parts of a concatenation.
fn words(value: &Value) -> Vec<String> {
    let parts =
        value.get("concat").and_then(Value::as_array).map_or(std::slice::from_ref(value), Vec::as_slice);
    parts.iter().map(|part| part.as_str().map_or_else(|| part.to_string(), str::to_string)).collect()
}

/// An nft that changes something holds the lock itself, as its standard output: should this process be killed, nobody else
/// looks at the rules before they are as they will be. `stands`: whether the table is whole then.
fn change(arguments: &[&str], script: Option<&str>, lock: &File, stands: bool) -> Result<Pending> {
    let before = standing::generation().ok();
    let child = begin(arguments, script, || lock.try_clone().map(Stdio::from))?;
    let lock = lock.try_clone().context("cannot share the lock of the network")?;
    Ok(Pending(Some((child, stands.then_some(Stands { lock, before })))))
}

fn begin(arguments: &[&str], script: Option<&str>, stdout: impl Fn() -> io::Result<Stdio>) -> Result<Child> {
    let mut missing = None;
    for program in PROGRAMS {
        let mut command = Command::new(program);
        command.args(arguments).stderr(Stdio::piped());
        command.stdout(stdout().context("cannot share the lock of the network")?);
        command.stdin(if script.is_some() { Stdio::piped() } else { Stdio::null() });
        match command.spawn() {
            Ok(mut child) => {
                if let (Some(mut stdin), Some(script)) = (child.stdin.take(), script) {
                    // A pipe holds all of it at once; nft that ends early says why itself.
                    let _ = stdin.write_all(script.as_bytes());
                }
                return Ok(child);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => missing = Some(error),
            Err(error) => return Err(Error::caused("cannot start nft", &error)),
        }
    }
    let told = missing.map_or_else(String::new, |error| format!(": {error}"));
    Err(Error::new(format!("cannot start nft{told}"))
        .advice("Install nftables (`apt-get install nftables`), or run the machine with `--network none`."))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::publish::parse;

    fn number(n: usize) -> Number {
        Number::all().nth(n - 1).unwrap()
    }

    #[test]
    fn a_published_port_is_in_the_map_of_its_address() {
        let maps = |word: &str| -> Vec<_> {
            let publish = parse(word).unwrap()[0];
            port_elements(number(1), &publish)
                .into_iter()
                .map(|(map, key, _)| format!("{map} {key}"))
                .collect()
        };
        assert_eq!(maps("8080:80"), ["ports4 tcp . 8080", "ports6 tcp . 8080"]);
        assert_eq!(maps("0.0.0.0:53:53/udp"), ["ports4 udp . 53"]);
        assert_eq!(maps("127.0.0.1:8080:80"), ["ports4_at 127.0.0.1 . tcp . 8080"]);
        assert_eq!(maps("[2001:db8::1]:8080:80"), ["ports6_at 2001:db8::1 . tcp . 8080"]);
    }

    #[test]
    fn what_names_a_machine_is_removed_and_nothing_else() {
        let listing = serde_json::json!({"nftables": [
            {"metainfo": {}},
            {"map": {"name": "ports4", "elem": [
                [{"concat": ["tcp", 8080]}, {"concat": ["10.91.0.3", 80]}],
                [{"concat": ["tcp", 8081]}, {"concat": ["10.91.0.5", 80]}],
            ]}},
            {"set": {"name": "pairs", "elem": [{"concat": ["fly1", "fly2"]}, {"concat": ["fly2", "fly3"]}]}},
            {"set": {"name": "empty"}},
        ]});
        assert_eq!(
            removal(&listing, &[number(1)]),
            "delete element inet flyrun ports4 { tcp . 8080 : 10.91.0.3 . 80 }\n\
             delete element inet flyrun pairs { fly1 . fly2 }\n"
        );
        assert_eq!(removal(&listing, &[number(9)]), "");
    }
}
