//! `[http_service]` and `[[services]]`.

use super::checks;
use super::groups::Names;
use super::ports::{self, PortAt};
use crate::config::keys;
use crate::config::model::*;
use crate::config::problem::Log;
use crate::config::table::{Node, Table};

/// More on one machine at a time is no limit.
const MAX_CONCURRENCY: u32 = 1_000_000;
const DEFAULT_SOFT_LIMIT: u32 = 20;

/// Where the parts of a service stand, as offsets.
#[derive(Debug)]
pub(crate) struct ServiceAt {
    pub whole: usize,
    pub min_machines_running: usize,
    /// In the order of [`Service::ports`].
    pub ports: Vec<PortAt>,
}

pub(super) fn read(
    top: &Table<'_>,
    names: &Names,
    has_certificate: bool,
    log: &Log<'_>,
) -> Vec<(Service, ServiceAt)> {
    let http = top.table("http_service", &keys::HTTP_SERVICE);
    let http = http.map(|table| http_service(&table, names, has_certificate, log));
    let others = top.tables("services", &keys::SERVICES);
    http.into_iter().chain(others.iter().map(|table| service(table, names, log))).collect()
}

/// Port 80 and, where there is a certificate to show, 443.
fn http_service(
    table: &Table<'_>,
    names: &Names,
    has_certificate: bool,
    log: &Log<'_>,
) -> (Service, ServiceAt) {
    let (ports, ports_at) = ports::of_http_service(table, has_certificate, log).into_iter().unzip();
    let internal_port = table.get("internal_port").and_then(|node| node.port()).unwrap_or(8080);
    let checks = table.tables("checks", &keys::HTTP_SERVICE_CHECKS).iter().map(checks::http).collect();
    common(table, names, internal_port, (ports, ports_at), checks, log)
}

fn service(table: &Table<'_>, names: &Names, log: &Log<'_>) -> (Service, ServiceAt) {
    if let Some(node) = table.get("protocol") {
        node.text_that(
            |text| text == "tcp",
            "\"tcp\": flyrun forwards no UDP, as no datagram can wait for a machine",
        );
    }
    let internal_port = table.required("internal_port").and_then(|node| node.port()).unwrap_or(8080);
    let (ports, ports_at): (Vec<_>, Vec<_>) =
        table.tables("ports", &keys::PORTS).iter().filter_map(|port| ports::read(port, log)).unzip();
    if table.get("ports").is_none() {
        log.advise(
            table.at,
            "[[services]] has no ports, so nothing reaches it",
            "Add [[services.ports]] with port = 80.",
        );
    }
    let tcp = table.tables("tcp_checks", &keys::TCP_CHECKS);
    let http = table.tables("http_checks", &keys::HTTP_CHECKS);
    let checks = tcp.iter().map(checks::tcp).chain(http.iter().map(checks::http)).collect();
    common(table, names, internal_port, (ports, ports_at), checks, log)
}

/// What both forms have.
fn common(
    table: &Table<'_>,
    names: &Names,
    internal_port: u16,
    (ports, ports_at): (Vec<Port>, Vec<PortAt>),
    checks: Vec<Check>,
    log: &Log<'_>,
) -> (Service, ServiceAt) {
    let min = table.get("min_machines_running");
    let auto_stop = table.get("auto_stop_machines").and_then(auto_stop).unwrap_or(AutoStop::Off);
    let auto_start = table.flag("auto_start_machines", true);
    if auto_stop != AutoStop::Off && !auto_start {
        log.advise(
            table.get("auto_start_machines").map_or(table.at, |node| node.at),
            "machines would be stopped when they are idle, and nothing would start them again",
            "Leave auto_start_machines away, or write auto_stop_machines = \"off\".",
        );
    }
    let service = Service {
        groups: names.of(table),
        internal_port,
        ports,
        concurrency: concurrency(table.table("concurrency", &keys::CONCURRENCY), log),
        auto_stop,
        auto_start,
        min_machines_running: min
            .and_then(|node| node.number(0..=crate::config::MAX_MACHINES, "a number of machines"))
            .unwrap_or(0),
        checks: if checks.is_empty() { vec![Service::default_check()] } else { checks },
    };
    let at = ServiceAt {
        whole: table.at,
        min_machines_running: min.map_or(table.at, |node| node.at),
        ports: ports_at,
    };
    (service, at)
}

/// Once a flag, now one of three words.
fn auto_stop(node: Node<'_>) -> Option<AutoStop> {
    match node.as_flag() {
        Some(true) => Some(AutoStop::Stop),
        Some(false) => Some(AutoStop::Off),
        None => node.choice(),
    }
}

fn concurrency(table: Option<Table<'_>>, log: &Log<'_>) -> Concurrency {
    let mut concurrency =
        Concurrency { by: Load::Connections, soft_limit: DEFAULT_SOFT_LIMIT, hard_limit: None };
    let Some(table) = table else { return concurrency };
    concurrency.by = table.choice("type", Load::Connections);
    let limit = |name| table.get(name).and_then(|node| node.number(1..=MAX_CONCURRENCY, "a limit"));
    concurrency.hard_limit = limit("hard_limit");
    let hard = concurrency.hard_limit.unwrap_or(MAX_CONCURRENCY);
    concurrency.soft_limit = limit("soft_limit").unwrap_or(DEFAULT_SOFT_LIMIT.min(hard));
    if concurrency.soft_limit > hard {
        log.advise(
            table.get("soft_limit").map_or(table.at, |node| node.at),
            format!(
                "soft_limit is {} and hard_limit {hard}: the soft one would never be reached",
                concurrency.soft_limit
            ),
            "Lower soft_limit, or raise hard_limit.",
        );
    }
    concurrency
}
