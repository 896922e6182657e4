//! Images from a real registry.

use tests::Flyrun;
use tests::flyrun::scratch;
use tests::image::{Layer, layout, write_layout};
use tests::registry::Registry;
use tests::tar::Tar;

#[test]
fn a_pushed_image_is_pulled_once_and_then_costs_no_request() {
    let flyrun = Flyrun::fresh();
    let registry = Registry::start();
    registry.push(&layout("busybox"), "tools/busybox:1");
    let name = registry.name("tools/busybox:1");
    flyrun.run(&[&name, "echo", "pulled"]).end().code(0).prints("pulled");
    let requests = registry.log().lines().count();
    flyrun.run(&[&name, "echo", "cached"]).end().code(0).prints("cached");
    assert_eq!(registry.log().lines().count(), requests, "{}", registry.log());
    drop(registry);
    flyrun.run(&[&name, "echo", "without it"]).end().code(0).prints("without it");
}

#[test]
fn images_that_share_layers_fetch_them_once() {
    let flyrun = Flyrun::fresh();
    let registry = Registry::start();
    let (first, second) = (scratch(), scratch());
    let common = Layer::busybox();
    let extra = Layer::zstd(&Tar::new().file("extra", 0o644, b"extra\n").finish());
    let config = serde_json::json!({ "Cmd": ["/bin/cat", "/extra"] });
    registry.push(&write_layout(first.path(), std::slice::from_ref(&common), &config), "one");
    registry.push(&write_layout(second.path(), &[common.clone(), extra], &config), "two");
    flyrun.command(&["pull", "--no-unpack", &registry.name("one")]).end().code(0);
    flyrun.run(&[&registry.name("two")]).end().code(0).prints("extra");
    let path = format!("/v2/two/blobs/sha256:{}", common.digest);
    let fetched = |line: &str| line.contains("GET") && line.contains(&path);
    assert!(!registry.log().lines().any(fetched), "{}", registry.log());
}

#[test]
fn a_private_registry_takes_docker_s_credentials() {
    let flyrun = Flyrun::fresh();
    let registry = Registry::start_private("ada", "lovelace");
    registry.push(&layout("busybox"), "private/busybox");
    let name = registry.name("private/busybox");
    flyrun.run(&[&name, "true"]).env("DOCKER_CONFIG", "/nonexistent").end().fails_clearly();

    let directory = scratch();
    let auth = "YWRhOmxvdmVsYWNl"; // ada:lovelace in base64
    let config = serde_json::json!({ "auths": { registry.address(): { "auth": auth } } });
    std::fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
    flyrun
        .run(&[&name, "echo", "let in"])
        .env("DOCKER_CONFIG", directory.path())
        .end()
        .code(0)
        .prints("let in");
}

#[test]
fn what_the_registry_lacks_is_named() {
    let flyrun = Flyrun::fresh();
    let registry = Registry::start();
    flyrun.run(&[&registry.name("no/such:tag"), "true"]).end().fails_clearly().complains_about("no/such");
    let name = registry.name("gone");
    drop(registry);
    flyrun.run(&[&name, "true"]).end().fails_clearly().complains_about("127.0.0.1");
}

#[test]
fn a_blob_that_changed_at_the_registry_is_refused_and_not_kept() {
    let flyrun = Flyrun::fresh();
    let registry = Registry::start();
    let directory = scratch();
    let layer = Layer::busybox();
    registry.push(
        &write_layout(directory.path(), std::slice::from_ref(&layer), &serde_json::json!({})),
        "flipped",
    );
    let blob = registry.blob(&layer.digest);
    let mut bytes = std::fs::read(&blob).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&blob, &bytes).unwrap();
    flyrun
        .run(&[&registry.name("flipped"), "/bin/true"])
        .end()
        .fails_clearly()
        .complains_about("is damaged or forged");
    let kept: Vec<_> = flyrun.contents().into_iter().filter(|line| line.contains(&layer.digest)).collect();
    assert!(kept.is_empty(), "{kept:?}");
    bytes[middle] ^= 1;
    std::fs::write(&blob, &bytes).unwrap();
    flyrun.run(&[&registry.name("flipped"), "/bin/echo", "whole"]).end().code(0).prints("whole");
}

#[test]
fn a_digest_names_an_image_exactly() {
    let flyrun = Flyrun::fresh();
    let registry = Registry::start();
    registry.push(&layout("busybox"), "busybox");
    let mut pulled = flyrun.command(&["pull", "--json", &registry.name("busybox")]).end().code(0);
    let digest = pulled.json()["manifest_digest"].as_str().unwrap().to_string();
    let exact = registry.name(&format!("busybox@{digest}"));
    flyrun.run(&[&exact, "echo", "exact"]).end().code(0).prints("exact");
    let other = registry.name(&format!("busybox@sha256:{}", "0".repeat(64)));
    flyrun.run(&[&other, "true"]).end().fails_clearly();
}
