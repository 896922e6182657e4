//! What cannot be served is refused, with place, fact and remedy.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::refusals;

/// A file that is fine but for what is added.
fn with(more: &str) -> Vec<String> {
    refusals(&format!("app = \"a\"\nbuild.image = \"b\"\n{more}"))
}

/// The one thing that is wrong must begin with this place and contain these words.
#[track_caller]
fn one(more: &str, place: &str, words: &[&str]) {
    let told = with(more);
    let [only] = told.as_slice() else { panic!("{more}\n{told:#?}") };
    assert!(only.starts_with(&format!("fly.toml:{place}: ")), "{only}");
    for word in words {
        assert!(only.contains(word), "{word:?} is not in: {only}");
    }
}

const HTTP: &str = "[http_service]\n";
const SERVICE: &str = "[[services]]\ninternal_port = 1\n";
const PORT: &str = "[[services]]\ninternal_port = 1\n[[services.ports]]\n";

#[test]
fn unknown_keys_are_named_with_their_place() {
    one(
        "[http_service]\n  internal_prot = 1",
        "4:3",
        &["no key 'internal_prot' in [http_service]", "Did you mean 'internal_port'?"],
    );
    one(
        "http_sevice = {}",
        "3:1",
        &["no key 'http_sevice' at the top level", "Did you mean 'http_service'?"],
    );
    one("[http_service]\nmax_machines = 1", "4:1", &["'max_machines' belongs to [flyrun]."]);
    one(
        "[deploy]\nprimary_region = 'x'",
        "4:1",
        &["'primary_region' belongs to the top level, above the first table."],
    );
    one("[metrics]\nport = 1\nzzz = 1", "5:1", &["There are: port, path, processes."]);
    one("[http_service.concurrency]\n\"a\\u001bb\" = 1", "4:1", &[r"no key 'a\u{1b}b'"]);
    one(&format!("{} = 1", "k".repeat(5000)), "3:1", &["kkk…'"]);
}

#[test]
fn what_only_fly_has_is_refused_with_a_reason() {
    one("swap_size_mb = 512", "3:1", &["flyrun does not support 'swap_size_mb' | Machines have no swap"]);
    one("build.dockerfile = 'Dockerfile'", "3:7", &["'dockerfile'", "flyrun builds no images"]);
    one("[[statics]]\nguest_path = '/a'\nurl_prefix = '/b'", "3:3", &["'statics'", "let the app serve them"]);
    one("[mount]\nsource = 'x'", "3:2", &["'mount'", "Write [[mounts]]."]);
    one(
        &format!("{PORT}port = 1\nhandlers = ['pg_tls']"),
        "7:13",
        &["pg_tls", "Let PostgreSQL speak TLS itself"],
    );
    one(&format!("{SERVICE}protocol = 'udp'\n[[services.ports]]\nport = 1"), "5:12", &["no UDP"]);
    one("[[http_service.checks]]\nprotocol = 'https'", "4:12", &["do not speak TLS"]);
}

#[test]
fn wrong_types_and_ranges_say_what_would_be_right() {
    one(
        &format!("{HTTP}internal_port = 'many'"),
        "4:17",
        &["'internal_port' is 'many': it must be a port, 1 to 65535"],
    );
    one(&format!("{HTTP}internal_port = 0"), "4:17", &["is 0: it must be a port"]);
    one(&format!("{HTTP}force_https = 'yes'"), "4:15", &["true or false"]);
    one(&format!("{HTTP}auto_stop_machines = 'pause'"), "4:22", &["\"off\", \"stop\" or \"suspend\""]);
    one(
        "kill_timeout = '10 parsecs'",
        "3:16",
        &["a duration from 0s to 5m, such as \"1m30s\", or a number of seconds"],
    );
    one("kill_timeout = 301", "3:16", &["from 0s to 5m"]);
    one("kill_signal = 'SIGNOPE'", "3:15", &["\"SIGINT\", \"SIGTERM\""]);
    one("services = 1", "3:12", &["'services' is 1: it must be a table, or several"]);
    one("http_service = []", "3:16", &["a table, [http_service]"]);
    one(
        &format!("[flyrun]\nhostnames = [{}]", (0..1001).map(|n| format!("'a{n}',")).collect::<String>()),
        "4:13",
        &["has 1001 elements, at most 1000"],
    );
    one("env = 'A=1'", "3:7", &["it must be a table"]);
    one("[env]\nA = [1]", "4:5", &["'A' is a list"]);
    one("[env]\nFLY_APP_NAME = 'x'", "4:1", &["FLY_ are flyrun's"]);
    one("[processes]\nweb = 'a \"b'", "4:7", &["quotes that end"]);
    one("[processes]\n\"a b\" = 'x'", "4:1", &["'a b' is not a group's name"]);
    one("[[vm]]\nmemory = '10mb'", "4:10", &["a size from 48mb to 1tb in whole MiB"]);
    one("[[vm]]\nsize = 'shared-cpu-3x'", "4:8", &["shared-cpu-Nx"]);
    one("[[vm]]\ncpus = 33", "4:8", &["1 to 32"]);
    one("[[vm]]\nmemory = 512\nmemory_mb = 512", "5:1", &["are the same"]);
    one("[[restart]]\npolicy = 'maybe'", "4:10", &["\"always\", \"never\" or \"on-failure\""]);
    one("[[restart]]\npolicy = 'never'\nretries = 3", "5:1", &["on-failure\" only"]);
    one("[[mounts]]\nsource = '../x'\ndestination = '/d'", "4:10", &["a volume's name"]);
    one("[[mounts]]\nsource = 'x'\ndestination = '/d/../..'", "5:15", &["without '..'"]);
    one("[[files]]\nguest_path = '/a'", "3:1", &["has 0 of raw_value", "exactly one"]);
    one("[[files]]\nguest_path = '/a'\nraw_value = 'x'\nsecret_name = 'Y'", "3:1", &["has 2 of"]);
    one("[flyrun]\nhostnames = ['a b']", "4:14", &["a host name such as shop.example.com"]);
    one("[flyrun]\nhostnames = []", "4:13", &["at least one host name"]);
    one("[flyrun]\nhostnames = ['a', 'A']", "4:19", &["there twice"]);
    one(
        "[http_service.http_options.response.headers]\n'Content-Length' = '1'",
        "4:1",
        &["not a header that can be changed"],
    );
    one("[http_service.http_options.response.headers]\nX = \"a\\nb\"", "4:5", &["printable ASCII"]);
    one("[[http_service.checks]]\npath = 'no slash'", "4:8", &["a path that begins with '/'"]);
    one("[checks.a]\ntype = 'tcp'\nport = 1\npath = '/'", "6:8", &["belongs to a check of type \"http\""]);
}

