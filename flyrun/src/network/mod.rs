//! The machine's place in the host's network: a TAP interface, addresses, rules, published ports, names.
//!
//! All state is the kernel's. An interface is named by the machine's number, which the kernel gives away once, and its
//! alias tells whose it is; rules and addresses follow from the number. So any flyrun can see what is there, and
//! [`sweep`] can take away what the dead have left.

mod address;
mod connections;
pub mod diagnose;
pub mod dns;
mod firewall;
mod forwarding;
mod link;
mod nfnetlink;
pub mod publish;
mod reserve;
mod standing;

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use protocol::NetworkConfig;
use serde::{Deserialize, Serialize};
use vmm::spec::{NetBackend, NetSpec, default_mtu};

use self::address::Number;
use self::connections::Connections;
use self::firewall::Pending;
use self::link::Owner;
use self::publish::{Protocol, Publish};
use crate::error::{Context, Error, Result};
use crate::files;
use crate::paths::Paths;

/// One flyrun at a time changes the host's network, whatever its directories. Only root gets so far.
const LOCK: &str = "/run/flyrun-network.lock";

/// Which network a machine is in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Alone with the host and what lies behind it; no other machine is reached.
    #[default]
    Default,
    /// None but its own loopback.
    None,
    /// Together with the machines of the same name for it.
    Named(String),
}

impl std::str::FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "default" => Ok(Mode::Default),
            "none" => Ok(Mode::None),
            name if crate::machine::is_name(name) => Ok(Mode::Named(name.to_string())),
            _ => {
                Err("use default, none, or a name of up to 63 letters, digits, '_', '.' and '-'".to_string())
            }
        }
    }
}

/// What the user wants of the network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Wishes {
    pub mode: Mode,
    /// Ports of the host that lead to the machine.
    pub publish: Vec<Publish>,
    /// Name servers to ask instead of the host's.
    pub dns: Vec<IpAddr>,
    /// Entries for the machine's /etc/hosts.
    pub hosts: Vec<(IpAddr, String)>,
    /// Who moves the packets.
    pub backend: NetBackend,
}

/// What card a machine is to have.
#[derive(Clone, Copy, Debug)]
pub struct Card {
    pub queue_pairs: u16,
    /// The number that it had in an earlier life and gets again if it is free.
    pub number: Option<u16>,
}

/// A machine's network, up until it is dropped.
#[derive(Debug)]
pub struct Attached {
    /// For the VMM.
    pub card: NetSpec,
    /// For guest-init.
    pub config: NetworkConfig,
    published: Vec<Publish>,
    number: Number,
    owner: Owner,
    has_peers: bool,
    /// The machine is on disk, and soon here again.
    comes_back: bool,
    rules: Pending,
    /// Held until the rules are in place.
    lock: Option<File>,
    _ports: Vec<reserve::Reserved>,
    _names: Option<dns::Server>,
}

/// The network of a machine that runs, for whoever asks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// The TAP interface on the host.
    pub interface: String,
    pub ipv4: Option<Ipv4Addr>,
    pub ipv6: Option<Ipv6Addr>,
    /// The published ports, with those that were left to flyrun to choose.
    pub ports: Vec<Publish>,
}

/// In the machine's directory of sockets, so that it goes when the machine ends.
const FACTS: &str = "network.json";

impl Facts {
    /// What is known of a machine that runs; nothing of one without a network.
    pub fn read(run_dir: &Path) -> Option<Facts> {
        serde_json::from_slice(&std::fs::read(run_dir.join(FACTS)).ok()?).ok()
    }

    /// Writes them where [`Self::read`] finds them.
    ///
    /// # Errors
    /// The system's.
    pub fn write(&self, run_dir: &Path) -> io::Result<()> {
        files::replace(run_dir, FACTS, &serde_json::to_vec(self)?, files::Lasting::Process)
    }
}

