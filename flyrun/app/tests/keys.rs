//! Every key that is listed as supported does something, and README.md lists them all.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use app::config::keys::{SECTIONS, markdown};
use app::config::model::App;
use common::read;

/// A file with every table, and in each of them nothing that need not be there.
const BASE: &str = r#"
app = "a"
[build]
image = "b"
[processes]
p = ""
q = ""
r = ""
[http_service]
processes = ["r"]
[http_service.concurrency]
[[http_service.checks]]
[[services]]
internal_port = 1
processes = ["p"]
[[services.tcp_checks]]
[[services.http_checks]]
[[services.ports]]
port = 1
handlers = ["http", "tls"]
http_options = { response = {} }
tls_options = {}
[[services.ports]]
port = 2
handlers = ["proxy_proto"]
proxy_proto_options = {}
[[services]]
internal_port = 5
processes = ["q"]
[[services.ports]]
start_port = 10
end_port = 12
handlers = ["http"]
[checks.c]
type = "http"
port = 1
[[vm]]
processes = ["p"]
[[files]]
guest_path = "/f"
raw_value = "f"
processes = ["p"]
[[restart]]
processes = ["p"]
[[metrics]]
port = 1
processes = ["p"]
[deploy]
[flyrun]
trusted_proxies = ["192.0.2.1"]
hostnames = ["h"]
[flyrun.acme]
terms_of_service_agreed = true
directory = "https://a"
[[flyrun.tls]]
certificate = "c"
key = "k"
"#;

/// A volume contradicts other things, so it is in the file for its own keys only.
const VOLUME: &str = r#"
[[mounts]]
source = "v"
destination = "/v"
processes = ["p"]
"#;

