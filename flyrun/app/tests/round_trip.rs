//! What `flyrun config show` prints of any app reads as the same app.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use app::config::model::{
    self, Acme, App, Asks, AutoStop, Carries, Certificate, Check, Concurrency, Content, CpuKind, Deploy,
    Group, GuestFile, HeaderRule, Http, Load, Method, Metrics, Mount, NamedCheck, Port, ProxyProtocol,
    Restart, Service, Signal, Tls, TlsVersion, Vm,
};
use app::config::{Bytes, Hostname, Named, to_toml};
use common::read_again;
use ipnet::IpNet;
use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

fn one_of<T: Named + std::fmt::Debug>() -> impl Strategy<Value = T> {
    select(T::NAMES.iter().map(|(_, value)| *value).collect::<Vec<_>>())
}

/// Any text that a guest can be given.
fn text() -> impl Strategy<Value = String> {
    any::<String>().prop_map(|text| text.replace('\0', ""))
}

fn name() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9][a-zA-Z0-9_.-]{0,10}"
}

fn header_value() -> impl Strategy<Value = String> {
    "([!-~]([ -~]{0,8}[!-~])?)?"
}

fn url_path() -> impl Strategy<Value = String> {
    "/[!\"$-~]{0,10}"
}

fn millis(range: std::ops::RangeInclusive<u64>) -> impl Strategy<Value = Duration> {
    range.prop_map(Duration::from_millis)
}

fn upto_a_day() -> impl Strategy<Value = Duration> {
    millis(1..=86_400_000)
}

fn check(http: bool) -> impl Strategy<Value = Check> {
    let asks = (one_of::<Method>(), url_path(), btree_map("[a-z-]{1,8}", header_value(), 0..3)).prop_map(
        move |(method, path, headers)| {
            if http { Asks::Http { method, path, headers } } else { Asks::Tcp }
        },
    );
    (millis(100..=3_600_000), millis(1..=60_000), millis(0..=3_600_000), asks)
        .prop_map(|(interval, timeout, grace_period, asks)| Check { interval, timeout, grace_period, asks })
}

fn rule() -> impl Strategy<Value = HeaderRule> {
    prop_oneof![Just(HeaderRule::Remove), vec(header_value(), 1..3).prop_map(HeaderRule::Set)]
}

fn http() -> impl Strategy<Value = Carries> {
    let rules = btree_map("x-[a-z]{1,6}", rule(), 0..3);
    (any::<bool>(), any::<bool>(), upto_a_day(), upto_a_day(), any::<bool>(), rules).prop_map(
        |(force_https, h2_backend, idle_timeout, headers_read_timeout, pristine, response_headers)| {
            Carries::Http(Http {
                force_https,
                h2_backend,
                idle_timeout,
                headers_read_timeout,
                pristine,
                response_headers,
            })
        },
    )
}

/// How many numbers the port has; which, is decided when all are known.
fn port() -> impl Strategy<Value = (u16, Port)> {
    let versions = subsequence(vec![TlsVersion::V1_2, TlsVersion::V1_3], 1..=2);
    let alpn = subsequence(vec!["h2".to_string(), "http/1.1".to_string()], 0..=2);
    let tls = option::of((alpn, versions).prop_map(|(alpn, versions)| Tls { alpn, versions }));
    let tcp =
        option::of(one_of::<ProxyProtocol>()).prop_map(|proxy_protocol| Carries::Tcp { proxy_protocol });
    let carries = prop_oneof![http(), tcp];
    (1u16..=100, tls, carries)
        .prop_map(|(count, tls, carries)| (count, Port { numbers: 0..=0, tls, carries }))
}

fn concurrency() -> impl Strategy<Value = Concurrency> {
    (one_of::<Load>(), 1u32..=1000, option::of(0u32..=1000)).prop_map(|(by, soft_limit, more)| Concurrency {
        by,
        soft_limit,
        hard_limit: more.map(|more| soft_limit + more),
    })
}

type Draft = (Vec<String>, u16, Vec<(u16, Port)>, Concurrency, Vec<Check>, Vec<Check>);

fn service(groups: Vec<String>) -> impl Strategy<Value = Draft> {
    let most = groups.len();
    let checks = || (vec(check(false), 0..2), vec(check(true), 0..2));
    (subsequence(groups, 1..=most), 1u16.., vec(port(), 1..4), concurrency(), checks()).prop_map(
        |(groups, port, ports, concurrency, (tcp, http))| (groups, port, ports, concurrency, tcp, http),
    )
}