/// Gives a machine its network; `None` for `--network none`. The host's rules are still being made when this returns:
/// see [`Attached::wait_ready`].
///
/// # Errors
/// A published port is taken, a right or a program is missing, or the kernel refuses. Nothing is left then.
pub fn set_up(
    paths: &Paths,
    machine: &str,
    name: &str,
    wishes: &Wishes,
    card: Card,
) -> Result<Option<Attached>> {
    let network = match &wishes.mode {
        Mode::None if wishes.publish.is_empty() => return Ok(None),
        Mode::None => {
            return Err(Error::new("a machine without a network cannot publish ports")
                .advice("Leave --network none or -p away."));
        }
        Mode::Default => None,
        Mode::Named(network) => Some(digest(&[&host(paths).to_le_bytes(), network.as_bytes()])),
    };
    let (ports, published) = reserve::reserve(&wishes.publish)?;
    let owner = Owner { host: host(paths), machine: machine.into(), name: name.into(), network };
    let lock = lock()?;
    let number =
        link::create(card.number.and_then(Number::new), card.queue_pairs).map_err(|error| no_tap(&error))?;
    let attached = attach(number, &owner, wishes, &published, &lock);
    match attached {
        Ok((rules, names, has_peers)) => Ok(Some(Attached {
            card: NetSpec {
                tap: number.tap(),
                mac: number.mac(),
                mtu: default_mtu(),
                backend: wishes.backend,
                queue_pairs: card.queue_pairs,
                rate: None,
            },
            config: guest_config(number, wishes),
            published,
            number,
            owner,
            has_peers,
            comes_back: false,
            rules,
            lock: Some(lock),
            _ports: ports,
            _names: names,
        })),
        Err(error) => {
            let _ = take_away(&[number], true, false, &lock);
            Err(error)
        }
    }
}

fn attach(
    number: Number,
    owner: &Owner,
    wishes: &Wishes,
    published: &[Publish],
    lock: &File,
) -> Result<(Pending, Option<dns::Server>, bool)> {
    let peers: Vec<Number> = link::list()
        .into_iter()
        .filter(|(other, told)| *other != number && is_peer(told.as_ref(), owner))
        .map(|(other, _)| other)
        .collect();
    let rules = firewall::admit(number, published, &peers, lock)?;
    link::configure(number, owner).context(format!("cannot configure the interface {}", number.tap()))?;
    forwarding::enable()?;
    if !published.is_empty() {
        forwarding::allow_loopback(number)?;
    }
    let names = dns::Server::start(number, owner.clone(), wishes.dns.clone())?;
    Ok((rules, names, !peers.is_empty()))
}

fn is_peer(other: Option<&Owner>, owner: &Owner) -> bool {
    owner.network.is_some() && other.is_some_and(|other| other.network == owner.network)
}

fn guest_config(number: Number, wishes: &Wishes) -> NetworkConfig {
    NetworkConfig {
        mac: number.mac(),
        mtu: default_mtu(),
        ipv4: Some((number.guest4(), number.gateway4())),
        ipv6: Some((number.guest6(), number.gateway6())),
        resolv_conf: dns::resolv_conf(number.gateway4().into()),
        hosts: wishes.hosts.clone(),
    }
}

impl Attached {
    /// Waits until the host's rules are in place. To be called when the VMM has been started: both then go on at once.
    ///
    /// # Errors
    /// nft refused them. The machine must not run on.
    pub fn wait_ready(&mut self) -> Result<()> {
        let result = self.rules.wait();
        self.lock = None;
        result
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let _ = self.wait_ready();
        let gone =
            lock().and_then(|lock| take_away(&[self.number], self.has_elements(), self.comes_back, &lock));
        if let Err(error) = gone {
            anstream::eprintln!("flyrun: {error}");
        }
    }
}

impl Attached {
    /// From now on the machines of its network find it by this name.
    ///
    /// # Errors
    /// The kernel's.
    pub fn rename(&mut self, name: &str) -> Result<()> {
        if self.owner.name != name {
            self.owner.name = name.to_string();
            let told = || format!("cannot rename the interface {}", self.number.tap());
            link::tell_owner(self.number, &self.owner).context(told())?;
        }
        Ok(())
    }

    /// Leaves the rules that all machines share when this is dropped, also if no machine is left.
    pub fn will_come_back(&mut self) {
        self.comes_back = true;
    }

    /// Which the machine asks for when it is resumed.
    pub fn number(&self) -> u16 {
        self.number.get()
    }

    /// For those who ask about the machine.
    pub fn facts(&self) -> Facts {
        Facts {
            interface: self.card.tap.clone(),
            ipv4: self.config.ipv4.map(|(address, _)| address),
            ipv6: self.config.ipv6.map(|(address, _)| address),
            ports: self.published.clone(),
        }
    }

    /// A machine of a named network may have been joined by others since.
    fn has_elements(&self) -> bool {
        self.has_peers || !self.published.is_empty() || !self.others_of_network().is_empty()
    }

    fn others_of_network(&self) -> Vec<Number> {
        let all = link::list();
        let own = all.iter().find(|(number, _)| *number == self.number).and_then(|(_, owner)| owner.clone());
        let Some(own) = own else { return vec![] };
        all.into_iter()
            .filter(|(number, told)| *number != self.number && is_peer(told.as_ref(), &own))
            .map(|(number, _)| number)
            .collect()
    }
}