#[test]
fn contradictions_are_found() {
    one(
        "[http_service.concurrency]\nsoft_limit = 30\nhard_limit = 20",
        "4:14",
        &["soft_limit is 30 and hard_limit 20"],
    );
    one("[http_service.concurrency]\nhard_limit = 0", "4:14", &["1 to 1000000"]);
    one(&format!("{HTTP}{PORT}port = 80"), "6:1", &["port 80 is taken already, at line 3"]);
    one(
        &format!("{PORT}port = 5\n[[services.ports]]\nstart_port = 1\nend_port = 9"),
        "7:1",
        &["port 5 is taken already, at line 5"],
    );
    one(&format!("{PORT}start_port = 9\nend_port = 1"), "5:1", &["no port from 9 to 1"]);
    one(&format!("{PORT}handlers = []"), "5:1", &["have no number"]);
    one(
        &format!(
            "{PORT}start_port = 1\nend_port = 1000\n[[services.ports]]\nstart_port = 2000\nend_port = 2024"
        ),
        "8:1",
        &["more than 1024 ports"],
    );
    one("[[services]]\nports = [{ port = 1 }]", "3:1", &["'internal_port' is missing in [[services]]"]);
    one(SERVICE, "3:1", &["has no ports"]);
    one(&format!("{HTTP}processes = ['web']"), "4:14", &["a group of [processes], of which there is: app"]);
    one(&format!("{HTTP}force_https = true"), "4:15", &["no port of this app speaks it", "[[flyrun.tls]]"]);
    one(&format!("{PORT}port = 1\nforce_https = true"), "7:15", &["needs the handler \"http\""]);
    one(&format!("{PORT}port = 1\nhandlers = ['tls']"), "5:1", &["no certificate to show"]);
    one(&format!("{PORT}port = 1\nhandlers = ['http', 'proxy_proto']"), "7:12", &["cannot have both"]);
    one(
        &format!("{PORT}port = 1\nproxy_proto_options.version = 'v2'"),
        "7:1",
        &["needs the handler \"proxy_proto\""],
    );
    one(
        &format!("{HTTP}min_machines_running = 2"),
        "4:24",
        &["min_machines_running is 2, and max_machines 1"],
    );
    one(
        &format!("{HTTP}auto_stop_machines = 'suspend'\nauto_start_machines = false"),
        "5:23",
        &["nothing would start them again"],
    );
    one(
        &format!("{HTTP}auto_stop_machines = 'stop'\n{PORT}port = 1"),
        "5:1",
        &["auto_stop_machines differs from the service at line 3"],
    );
    one(
        "[mounts]\nsource = 'x'\ndestination = '/d'\n[flyrun]\nmax_machines = 2",
        "7:16",
        &["have a volume (line 3)"],
    );
    one(
        "[deploy]\nstrategy = 'bluegreen'\n[mounts]\nsource = 'x'\ndestination = '/d'",
        "4:12",
        &["bluegreen runs"],
    );
    one(
        "[processes]\na = ''\nb = ''\n[mounts]\nsource = 'x'\ndestination = '/d'\nprocesses = ['a', 'b']",
        "6:1",
        &["in the groups 'a' and 'b'"],
    );
    one("[[vm]]\n[[vm]]", "4:1", &["another [[vm]] for 'all groups'"]);
    one("[[metrics]]\nport = 1\n[[metrics]]\nport = 2", "5:1", &["another [[metrics]] for 'app'"]);
}

