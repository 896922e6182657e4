//! What one table cannot know alone: contradictions between the parts of a file.

use super::model::*;
use super::problem::Log;
use super::read::{Draft, ServiceAt};
use super::{Hostname, Place};

/// Writes every contradiction to the log.
pub(crate) fn check(draft: &Draft, log: &Log<'_>) {
    ports_overlap(draft, log);
    ports_are_bounded(draft, log);
    tls_has_a_certificate(draft, log);
    acme_can_do_its_work(draft, log);
    proxy_protocol_has_proxies(draft, log);
    force_https_has_a_target(draft, log);
    machines_suffice(draft, log);
    services_of_a_group_agree(draft, log);
    a_volume_has_one_machine(draft, log);
    bluegreen_has_no_volume(draft, log);
}

impl Draft {
    fn services(&self) -> impl Iterator<Item = (&Service, &ServiceAt)> {
        self.app.services.iter().zip(&self.services)
    }
}

/// Two ports of one app on the same number would take each other's clients.
fn ports_overlap(draft: &Draft, log: &Log<'_>) {
    let mut ports: Vec<_> = draft
        .services()
        .flat_map(|(service, at)| service.ports.iter().zip(&at.ports))
        .map(|(port, at)| (port.numbers.clone(), at.whole))
        .collect();
    ports.sort_by_key(|(numbers, at)| (*numbers.start(), *at));
    // The highest number so far, and where it stands.
    let mut taken: Option<(u16, usize)> = None;
    for (numbers, at) in ports {
        if let Some((last, other)) = taken.filter(|(last, _)| numbers.start() <= last) {
            let (first, second) = (other.min(at), other.max(at));
            log.advise(
                second,
                format!("port {} is taken already, at line {}", numbers.start(), log.position(first).line),
                "Give each of the ports of all services a number of its own; [http_service] has 80 and 443.",
            );
            taken = Some((last.max(*numbers.end()), other));
        } else {
            taken = Some((*numbers.end(), at));
        }
    }
}

/// Each port is a socket of the proxy.
fn ports_are_bounded(draft: &Draft, log: &Log<'_>) {
    const MAX_PORTS: usize = 1024;
    let mut count = 0;
    for (port, at) in draft.services().flat_map(|(service, at)| service.ports.iter().zip(&at.ports)) {
        let before = count;
        count += port.numbers.len();
        if before <= MAX_PORTS && count > MAX_PORTS {
            log.add(
                at.whole,
                format!("with these the app has more than {MAX_PORTS} ports, which is the most"),
            );
        }
    }
}

fn tls_has_a_certificate(draft: &Draft, log: &Log<'_>) {
    if draft.app.has_certificate() {
        return;
    }
    for (service, at) in draft.services() {
        for (port, at) in service.ports.iter().zip(&at.ports).filter(|(port, _)| port.tls.is_some()) {
            log.advise(
                at.whole,
                format!(
                    "port {} has the handler \"tls\", and there is no certificate to show",
                    port.numbers.start()
                ),
                "Name one: [[flyrun.tls]] with certificate and key, both PEM files; or have one ordered: [flyrun.acme].",
            );
        }
    }
}

/// RFC 8555, section 8.3, and RFC 8737 fix the ports on which an authority looks.
fn acme_can_do_its_work(draft: &Draft, log: &Log<'_>) {
    /// What Let's Encrypt takes.
    const MAX_NAMES: usize = 100;
    let app = &draft.app;
    if app.acme.is_none() {
        return;
    }
    if !app.services.iter().flat_map(|service| &service.ports).any(|port| port.tls.is_some()) {
        log.advise(
            draft.acme,
            "[flyrun.acme] orders a certificate, and no port has the handler \"tls\" to show it",
            "Write [http_service], or a port with handlers = [\"tls\", …].",
        );
    } else if app.acme_ways().is_empty() {
        log.advise(
            draft.acme,
            "an ACME authority looks at port 80 (with the handler \"http\" alone) or 443 (with \"tls\"), and the app has neither",
            "Add one of these ports, or name a certificate under [[flyrun.tls]].",
        );
    }
    let names = app.acme_names();
    if names.is_empty() {
        log.advise(
            draft.acme,
            "[flyrun.acme] orders a certificate for host names, and the app has none",
            "Write them: [flyrun] hostnames = [\"shop.example.com\"].",
        );
    }
    if names.len() > MAX_NAMES {
        log.add(
            draft.acme,
            format!("there are {} host names, and a certificate has {MAX_NAMES} at most", names.len()),
        );
    }
    // Without a file, whoever asks for them would be shown a certificate of another name.
    for name in app.hostnames.iter().filter(|name| !matches!(name, Hostname::Exact(_))) {
        let at = draft.places.iter().find(|(place, _)| *place == Place::Hostname(name.clone()));
        if let Some((_, at)) = at.filter(|_| app.certificates.is_empty() && !names.is_empty()) {
            log.advise(
                *at,
                format!(
                    "'{name}' takes a wildcard certificate, which is ordered by records in the DNS: flyrun does not"
                ),
                "Name each host, or a certificate for these under [[flyrun.tls]].",
            );
        }
    }
}

