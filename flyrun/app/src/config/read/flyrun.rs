//! `[flyrun]`: what Fly.io has no key for.

use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;

use super::UP_TO_A_DAY;
use super::words::{EMAIL, HTTPS_URL, is_email, is_host_path, is_https_url};
use crate::config::model::{Acme, Certificate};
use crate::config::problem::{Log, quote};
use crate::config::table::{Bare, Table};
use crate::config::{Hostname, Place, keys};

/// Each request that waits holds a connection.
const MAX_QUEUE: u32 = 1_000_000;
const MINUTE: Duration = Duration::from_secs(60);

pub(super) struct Read {
    pub hostnames: Vec<Hostname>,
    pub certificates: Vec<Certificate>,
    pub acme: Option<Acme>,
    /// Where that stands.
    pub acme_at: usize,
    pub trusted_proxies: Vec<IpNet>,
    pub accept_proxy_protocol: bool,
    /// Where that stands.
    pub accept_proxy_protocol_at: usize,
    pub body_timeout: Option<Duration>,
    pub total_timeout: Option<Duration>,
    pub idle_timeout: Duration,
    pub start_timeout: Duration,
    pub queue_timeout: Duration,
    pub queue_limit: u32,
    pub max_machines: u32,
    /// Where that stands.
    pub max_machines_at: usize,
}

pub(super) fn read(top: &Table<'_>, log: &Log<'_>, places: &mut Vec<(Place, usize)>) -> Read {
    let mut read = Read {
        hostnames: vec![Hostname::Any],
        certificates: Vec::new(),
        acme: None,
        acme_at: 0,
        trusted_proxies: Vec::new(),
        accept_proxy_protocol: false,
        accept_proxy_protocol_at: 0,
        body_timeout: None,
        total_timeout: None,
        idle_timeout: MINUTE,
        start_timeout: MINUTE,
        queue_timeout: MINUTE,
        queue_limit: 1024,
        max_machines: 1,
        max_machines_at: 0,
    };
    let Some(table) = top.table("flyrun", &keys::FLYRUN) else {
        places.push((Place::Hostname(Hostname::Any), top.at));
        return read;
    };
    read.hostnames = hostnames(&table, log, places);
    read.certificates =
        table.tables("tls", &keys::FLYRUN_TLS).iter().filter_map(|tls| certificate(tls, places)).collect();
    for (name, time) in [
        ("idle_timeout", &mut read.idle_timeout),
        ("start_timeout", &mut read.start_timeout),
        ("queue_timeout", &mut read.queue_timeout),
    ] {
        *time = table.duration(name, Bare::Seconds, UP_TO_A_DAY, *time);
    }
    for (name, time) in [("body_timeout", &mut read.body_timeout), ("total_timeout", &mut read.total_timeout)]
    {
        *time = table.get(name).and_then(|node| node.duration(Bare::Seconds, UP_TO_A_DAY));
    }
    read.trusted_proxies = trusted_proxies(&table, log);
    if let Some(node) = table.get("accept_proxy_protocol") {
        read.accept_proxy_protocol = node.flag().unwrap_or_default();
        read.accept_proxy_protocol_at = node.at;
    }
    if let Some(table) = table.table("acme", &keys::FLYRUN_ACME) {
        read.acme_at = table.at;
        read.acme = Some(acme(&table, places));
    }
    if let Some(limit) =
        table.get("queue_limit").and_then(|node| node.number(1..=MAX_QUEUE, "a number of requests"))
    {
        read.queue_limit = limit;
    }
    if let Some(node) = table.get("max_machines") {
        read.max_machines = node
            .number(1..=crate::config::MAX_MACHINES, "a number of machines")
            .unwrap_or(crate::config::MAX_MACHINES);
        read.max_machines_at = node.at;
    }
    read
}

fn hostnames(table: &Table<'_>, log: &Log<'_>, places: &mut Vec<(Place, usize)>) -> Vec<Hostname> {
    let Some(node) = table.get("hostnames") else {
        places.push((Place::Hostname(Hostname::Any), table.at));
        return vec![Hostname::Any];
    };
    let mut names = Vec::new();
    for element in node.list("a list of host names") {
        let Some(text) = element.text("a host name") else { continue };
        match text.parse::<Hostname>() {
            Err(wanted) => element.wrong(&wanted),
            Ok(name) if names.contains(&name) => {
                log.advise(element.at, format!("{} is there twice", quote(text)), "Leave one of them away.");
            }
            Ok(name) => {
                places.push((Place::Hostname(name.clone()), element.at));
                names.push(name);
            }
        }
    }
    if node.is_empty_list() {
        node.wrong("at least one host name");
    }
    names
}

fn trusted_proxies(table: &Table<'_>, log: &Log<'_>) -> Vec<IpNet> {
    let Some(node) = table.get("trusted_proxies") else { return Vec::new() };
    const WANTED: &str = "an address or a range such as 10.0.0.0/8";
    let mut ranges = Vec::new();
    for element in node.list("a list of addresses and ranges") {
        let Some(text) = element.text(WANTED) else { continue };
        match range(text) {
            None => element.wrong(WANTED),
            Some(range) if range.prefix_len() == 0 => log.advise(
                element.at,
                format!("{} is everybody, and every client could say what it likes", quote(text)),
                "Name the addresses that the proxies have.",
            ),
            Some(range) => ranges.push(range),
        }
    }
    ranges
}

/// IPv4 in the clothes of IPv6 is IPv4, as clients' addresses are.
fn range(text: &str) -> Option<IpNet> {
    let range = match text.parse() {
        Ok(address) => IpNet::from(IpAddr::to_canonical(&address)),
        Err(_) => text.parse::<IpNet>().ok()?,
    };
    let IpNet::V6(six) = range else { return Some(range.trunc()) };
    match six.addr().to_ipv4_mapped() {
        Some(four) => {
            IpNet::new(four.into(), range.prefix_len().checked_sub(96)?).ok().map(|net| net.trunc())
        }
        None => Some(range.trunc()),
    }
}

fn acme(table: &Table<'_>, places: &mut Vec<(Place, usize)>) -> Acme {
    let agreed = table.required("terms_of_service_agreed");
    if let Some(node) = agreed.filter(|node| node.flag() == Some(false)) {
        node.refuse(
            "is false",
            "The authority wants its terms of service agreed to: read them, and write true.",
        );
    }
    let text = |name, is_good: fn(&str) -> bool, wanted| {
        let node = table.get(name)?;
        node.text_that(is_good, wanted).map(|text| (text.to_string(), node.at))
    };
    let ca = text("ca", is_host_path, "the path of a PEM file");
    if let Some((path, at)) = &ca {
        places.push((Place::HostFile(path.clone()), *at));
    }
    Acme {
        directory: text("directory", is_https_url, HTTPS_URL)
            .map_or_else(|| Acme::DEFAULT_DIRECTORY.to_string(), |(url, _)| url),
        email: text("email", is_email, EMAIL).map(|(email, _)| email),
        ca: ca.map(|(path, _)| path),
    }
}

fn certificate(table: &Table<'_>, places: &mut Vec<(Place, usize)>) -> Option<Certificate> {
    let mut path = |name| {
        let node = table.required(name)?;
        let path = node.text_that(is_host_path, "the path of a PEM file")?.to_string();
        places.push((Place::HostFile(path.clone()), node.at));
        Some(path)
    };
    let (certificate, key) = (path("certificate"), path("key"));
    Some(Certificate { certificate: certificate?, key: key? })
}