const ACME: &str = "acme.terms_of_service_agreed = true";

#[test]
fn a_certificate_is_ordered_only_where_that_can_succeed() {
    let named = "[flyrun]\nhostnames = ['shop.example.com']\n";
    assert_eq!(with(&format!("{HTTP}{named}{ACME}")), [""; 0]);
    one(&format!("{HTTP}[flyrun]\n{ACME}"), "5:1", &["the app has none", "hostnames = ["]);
    one(&format!("{HTTP}{named}acme = {{}}"), "6:8", &["'terms_of_service_agreed' is missing"]);
    one(&format!("{HTTP}{named}acme.terms_of_service_agreed = false"), "6:32", &["is false", "agreed to"]);
    for url in ["http://a/dir", "https://", "https:///a", "a"] {
        one(&format!("{HTTP}{named}{ACME}\nacme.directory = '{url}'"), "7:18", &["begins with https://"]);
    }
    for email in ["a", "a@", "@a", "mailto:a@b?cc=c", "a@b,c@d", "a b@c"] {
        one(&format!("{HTTP}{named}{ACME}\nacme.email = '{email}'"), "7:14", &["admin@example.com"]);
    }
    one(
        &format!("{PORT}port = 80\nhandlers = ['http']\n{named}{ACME}"),
        "10:1",
        &["no port has the handler"],
    );
    one(
        &format!("{PORT}port = 8443\nhandlers = ['tls']\n{named}{ACME}"),
        "10:1",
        &["looks at port 80", "Add one of these ports"],
    );
    let wildcard = "[flyrun]\nhostnames = ['shop.example.com', '*.shop.example.com']\n";
    one(
        &format!("{HTTP}{wildcard}{ACME}"),
        "5:34",
        &["'*.shop.example.com' takes a wildcard", "[[flyrun.tls]]"],
    );
    let files = "tls = { certificate = 'c', key = 'k' }";
    assert_eq!(with(&format!("{HTTP}{wildcard}{files}\n{ACME}")), [""; 0]);
    let many: Vec<_> = (0..101).map(|number| format!("'a{number}.example.com'")).collect();
    let many = format!("[flyrun]\nhostnames = [{}]\n", many.join(", "));
    one(&format!("{HTTP}{many}{ACME}"), "6:1", &["101 host names", "100 at most"]);
}

#[test]
fn proxies_in_front_are_named() {
    let proxies = |list: &str| with(&format!("[flyrun]\ntrusted_proxies = [{list}]"));
    assert_eq!(proxies("'10.0.0.0/8', '192.0.2.1', '2001:db8::/32', '::1', '::ffff:192.0.2.0/120'"), [""; 0]);
    for bad in ["10.0.0.0/33", "example.com", "10.0.0", "10.0.0.1:80", "", "::ffff:1.2.3.4/90"] {
        one(&format!("[flyrun]\ntrusted_proxies = ['{bad}']"), "4:20", &["an address or a range"]);
    }
    for everybody in ["0.0.0.0/0", "::/0", "::ffff:0.0.0.0/96"] {
        one(&format!("[flyrun]\ntrusted_proxies = ['{everybody}']"), "4:20", &["is everybody"]);
    }
    one("[flyrun]\naccept_proxy_protocol = true", "4:25", &["there are none", "trusted_proxies = ["]);
}

#[test]
fn everything_that_is_wrong_is_told_in_the_order_of_the_file() {
    let told =
        refusals("[http_service]\nforce_https = 1\ninternal_prt = 1\n[[vm]]\ncpus = 0\n[env]\nA = {}\n");
    let starts: Vec<_> = told.iter().map(|line| line.split(": ").next().unwrap_or_default()).collect();
    assert_eq!(
        starts,
        ["fly.toml:1:1", "fly.toml:1:1", "fly.toml:2:15", "fly.toml:3:1", "fly.toml:5:8", "fly.toml:7:5"]
    );
    assert!(
        told[0].contains("'app' is missing at the top level") && told[1].contains("no image to run"),
        "{told:#?}"
    );
}

#[test]
fn what_is_not_toml_is_told_with_its_places() {
    let told = refusals("app = \n[build\nimage = 'x'\na = 1\na = 2\n");
    assert!(told.len() >= 2 && told.iter().all(|line| line.contains("this is not TOML")), "{told:#?}");
}

#[test]
fn a_file_is_bounded_and_utf8() {
    let long = app::config::read("fly.toml", &vec![b'#'; app::config::MAX_FILE_BYTES + 1]).unwrap_err();
    assert_eq!(long.problems[0].message, "the file has more than 1024 KiB");
    let latin = app::config::read("fly.toml", b"app = '\xe4'").unwrap_err();
    assert_eq!(latin.problems[0].message, "the byte at offset 7 is not UTF-8");
    let many = app::config::read("fly.toml", "x1.y = 1\n".repeat(9000).as_bytes()).unwrap_err();
    assert!(many.problems.len() <= 50 && many.left_out > 8000);
}