fn group() -> impl Strategy<Value = Group> {
    let vm = (one_of::<CpuKind>(), 1u8..=32, 48u64..=1 << 20).prop_map(|(cpu_kind, cpus, memory)| Vm {
        cpu_kind,
        cpus,
        memory: Bytes::mib(memory),
    });
    let restart = prop_oneof![
        Just(Restart::Never),
        Just(Restart::Always),
        (1u32..=1_000_000).prop_map(|retries| Restart::OnFailure { retries })
    ];
    let content = prop_oneof![
        text().prop_map(Content::Text),
        "[a-z./]{1,8}".prop_map(Content::HostFile),
        name().prop_map(Content::Secret)
    ];
    let files = btree_map("/[a-z]{1,8}", content, 0..3).prop_map(|files| {
        files.into_iter().map(|(guest_path, content)| GuestFile { guest_path, content }).collect()
    });
    let mounts = btree_map("/[a-z]{1,8}", (name(), 64u64..=8 << 20), 0..3).prop_map(|mounts| {
        let mount =
            |(destination, (source, size))| Mount { source, destination, initial_size: Bytes::mib(size) };
        mounts.into_iter().map(mount).collect()
    });
    let metrics = option::of((1u16.., url_path()).prop_map(|(port, path)| Metrics { port, path }));
    (vec(text(), 0..4), vm, restart, mounts, files, metrics).prop_map(
        |(command, vm, restart, mounts, files, metrics)| Group {
            command,
            vm,
            restart,
            mounts,
            files,
            metrics,
        },
    )
}

fn hostnames() -> impl Strategy<Value = BTreeSet<Hostname>> {
    let text = prop_oneof![Just("*".to_string()), "(\\*\\.)?[a-z0-9]{1,5}(\\.[a-z]{1,3}){0,2}"];
    btree_set(text.prop_map(|text| text.parse().expect("a host name")), 1..4)
}

fn deploy() -> impl Strategy<Value = Deploy> {
    let command = option::of(vec(text(), 1..3));
    (one_of::<model::Strategy>(), upto_a_day(), command, upto_a_day()).prop_map(
        |(strategy, wait_timeout, release_command, release_command_timeout)| Deploy {
            strategy,
            wait_timeout,
            release_command,
            release_command_timeout,
        },
    )
}

prop_compose! {
    fn app()(groups in btree_map(name(), group(), 1..4))(
        services in vec(service(groups.keys().cloned().collect()), 0..3),
        checks in btree_map(
            text(),
            (subsequence(groups.keys().cloned().collect::<Vec<_>>(), 1..=groups.len()), 1u16.., any::<bool>().prop_flat_map(check)),
            0..3,
        ),
        (name, primary_region, image) in ("[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?", "[a-z0-9-]{1,5}", "[ -~]{0,8}[!-~]"),
        (kill_signal, kill_timeout, deploy) in (one_of::<Signal>(), millis(0..=300_000), deploy()),
        env in btree_map("[A-EG-Z_a-z ]{1,8}", text(), 0..3),
        (hostnames, certificates) in (hostnames(), vec(("[ -~]{1,8}", text()), 0..3)),
        (body_timeout, total_timeout) in (option::of(upto_a_day()), option::of(upto_a_day())),
        (trusted_proxies, accept_proxy_protocol) in (vec(range(), 0..3), any::<bool>()),
        acme in option::of(acme()),
        (idle_timeout, start_timeout, queue_timeout, queue_limit) in (upto_a_day(), upto_a_day(), upto_a_day(), 1u32..=1_000_000),
        (max_machines, auto_start, auto_stop, min_machines_running) in (1u32..=1000, any::<bool>(), one_of::<AutoStop>(), 0u32..=1000),
        groups in Just(groups),
    ) -> App {
        let certificates: Vec<_> = certificates.into_iter().filter(|(_, key)| !key.is_empty())
            .map(|(certificate, key)| Certificate { certificate, key }).collect();
        let mut app = App {
            name, primary_region, image, kill_signal, kill_timeout, deploy, env, groups,
            services: Vec::new(),
            checks: checks.into_iter().map(|(name, (groups, port, check))| (name, NamedCheck { groups, port, check })).collect(),
            hostnames: hostnames.into_iter().collect(),
            certificates, acme: None,
            accept_proxy_protocol: accept_proxy_protocol && !trusted_proxies.is_empty(),
            trusted_proxies, body_timeout, total_timeout,
            idle_timeout, start_timeout, queue_timeout, queue_limit, max_machines,
        };
        let auto_stop = if auto_start { auto_stop } else { AutoStop::Off };
        let scaling = (auto_stop, auto_start, min_machines_running.min(max_machines));
        app.services = number(services, scaling, !app.certificates.is_empty());
        app.acme = acme.filter(|_| {
            let has_tls = app.services.iter().flat_map(|service| &service.ports).any(|port| port.tls.is_some());
            has_tls && !app.acme_ways().is_empty() && !app.acme_names().is_empty() && !app.certificates.is_empty()
        });
        without_contradictions(app)
    }
}