/// For each table and key: what is replaced in [`BASE`], and by what.
const CHANGES: &[(&str, &str, &str, &str)] = &[
    ("", "app", "app = \"a\"", "app = \"z\""),
    ("", "primary_region", "app = \"a\"", "app = \"a\"\nprimary_region = \"z\""),
    ("", "kill_signal", "app = \"a\"", "app = \"a\"\nkill_signal = \"SIGTERM\""),
    ("", "kill_timeout", "app = \"a\"", "app = \"a\"\nkill_timeout = 7"),
    ("", "build", "image = \"b\"", "image = \"z\""),
    ("", "deploy", "[deploy]", "[deploy]\nwait_timeout = 1"),
    ("", "env", "[deploy]", "[env]\nA = 1\n[deploy]"),
    ("", "processes", "q = \"\"", "q = \"run\""),
    ("", "http_service", "[http_service]", "[http_service]\ninternal_port = 9"),
    ("", "services", "internal_port = 5", "internal_port = 6"),
    ("", "checks", "[checks.c]", "[checks.d]"),
    ("", "vm", "[[vm]]", "[[vm]]\ncpus = 2"),
    ("", "mounts", "source = \"v\"", "source = \"z\""),
    ("", "files", "raw_value = \"f\"", "raw_value = \"z\""),
    ("", "restart", "[[restart]]", "[[restart]]\npolicy = \"never\""),
    ("", "metrics", "[[metrics]]\nport = 1", "[[metrics]]\nport = 2"),
    ("", "flyrun", "[flyrun]", "[flyrun]\nqueue_limit = 7"),
    ("[build]", "image", "image = \"b\"", "image = \"z\""),
    ("[deploy]", "strategy", "[deploy]", "[deploy]\nstrategy = \"bluegreen\""),
    ("[deploy]", "wait_timeout", "[deploy]", "[deploy]\nwait_timeout = 1"),
    ("[deploy]", "release_command", "[deploy]", "[deploy]\nrelease_command = \"x\""),
    ("[deploy]", "release_command_timeout", "[deploy]", "[deploy]\nrelease_command_timeout = 1"),
    ("[http_service]", "internal_port", "[http_service]", "[http_service]\ninternal_port = 9"),
    ("[http_service]", "force_https", "[http_service]", "[http_service]\nforce_https = true"),
    (
        "[http_service]",
        "auto_stop_machines",
        "[http_service]",
        "[http_service]\nauto_stop_machines = \"stop\"",
    ),
    (
        "[http_service]",
        "auto_start_machines",
        "[http_service]",
        "[http_service]\nauto_start_machines = false",
    ),
    ("[http_service]", "min_machines_running", "[http_service]", "[http_service]\nmin_machines_running = 1"),
    ("[http_service]", "processes", "processes = [\"r\"]", "processes = [\"q\"]"),
    (
        "[http_service]",
        "concurrency",
        "[http_service.concurrency]",
        "[http_service.concurrency]\nsoft_limit = 7",
    ),
    ("[http_service]", "http_options", "[http_service]", "[http_service]\nhttp_options.h2_backend = true"),
    (
        "[http_service]",
        "tls_options",
        "[http_service]",
        "[http_service]\ntls_options.versions = [\"TLSv1.3\"]",
    ),
    ("[http_service]", "checks", "[[http_service.checks]]", ""),
    ("[[services]]", "internal_port", "internal_port = 5", "internal_port = 6"),
    (
        "[[services]]",
        "auto_stop_machines",
        "processes = [\"q\"]",
        "processes = [\"q\"]\nauto_stop_machines = \"suspend\"",
    ),
    (
        "[[services]]",
        "auto_start_machines",
        "processes = [\"q\"]",
        "processes = [\"q\"]\nauto_start_machines = false",
    ),
    (
        "[[services]]",
        "min_machines_running",
        "processes = [\"q\"]",
        "processes = [\"q\"]\nmin_machines_running = 1",
    ),
    (
        "[[services]]",
        "processes",
        "internal_port = 5\nprocesses = [\"q\"]",
        "internal_port = 5\nprocesses = [\"p\"]",
    ),
    ("[[services]]", "ports", "port = 2", "port = 3"),
    ("[[services]]", "concurrency", "internal_port = 5", "internal_port = 5\nconcurrency.soft_limit = 7"),
    ("[[services]]", "tcp_checks", "[[services.tcp_checks]]", "[[services.tcp_checks]]\ninterval = 1000"),
    ("[[services]]", "http_checks", "[[services.http_checks]]", ""),
    ("[[services.ports]]", "port", "port = 2", "port = 3"),
    ("[[services.ports]]", "start_port", "start_port = 10", "start_port = 9"),
    ("[[services.ports]]", "end_port", "end_port = 12", "end_port = 13"),
    (
        "[[services.ports]]",
        "handlers",
        "end_port = 12\nhandlers = [\"http\"]",
        "end_port = 12\nhandlers = []",
    ),
    ("[[services.ports]]", "force_https", "end_port = 12", "end_port = 12\nforce_https = true"),
    ("[[services.ports]]", "http_options", "response = {}", "h2_backend = true"),
    ("[[services.ports]]", "tls_options", "tls_options = {}", "tls_options = { alpn = [\"h2\"] }"),
    (
        "[[services.ports]]",
        "proxy_proto_options",
        "proxy_proto_options = {}",
        "proxy_proto_options = { version = \"v2\" }",
    ),
    ("[….concurrency]", "type", "concurrency]", "concurrency]\ntype = \"requests\""),
    ("[….concurrency]", "soft_limit", "concurrency]", "concurrency]\nsoft_limit = 7"),
    ("[….concurrency]", "hard_limit", "concurrency]", "concurrency]\nhard_limit = 70"),
    ("[….http_options]", "h2_backend", "response = {}", "h2_backend = true"),
    ("[….http_options]", "idle_timeout", "response = {}", "idle_timeout = 7"),
    ("[….http_options]", "headers_read_timeout", "response = {}", "headers_read_timeout = 7"),
    ("[….http_options]", "response", "response = {}", "response = { pristine = true }"),
    ("[….http_options.response]", "pristine", "response = {}", "response = { pristine = true }"),
    ("[….http_options.response]", "headers", "response = {}", "response = { headers = { x = false } }"),
    ("[….tls_options]", "alpn", "tls_options = {}", "tls_options = { alpn = [\"h2\"] }"),
    ("[….tls_options]", "versions", "tls_options = {}", "tls_options = { versions = [\"TLSv1.2\"] }"),
    (
        "[….proxy_proto_options]",
        "version",
        "proxy_proto_options = {}",
        "proxy_proto_options = { version = \"v2\" }",
    ),
    ("[[http_service.checks]]", "interval", ".checks]]", ".checks]]\ninterval = 1000"),
    ("[[http_service.checks]]", "timeout", ".checks]]", ".checks]]\ntimeout = 1000"),
    ("[[http_service.checks]]", "grace_period", ".checks]]", ".checks]]\ngrace_period = 7"),
    ("[[http_service.checks]]", "method", ".checks]]", ".checks]]\nmethod = \"head\""),
    ("[[http_service.checks]]", "path", ".checks]]", ".checks]]\npath = \"/up\""),
    ("[[http_service.checks]]", "headers", ".checks]]", ".checks]]\nheaders = { a = \"b\" }"),
    ("[[services.http_checks]]", "interval", "http_checks]]", "http_checks]]\ninterval = 1000"),
    ("[[services.http_checks]]", "timeout", "http_checks]]", "http_checks]]\ntimeout = 1000"),
    ("[[services.http_checks]]", "grace_period", "http_checks]]", "http_checks]]\ngrace_period = 7"),
    ("[[services.http_checks]]", "method", "http_checks]]", "http_checks]]\nmethod = \"head\""),
    ("[[services.http_checks]]", "path", "http_checks]]", "http_checks]]\npath = \"/up\""),
    ("[[services.http_checks]]", "headers", "http_checks]]", "http_checks]]\nheaders = { a = \"b\" }"),
    ("[[services.tcp_checks]]", "interval", "tcp_checks]]", "tcp_checks]]\ninterval = 1000"),
    ("[[services.tcp_checks]]", "timeout", "tcp_checks]]", "tcp_checks]]\ntimeout = 1000"),
    ("[[services.tcp_checks]]", "grace_period", "tcp_checks]]", "tcp_checks]]\ngrace_period = 7"),
    ("[checks.NAME]", "type", "type = \"http\"", "type = \"tcp\""),
    ("[checks.NAME]", "port", "type = \"http\"\nport = 1", "type = \"http\"\nport = 2"),
    ("[checks.NAME]", "interval", "[checks.c]", "[checks.c]\ninterval = 1000"),
    ("[checks.NAME]", "timeout", "[checks.c]", "[checks.c]\ntimeout = 1000"),
    ("[checks.NAME]", "grace_period", "[checks.c]", "[checks.c]\ngrace_period = 7"),
    ("[checks.NAME]", "method", "[checks.c]", "[checks.c]\nmethod = \"PUT\""),
    ("[checks.NAME]", "path", "[checks.c]", "[checks.c]\npath = \"/up\""),
    ("[checks.NAME]", "headers", "[checks.c]", "[checks.c]\nheaders = { a = \"b\" }"),
    ("[checks.NAME]", "processes", "[checks.c]", "[checks.c]\nprocesses = [\"q\"]"),
    ("[[vm]]", "size", "[[vm]]", "[[vm]]\nsize = \"performance-1x\""),
    ("[[vm]]", "cpu_kind", "[[vm]]", "[[vm]]\ncpu_kind = \"performance\""),
    ("[[vm]]", "cpus", "[[vm]]", "[[vm]]\ncpus = 2"),
    ("[[vm]]", "memory", "[[vm]]", "[[vm]]\nmemory = \"1gb\""),
    ("[[vm]]", "memory_mb", "[[vm]]", "[[vm]]\nmemory_mb = 512"),
    ("[[vm]]", "processes", "[[vm]]\nprocesses = [\"p\"]", "[[vm]]\ncpus = 2\nprocesses = [\"q\"]"),
    ("[[mounts]]", "source", "source = \"v\"", "source = \"z\""),
    ("[[mounts]]", "destination", "destination = \"/v\"", "destination = \"/z\""),
    ("[[mounts]]", "initial_size", "[[mounts]]", "[[mounts]]\ninitial_size = 1"),
    ("[[mounts]]", "processes", "\"/v\"\nprocesses = [\"p\"]", "\"/v\"\nprocesses = [\"q\"]"),
    ("[[files]]", "guest_path", "guest_path = \"/f\"", "guest_path = \"/z\""),
    ("[[files]]", "raw_value", "raw_value = \"f\"", "raw_value = \"z\""),
    ("[[files]]", "local_path", "raw_value = \"f\"", "local_path = \"f\""),
    ("[[files]]", "secret_name", "raw_value = \"f\"", "secret_name = \"f\""),
    ("[[files]]", "processes", "\"f\"\nprocesses = [\"p\"]", "\"f\"\nprocesses = [\"q\"]"),
    ("[[restart]]", "policy", "[[restart]]", "[[restart]]\npolicy = \"always\""),
    ("[[restart]]", "retries", "[[restart]]", "[[restart]]\nretries = 7"),
    (
        "[[restart]]",
        "processes",
        "[[restart]]\nprocesses = [\"p\"]",
        "[[restart]]\nretries = 7\nprocesses = [\"q\"]",
    ),
    ("[[metrics]]", "port", "[[metrics]]\nport = 1", "[[metrics]]\nport = 2"),
    ("[[metrics]]", "path", "[[metrics]]", "[[metrics]]\npath = \"/m\""),
    (
        "[[metrics]]",
        "processes",
        "[[metrics]]\nport = 1\nprocesses = [\"p\"]",
        "[[metrics]]\nport = 1\nprocesses = [\"q\"]",
    ),
    ("[flyrun]", "hostnames", "\"h\"", "\"z\""),
    ("[flyrun]", "idle_timeout", "[flyrun]", "[flyrun]\nidle_timeout = 7"),
    ("[flyrun]", "start_timeout", "[flyrun]", "[flyrun]\nstart_timeout = 7"),
    ("[flyrun]", "queue_timeout", "[flyrun]", "[flyrun]\nqueue_timeout = 7"),
    ("[flyrun]", "queue_limit", "[flyrun]", "[flyrun]\nqueue_limit = 7"),
    ("[flyrun]", "max_machines", "[flyrun]", "[flyrun]\nmax_machines = 2"),
    ("[flyrun]", "body_timeout", "[flyrun]", "[flyrun]\nbody_timeout = 7"),
    ("[flyrun]", "total_timeout", "[flyrun]", "[flyrun]\ntotal_timeout = 7"),
    ("[flyrun]", "trusted_proxies", "\"192.0.2.1\"", "\"192.0.2.0/24\""),
    ("[flyrun]", "accept_proxy_protocol", "[flyrun]", "[flyrun]\naccept_proxy_protocol = true"),
    ("[flyrun]", "acme", "directory = \"https://a\"", "directory = \"https://z\""),
    ("[flyrun.acme]", "directory", "directory = \"https://a\"", "directory = \"https://z\""),
    ("[flyrun.acme]", "email", "[flyrun.acme]", "[flyrun.acme]\nemail = \"a@b\""),
    ("[flyrun.acme]", "ca", "[flyrun.acme]", "[flyrun.acme]\nca = \"c\""),
    ("[flyrun]", "tls", "certificate = \"c\"", "certificate = \"z\""),
    ("[[flyrun.tls]]", "certificate", "certificate = \"c\"", "certificate = \"z\""),
    ("[[flyrun.tls]]", "key", "key = \"k\"", "key = \"z\""),
];

