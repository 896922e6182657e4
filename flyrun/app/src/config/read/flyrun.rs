//! `[flyrun]`: what Fly.io has no key for.

use std::time::Duration;

use super::UP_TO_A_DAY;
use super::words::is_host_path;
use crate::config::model::Certificate;
use crate::config::problem::{Log, quote};
use crate::config::table::{Bare, Table};
use crate::config::{Hostname, Place, keys};

/// Each request that waits holds a connection.
const MAX_QUEUE: u32 = 1_000_000;
const MINUTE: Duration = Duration::from_secs(60);

pub(super) struct Read {
    pub hostnames: Vec<Hostname>,
    pub certificates: Vec<Certificate>,
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
