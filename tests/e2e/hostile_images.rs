//! Images that are small and become large, and registries that send flyrun where they cannot look themselves.

use std::fs;

use serde_json::json;
use tests::Flyrun;
use tests::flyrun::{Outcome, scratch};
use tests::image::{Layer, write_layout};
use tests::lab::{HOST, Lab};
use tests::tar::{Entry, Tar, kind};

/// Runs an image of busybox and one more layer where 256 MiB are allowed: 192 MiB of files, some 12,000 of them.
fn within_256_mib(layer: Layer) -> Outcome {
    let flyrun = Flyrun::fresh();
    let directory = scratch();
    let image = write_layout(directory.path(), &[Layer::busybox(), layer], &json!({}));
    let outcome = flyrun.run(&[&image, "/bin/echo", "it ran"]).env("FLYRUN_ROOTFS_MAX", "256m").end();
    let left: Vec<_> = flyrun.contents().into_iter().filter(|line| line.starts_with("rootfs/")).collect();
    assert!(left.is_empty() || outcome.code == 0, "left in the store: {left:?}");
    outcome
}

#[test]
fn a_layer_of_a_few_kilobytes_that_becomes_hundreds_of_megabytes_is_refused() {
    let bomb = Layer::zstd(&Tar::new().file("zeros", 0o644, &vec![0; 200 << 20]).finish());
    assert!(bomb.blob.len() < 64 << 10);
    within_256_mib(bomb).fails_clearly().complains_about("FLYRUN_ROOTFS_MAX allows 256 MiB");
}

#[test]
fn a_layer_with_more_entries_than_a_filesystem_has_inodes_is_refused() {
    let mut tar = Tar::new();
    for number in 0..20_000 {
        tar = tar.directory(&format!("{number}"));
    }
    within_256_mib(Layer::zstd(&tar.finish())).fails_clearly().complains_about("FLYRUN_ROOTFS_MAX");
}

#[test]
fn a_path_as_deep_as_linux_allows_is_made_and_a_deeper_one_is_refused_by_name() {
    let deep = |levels: usize| {
        let path = "d/".repeat(levels) + "file";
        Layer::gzip(&Tar::new().pax(&[("path", path.as_bytes())]).file("x", 0o644, b"x").finish())
    };
    within_256_mib(deep(2000)).code(0).prints("it ran");
    within_256_mib(deep(2100)).fails_clearly().complains_about("more than 4095 bytes");
}

#[test]
fn an_extended_header_of_the_size_of_a_disk_is_not_read() {
    let entry = Entry { name: "PaxHeaders/x", kind: kind::PAX, data: b"11 path=x\n", ..Entry::default() };
    within_256_mib(Layer::gzip(&Tar::new().announce(&entry, 200 << 20).finish())).fails_clearly();
}

#[test]
fn configurations_that_are_bombs_are_refused_before_anything_starts() {
    let flyrun = Flyrun::fresh();
    let many: Vec<_> = (0..5000).map(|number| format!("V{number}=x")).collect();
    for (config, reason) in [
        (json!({ "Env": many }), "(number of environment variables) exceeds a limit"),
        (json!({ "Labels": { "x": "y".repeat(9 << 20) } }), "exceeds a limit"),
        (json!({ "Cmd": ["a\0b"] }), "NUL"),
    ] {
        let directory = scratch();
        let image = write_layout(directory.path(), &[Layer::busybox()], &config);
        flyrun.run(&[&image, "/bin/echo"]).end().fails_clearly().complains_about(reason);
    }
    // What is allowed, and more than a process can be given: it does not start, and the machine ends.
    let large: Vec<_> = (0..4000).map(|number| format!("V{number}={}", "x".repeat(1000))).collect();
    let directory = scratch();
    let image = write_layout(directory.path(), &[Layer::busybox()], &json!({ "Env": large }));
    let outcome = flyrun.run(&[&image, "/bin/echo"]).end();
    assert!(matches!(outcome.code, 125 | 126), "{}: {}", outcome.code, outcome.errors());
    assert!(!outcome.errors().contains("panicked"), "{}", outcome.errors());
}

/// A registry, or whoever it sends us to, that answers each request with what follows the path's first word in its file of answers,
/// and writes down who asked.
const SERVER: &str = r#"
import http.server, sys
address, port, location, log = sys.argv[1:]
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        open(log, "a").write(self.path + "\n")
        if location.startswith("realm="):
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Bearer realm="' + location[6:] + '"')
        elif location:
            self.send_response(307)
            self.send_header("Location", location)
        else: self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *words): pass
http.server.HTTPServer((address, int(port)), Handler).serve_forever()
"#;

#[test]
fn a_registry_cannot_have_flyrun_ask_what_only_this_host_reaches() {
    let lab = Lab::new("");
    let directory = scratch();
    let path = |name: &str| directory.path().join(name).display().to_string();
    fs::write(path("server"), SERVER).unwrap();
    let (secret_log, server) = (path("secret.log"), path("server"));
    let start = |address: &str, port: &str, location: &str, log: &str| {
        let background = lab.on_host(&["python3", &server, address, port, location, log]);
        lab.wait_for(&format!("ss -lnt | grep {address}:{port}"));
        background
    };
    let _secret = start("127.0.0.1", "6000", "", &secret_log);
    let pull = |port: &str, allowed: &str| {
        let name = format!("{HOST}:{port}/x");
        lab.within(|| {
            let flyrun = Flyrun::shared();
            flyrun.command(&["pull", "--plain-http", &name]).env("FLYRUN_PULL_REDIRECTS", allowed).end()
        })
    };
    let asked = || fs::read_to_string(&secret_log).unwrap_or_default();
    for (port, to) in [
        ("5001", "http://127.0.0.1:6000/secret"),
        ("5002", "http://localhost:6000/secret"),
        ("5003", "http://[::ffff:127.0.0.1]:6000/secret"),
        ("5004", "realm=http://127.0.0.1:6000/token"),
        ("5005", "realm=http://localhost:6000/token"),
    ] {
        let _registry = start(HOST, port, to, &path("registry.log"));
        pull(port, "").fails_clearly().complains_about("is this host itself");
        assert_eq!(asked(), "", "{to} was asked");
        if port == "5002" {
            pull(port, "localhost").fails_clearly();
            assert_eq!(asked(), "/secret\n", "allowed, it is asked");
            fs::remove_file(&secret_log).unwrap();
        }
    }
    // Another port of its own host is the registry's.
    let storage_log = path("storage.log");
    let _storage = start(HOST, "6001", "", &storage_log);
    let _registry = start(HOST, "5006", &format!("http://{HOST}:6001/layer"), &path("registry.log"));
    pull("5006", "").fails_clearly().complains_about("has no image");
    assert_eq!(fs::read_to_string(&storage_log).unwrap(), "/layer\n");
}