/// Keys of which one value alone is supported.
const ONE_VALUE: &[(&str, &str)] = &[
    ("[[services]]", "protocol"),
    ("[[http_service.checks]]", "protocol"),
    ("[[services.http_checks]]", "protocol"),
    ("[checks.NAME]", "protocol"),
    ("[flyrun.acme]", "terms_of_service_agreed"),
];

fn app(text: &str, place: (&str, &str)) -> App {
    read(text).unwrap_or_else(|refused| panic!("{place:?}: {refused}"))
}

#[test]
fn every_key_changes_what_is_read() {
    let with_volume = format!("{BASE}{VOLUME}");
    let keys = SECTIONS.iter().flat_map(|section| section.keys.iter().map(|key| (section.header, key.name)));
    for place in keys.filter(|place| !ONE_VALUE.contains(place)) {
        let base = if place.0 == "[[mounts]]" || place.1 == "mounts" { &with_volume } else { BASE };
        let change = CHANGES.iter().find(|(header, name, ..)| (*header, *name) == place);
        let (.., old, new) = change.unwrap_or_else(|| panic!("no change of {place:?}"));
        assert!(base.contains(old), "{place:?}: {old} is not there");
        assert_ne!(app(&base.replace(old, new), place), app(base, place), "{place:?} changes nothing");
    }
}

#[test]
fn readme_lists_them() {
    let readme = include_str!("../../../README.md");
    assert!(readme.contains(&markdown()), "README.md does not have this table:\n{}", markdown());
}