/// Takes away the rules that a machine left which was to come back, and does not.
///
/// # Errors
/// There is no nft.
pub fn sweep_rules(comes_back: impl FnOnce() -> bool) -> Result<()> {
    let is_left = || std::fs::metadata(LOCK).is_ok_and(|note| note.len() > 0) && link::list().is_empty();
    if !is_left() || comes_back() || !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let lock = lock()?;
    if is_left() { firewall::remove(&lock) } else { Ok(()) }
}

/// Takes away what machines left that live no more: their interfaces, rules and addresses.
///
/// # Errors
/// The kernel or nft refuses. Without the rights to look after the network nothing can have been left.
pub fn sweep(paths: &Paths, is_live: &dyn Fn(&str) -> bool) -> Result<()> {
    let host = host(paths);
    let is_dead = |owner: &Option<Owner>| match owner {
        Some(owner) => owner.host == host && !is_live(&owner.machine),
        // Half made, and whoever made it would hold the lock.
        None => true,
    };
    if !link::list().iter().any(|(_, owner)| is_dead(owner)) || !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let lock = lock()?;
    let dead: Vec<_> =
        link::list().into_iter().filter(|(_, owner)| is_dead(owner)).map(|(number, _)| number).collect();
    if dead.is_empty() { Ok(()) } else { take_away(&dead, true, false, &lock) }
}

/// Removes the rules first, so that while there are any an interface tells of them. But for those of machines that come back, which
/// harm nobody: to make them again would take longer than all else in a resume.
fn take_away(numbers: &[Number], have_elements: bool, come_back: bool, lock: &File) -> Result<()> {
    let connections = Connections::of(numbers);
    let last = !come_back && link::list().iter().all(|(number, _)| numbers.contains(number));
    let rules = match (last, have_elements) {
        (true, _) => firewall::remove(lock),
        (false, true) => firewall::dismiss(numbers, lock),
        (false, false) => Ok(()),
    };
    link::delete(numbers).context("cannot remove the machine's interface")?;
    connections.reset(numbers);
    rules
}

fn lock() -> Result<File> {
    let file = files::open_lock(Path::new(LOCK)).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => no_rights(),
        _ => Error::caused(format!("cannot open the lock {LOCK}"), &error),
    })?;
    file.lock().context(format!("cannot lock {LOCK}"))?;
    Ok(file)
}

fn no_rights() -> Error {
    Error::new("no permission to give the machine a network (CAP_NET_ADMIN)")
        .advice("Run flyrun as root, or the machine with `--network none`.")
}

fn no_tap(error: &io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::PermissionDenied => no_rights(),
        io::ErrorKind::NotFound => Error::new("there is no /dev/net/tun for the machine's network")
            .advice("Load the module (`modprobe tun`), or run the machine with `--network none`."),
        _ => Error::caused("cannot make a TAP interface for the machine's network", error),
    }
}

/// The directory of running machines, by which flyruns with different ones leave each other's interfaces and cgroups alone.
pub fn host(paths: &Paths) -> u64 {
    let run = std::fs::canonicalize(&paths.run).unwrap_or_else(|_| paths.run.clone());
    digest(&[Path::as_os_str(&run).as_encoded_bytes()])
}

/// FNV-1a, which is the same in every build of flyrun.
fn digest(parts: &[&[u8]]) -> u64 {
    parts
        .iter()
        .flat_map(|part| part.iter().chain(&[0xff]))
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// What a port is busy with, for the one who publishes it.
fn port_taken(publish: &Publish) -> Error {
    let address = publish.host_ip.map_or_else(String::new, |address| format!(" of {address}"));
    let kind = match publish.protocol {
        Protocol::Tcp => "TCP",
        Protocol::Udp => "UDP",
    };
    Error::new(format!("{kind} port {}{address} is already in use on this host", publish.host))
        .advice("Publish another one with -p, or end what uses it (`ss -lptun` tells).")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_is_default_none_or_a_name() {
        assert_eq!("none".parse(), Ok(Mode::None));
        assert_eq!("default".parse(), Ok(Mode::Default));
        assert_eq!("web".parse(), Ok(Mode::Named("web".into())));
        for bad in ["", "a b", "../x"] {
            assert!(bad.parse::<Mode>().is_err(), "{bad}");
        }
    }

    #[test]
    fn networks_of_different_directories_differ() {
        assert_ne!(digest(&[b"/run/a", b"web"]), digest(&[b"/run/b", b"web"]));
        assert_ne!(digest(&[b"ab", b"c"]), digest(&[b"a", b"bc"]));
    }
}
