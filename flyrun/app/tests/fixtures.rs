//! Files as people write them.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use std::time::Duration;

use app::config::model::*;
use app::config::{Bytes, Hostname};
use common::{FIXTURES, read, read_again};

fn fixture(name: &str) -> App {
    let text = FIXTURES.iter().find(|(known, _)| *known == name).expect("a fixture").1;
    read(text).unwrap_or_else(|refused| panic!("{name}: {refused}"))
}

#[test]
fn each_reads_and_what_is_shown_of_it_reads_as_the_same() {
    for (name, _) in FIXTURES {
        let app = fixture(name);
        assert_eq!(read_again(&app).as_ref(), Ok(&app), "{name}");
    }
}

#[test]
fn the_smallest_file_has_flys_defaults() {
    let app = fixture("smallest.toml");
    assert_eq!((app.kill_signal, app.kill_timeout), (Signal::Int, Duration::from_secs(5)));
    assert_eq!(app.deploy.strategy, Strategy::Rolling);
    let group = app.groups.get("app").expect("the group without [processes]");
    assert_eq!(group.vm, Vm { cpu_kind: CpuKind::Shared, cpus: 1, memory: Bytes::mib(256) });
    assert_eq!(group.restart, Restart::OnFailure { retries: 10 });
    let [service] = app.services.as_slice() else { panic!("{:?}", app.services) };
    assert_eq!(service.concurrency, Concurrency { by: Load::Connections, soft_limit: 20, hard_limit: None });
    assert_eq!(
        (service.auto_stop, service.auto_start, service.min_machines_running),
        (AutoStop::Off, true, 0)
    );
    assert_eq!(service.checks, [Service::default_check()], "without checks a connection is asked for");
    assert_eq!(service.ports.len(), 1, "no certificate, no port 443");
    assert_eq!(app.hostnames, [Hostname::Any]);
}

#[test]
fn an_http_service_with_a_certificate_is_on_ports_80_and_443() {
    let app = fixture("web.toml");
    let [service] = app.services.as_slice() else { panic!("{:?}", app.services) };
    let [plain, secure] = service.ports.as_slice() else { panic!("{:?}", service.ports) };
    assert_eq!((&plain.numbers, &secure.numbers), (&(80..=80), &(443..=443)));
    assert!(plain.tls.is_none());
    assert_eq!(secure.tls.as_ref().map(|tls| tls.versions.len()), Some(2));
    let (Carries::Http(plain), Carries::Http(secure)) = (&plain.carries, &secure.carries) else { panic!() };
    assert!(plain.force_https && !secure.force_https);
    assert_eq!(secure.idle_timeout, Duration::from_secs(120), "a bare number is seconds here");
    assert_eq!(secure.response_headers.get("server"), Some(&HeaderRule::Remove));
    let check = service.checks.first().expect("a check");
    assert_eq!(check.interval, Duration::from_secs(5), "and milliseconds there");
}

#[test]
fn tables_without_processes_are_the_default_groups_or_everyones() {
    let app = fixture("web.toml");
    let (web, worker) = (&app.groups["web"], &app.groups["worker"]);
    assert_eq!(web.vm, Vm { cpu_kind: CpuKind::Shared, cpus: 1, memory: Bytes::mib(512) });
    assert_eq!(worker.vm, Vm { cpu_kind: CpuKind::Performance, cpus: 2, memory: Bytes::mib(4096) });
    assert_eq!(worker.command, ["bundle", "exec", "sidekiq", "-c", "10", "-q", "default mail"]);
    assert_eq!((web.files.len(), worker.files.len()), (1, 1));
    assert_eq!((&web.metrics, worker.restart), (&None, Restart::Always));
    let crawler = fixture("worker.toml");
    assert_eq!(crawler.groups["fetch"].restart, Restart::OnFailure { retries: 3 });
    assert_eq!(crawler.groups["app"].restart, Restart::Never);
    assert!(crawler.groups["app"].command.is_empty(), "the image's own");
}

#[test]
fn what_flyctl_wrote_in_2022_means_the_same() {
    let app = fixture("older.toml");
    let [service] = app.services.as_slice() else { panic!("{:?}", app.services) };
    assert_eq!((service.internal_port, service.auto_stop), (8080, AutoStop::Stop));
    let check = service.checks.first().expect("a check");
    assert_eq!((check.interval, check.timeout), (Duration::from_secs(10), Duration::from_secs(2)));
}

#[test]
fn raw_tcp_has_no_handlers() {
    let app = fixture("edge.toml");
    let carries: Vec<_> =
        app.services[0].ports.iter().map(|port| (port.tls.is_some(), &port.carries)).collect();
    let proxy = |version| Carries::Tcp { proxy_protocol: Some(version) };
    assert_eq!(carries, [(false, &proxy(ProxyProtocol::V2)), (true, &proxy(ProxyProtocol::V1))]);
    assert_eq!(app.services[2].ports[0].carries, Carries::Tcp { proxy_protocol: None });
    assert_eq!(app.services[2].ports[0].numbers, 30_000..=30_099);
}