fn proxy_protocol_has_proxies(draft: &Draft, log: &Log<'_>) {
    if draft.app.accept_proxy_protocol && draft.app.trusted_proxies.is_empty() {
        log.advise(
            draft.accept_proxy_protocol,
            "accept_proxy_protocol is about trusted_proxies, and there are none",
            "Name the addresses that the proxies have: trusted_proxies = [\"192.0.2.7\"].",
        );
    }
}

fn force_https_has_a_target(draft: &Draft, log: &Log<'_>) {
    let speaks_https = |port: &Port| port.tls.is_some() && matches!(port.carries, Carries::Http(_));
    if draft.app.services.iter().flat_map(|service| &service.ports).any(speaks_https) {
        return;
    }
    for at in draft.services.iter().flat_map(|service| &service.ports).filter_map(|port| port.force_https) {
        log.advise(
            at,
            "force_https sends clients to https, and no port of this app speaks it",
            "Name a certificate ([[flyrun.tls]] with certificate and key, or [flyrun.acme]), or write force_https = false.",
        );
    }
}

fn machines_suffice(draft: &Draft, log: &Log<'_>) {
    for (service, at) in draft.services() {
        if service.min_machines_running > draft.app.max_machines {
            log.advise(
                at.min_machines_running,
                format!(
                    "min_machines_running is {}, and max_machines {}",
                    service.min_machines_running, draft.app.max_machines
                ),
                "Raise max_machines in [flyrun].",
            );
        }
    }
}

/// A machine answers for all services of its group, and cannot be stopped for one alone.
fn services_of_a_group_agree(draft: &Draft, log: &Log<'_>) {
    for group in draft.app.groups.keys() {
        let mut services = draft.services().filter(|(service, _)| service.groups.contains(group));
        let Some((first, first_at)) = services.next() else { continue };
        for (service, at) in services {
            let differs = [
                ("auto_stop_machines", service.auto_stop != first.auto_stop),
                ("auto_start_machines", service.auto_start != first.auto_start),
                ("min_machines_running", service.min_machines_running != first.min_machines_running),
            ];
            for (key, _) in differs.into_iter().filter(|(_, differs)| *differs) {
                let line = log.position(first_at.whole).line;
                log.advise(
                    at.whole,
                    format!("{key} differs from the service at line {line}, whose machines are the same (group '{group}')"),
                    "Write the same in both: a machine is started and stopped for all its services.",
                );
            }
        }
    }
}

/// A filesystem that two machines write is lost.
fn a_volume_has_one_machine(draft: &Draft, log: &Log<'_>) {
    let Some((group, at)) = draft.mounts.iter().next() else { return };
    if draft.app.max_machines > 1 {
        log.advise(
            draft.max_machines,
            format!(
                "max_machines is {}, and machines of group '{group}' have a volume (line {}), which one machine can have",
                draft.app.max_machines,
                log.position(*at).line
            ),
            "Leave max_machines away, or the mounts.",
        );
    }
    let sources = |group: &Group| group.mounts.iter().map(|mount| mount.source.clone()).collect::<Vec<_>>();
    let mut seen: Vec<(String, &String)> = Vec::new();
    for (name, group) in &draft.app.groups {
        for source in sources(group) {
            if let Some((_, other)) = seen.iter().find(|(seen, other)| *seen == source && *other != name) {
                log.advise(
                    draft.mounts.get(name).copied().unwrap_or_default(),
                    format!("the volume '{source}' is mounted in the groups '{other}' and '{name}', and one machine can have it"),
                    "Give each group a volume of its own.",
                );
            }
            seen.push((source, name));
        }
    }
}

fn bluegreen_has_no_volume(draft: &Draft, log: &Log<'_>) {
    if draft.app.deploy.strategy == Strategy::Bluegreen && !draft.mounts.is_empty() {
        log.advise(
            draft.strategy,
            "bluegreen runs the new machines beside the old ones, and a volume can be in one machine",
            "Write strategy = \"rolling\".",
        );
    }
}

impl Draft {
    /// Remembers where ports stand, for complaints about several apps.
    pub fn remember_ports(&mut self) {
        let ports = self
            .app
            .services
            .iter()
            .zip(&self.services)
            .flat_map(|(service, at)| service.ports.iter().zip(&at.ports));
        let places: Vec<_> = ports.map(|(port, at)| (Place::Port(*port.numbers.start()), at.whole)).collect();
        self.places.extend(places);
    }
}