/// What an app lists comes without bits beyond the prefix.
fn range() -> impl Strategy<Value = IpNet> {
    let four = (any::<std::net::Ipv4Addr>(), 1u8..=32).prop_map(|(address, bits)| (address.into(), bits));
    let six = (0x2000u16..0x4000, any::<u64>(), 1u8..=128).prop_map(|(first, rest, bits)| {
        (std::net::Ipv6Addr::from(u128::from(first) << 112 | u128::from(rest)).into(), bits)
    });
    prop_oneof![four, six].prop_map(|(address, bits)| IpNet::new(address, bits).expect("a range").trunc())
}

fn acme() -> impl Strategy<Value = Acme> {
    ("https://[a-z]{1,5}(/[!-~]{0,5})?", option::of("[a-z]{1,5}@[a-z]{1,5}"), option::of("[a-z./]{1,8}"))
        .prop_map(|(directory, email, ca)| Acme { directory, email, ca })
}

/// Gives each port numbers of its own, and takes away what contradicts the rest.
fn number(drafts: Vec<Draft>, scaling: (AutoStop, bool, u32), has_certificate: bool) -> Vec<Service> {
    let mut next = 40;
    let mut services = Vec::new();
    for (groups, internal_port, ports, concurrency, tcp, http) in drafts {
        let mut numbered = Vec::new();
        for (count, mut port) in ports {
            port.numbers = next..=next + count - 1;
            next += count;
            port.tls = port.tls.filter(|_| has_certificate);
            numbered.push(port);
        }
        let mut checks: Vec<_> = tcp.into_iter().chain(http).collect();
        if checks.is_empty() {
            checks.push(Service::default_check());
        }
        services.push(Service {
            groups,
            internal_port,
            ports: numbered,
            concurrency,
            auto_stop: scaling.0,
            auto_start: scaling.1,
            min_machines_running: scaling.2,
            checks,
        });
    }
    let is_https = |port: &Port| port.tls.is_some() && matches!(port.carries, Carries::Http(_));
    let has_https = services.iter().flat_map(|service| &service.ports).any(is_https);
    for port in services.iter_mut().flat_map(|service| &mut service.ports) {
        let is_tls = port.tls.is_some();
        if let Carries::Http(http) = &mut port.carries {
            http.force_https &= has_https && !is_tls;
        }
    }
    services
}

fn without_contradictions(mut app: App) -> App {
    let mut taken = BTreeSet::new();
    let has_volumes = app.max_machines == 1 && app.deploy.strategy != model::Strategy::Bluegreen;
    for group in app.groups.values_mut() {
        group.mounts.retain(|mount| has_volumes && taken.insert(mount.source.clone()));
    }
    app
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn an_app_that_is_shown_reads_as_the_same(app in app()) {
        prop_assert_eq!(read_again(&app), Ok(app));
    }

    #[test]
    fn an_app_with_one_machine_keeps_its_volumes(mut app in app(), mounts in vec(name(), 1..3)) {
        app.max_machines = 1;
        app.services.iter_mut().for_each(|service| service.min_machines_running = 0);
        app.deploy.strategy = model::Strategy::Rolling;
        let unique: BTreeSet<_> = mounts.into_iter().collect();
        let first = app.groups.values_mut().next().expect("at least one group");
        first.mounts = unique.into_iter().enumerate()
            .map(|(index, source)| Mount { source, destination: format!("/data/{index}"), initial_size: Bytes::mib(64) })
            .collect();
        prop_assert_eq!(read_again(&app), Ok(app));
    }
}

#[test]
fn json_and_toml_say_the_same() {
    for (name, text) in common::FIXTURES {
        let app = common::read(text).unwrap_or_else(|refused| panic!("{name}: {refused}"));
        let json = serde_json::to_string(&to_toml(&app)).expect("JSON can be written");
        let table: toml::Table = serde_json::from_str(&json).expect("and read");
        assert_eq!(table, to_toml(&app), "{name}");
    }
}
