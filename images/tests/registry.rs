//! A real registry: Debian's docker-registry, filled by skopeo.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "clippy exempts tests, but not their helpers"
)]

use std::{
    env, fs,
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
};

use images::{
    Auth, Compression, Digest, Error, Event, Image, NoProgress, Progress, PruneOptions, PullOptions,
    PullPolicy, Reference, Store, pull,
};

mod common;
use common::{Layout, Log, Registry, digest_of, noise, text, umoci_image};

fn get(store: &Store, name: &str, options: &PullOptions) -> images::Result<Image> {
    pull(store, &Reference::parse(name).unwrap(), options, &NoProgress)
}

fn assert_whole(image: &Image) {
    for layer in &image.layers {
        assert_eq!(Digest::of(&fs::read(&layer.path).unwrap()), layer.digest);
    }
}

/// A registry with the image `big` of this many layers of a megabyte.
fn registry_with_big(layers: u64) -> (Registry, Vec<Vec<u8>>) {
    let directory = tempfile::tempdir().unwrap();
    let mut layout = Layout::new(directory.path().join("layout"));
    let layers: Vec<_> = (1..=layers).map(|seed| noise(seed, 1 << 20)).collect();
    layout.tag(layout.image("amd64", &layers), "big");
    let registry = Registry::start();
    registry.push(&format!("oci:{}:big", text(&layout.path)), "big", &["--preserve-digests"]);
    (registry, layers)
}

#[test]
fn an_image_by_umoci_is_pulled_in_every_format_and_compression() {
    let directory = tempfile::tempdir().unwrap();
    let layout = directory.path().join("layout");
    umoci_image(&layout, "v1", &[("a", b"one"), ("b", &noise(1, 300_000)), ("c", b"three")]);
    let from = format!("oci:{}:v1", text(&layout));
    let registry = Registry::start();
    registry.push(&from, "x:oci", &[]);
    registry.push(&from, "x:docker", &["--format", "v2s2"]);
    let store = Store::open(directory.path().join("store"));
    let local = get(&store, &from, &PullOptions::default()).unwrap();
    for tag in ["oci", "docker"] {
        let image = get(&store, &registry.name(&format!("x:{tag}")), &PullOptions::default()).unwrap();
        assert_whole(&image);
        assert_eq!((image.chain_id, image.layers.len()), (local.chain_id, 3), "{tag}");
        assert!(image.layers.iter().all(|layer| layer.compression == Compression::Gzip));
        assert_eq!(image.config.entrypoint, ["/bin/sh"]);
    }
    // skopeo 1.9 compresses only what is not compressed, and takes what a registry has already: so the layers go through a
    // directory unpacked, to another registry.
    let plain = format!("dir:{}", text(&directory.path().join("plain")));
    common::skopeo(&["copy", "-q", "--dest-decompress", &from, &plain]);
    let registry = Registry::start();
    registry.push(&plain, "x:zstd", &["--dest-compress-format", "zstd"]);
    let image = get(&store, &registry.name("x:zstd"), &PullOptions::default()).unwrap();
    assert_whole(&image);
    assert!(image.layers.iter().all(|layer| layer.compression == Compression::Zstd), "{:?}", image.layers);
    assert_eq!(image.chain_id, local.chain_id);
}

#[test]
fn a_cached_image_needs_no_registry_and_always_asks_it() {
    let (registry, _) = registry_with_big(2);
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path());
    let name = registry.name("big");
    let image = get(&store, &name, &PullOptions::default()).unwrap();
    let by_digest = format!("{}@{}", registry.name("big"), image.manifest_digest);
    let pinned = get(&store, &by_digest, &PullOptions::default()).unwrap();
    assert_eq!(pinned.chain_id, image.chain_id);
    let log = Log::default();
    let always = PullOptions { policy: PullPolicy::Always, retries: 0, ..PullOptions::default() };
    pull(&store, &Reference::parse(&name).unwrap(), &always, &log).unwrap();
    assert_eq!((log.count("LayerExists"), log.count("LayerStarted")), (2, 0));
    drop(registry);
    assert_eq!(get(&store, &name, &PullOptions::default()).unwrap(), image);
    let error = get(&store, &name, &always).unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
}

#[test]
fn the_platform_of_an_index_is_chosen() {
    let directory = tempfile::tempdir().unwrap();
    let mut layout = Layout::new(directory.path().join("layout"));
    let images = [layout.image("arm64", &[noise(1, 100)]), layout.image("amd64", &[noise(2, 100)])];
    layout.tag(layout.index(&images), "both");
    let registry = Registry::start();
    registry.push(&format!("oci:{}:both", text(&layout.path)), "both", &["--all", "--preserve-digests"]);
    let store = Store::open(directory.path().join("store"));
    let name = registry.name("both");
    let image = get(&store, &name, &PullOptions::default()).unwrap();
    assert_eq!(image.manifest_digest, digest_of(&images[1]));
    let arm = PullOptions { platform: "linux/arm64".parse().unwrap(), ..PullOptions::default() };
    assert_eq!(get(&store, &name, &arm).unwrap().manifest_digest, digest_of(&images[0]));
    let riscv = PullOptions { platform: "linux/riscv64".parse().unwrap(), ..PullOptions::default() };
    let error = get(&store, &name, &riscv).unwrap_err().to_string();
    assert!(error.ends_with("has no image for linux/riscv64; it has linux/arm64, linux/amd64"), "{error}");
}

#[test]
fn a_missing_image_is_called_missing() {
    let registry = Registry::start();
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path());
    let error = get(&store, &registry.name("nothing"), &PullOptions::default()).unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
}

#[test]
fn a_password_opens_a_registry_that_wants_one() {
    let directory = tempfile::tempdir().unwrap();
    let mut layout = Layout::new(directory.path().join("layout"));
    layout.tag(layout.image("amd64", &[noise(1, 1000)]), "x");
    let registry = Registry::start_with_password();
    registry.push(&format!("oci:{}:x", text(&layout.path)), "x", &["--dest-creds", "alice:secret"]);
    let store = Store::open(directory.path().join("store"));
    let with = |auth: Auth| PullOptions { auth, ..PullOptions::default() };
    let basic = |password: &str| Auth::Basic { username: "alice".into(), password: password.into() };
    let name = registry.name("x");
    let error = get(&store, &name, &with(Auth::Anonymous)).unwrap_err().to_string();
    assert!(error.contains("without credentials") && error.contains("docker login"), "{error}");
    let error = get(&store, &name, &with(basic("wrong"))).unwrap_err().to_string();
    assert!(error.contains("with the given user and password") && !error.contains("wrong"), "{error}");
    assert_whole(&get(&store, &name, &with(basic("secret"))).unwrap());
}

/// docker's credential file and helpers are found through the environment, so this needs a process of its own.
#[test]
fn credentials_come_from_dockers_file_and_helpers() {
    let directory = tempfile::tempdir().unwrap();
    let mut layout = Layout::new(directory.path().join("layout"));
    layout.tag(layout.image("amd64", &[noise(1, 1000)]), "x");
    let registry = Registry::start_with_password();
    registry.push(&format!("oci:{}:x", text(&layout.path)), "x", &["--dest-creds", "alice:secret"]);
    let host = registry.name("");
    let host = host.trim_end_matches('/');
    let docker = directory.path().join("docker");
    fs::create_dir(&docker).unwrap();
    let helper = docker.join("docker-credential-test");
    fs::write(&helper, "#!/bin/sh\nread server\necho '{\"Username\":\"alice\",\"Secret\":\"secret\"}'\n")
        .unwrap();
    common::run("coreutils", "chmod", &["+x", text(&helper)]);
    let file = format!(r#"{{"auths":{{"{host}":{{"auth":"YWxpY2U6c2VjcmV0"}}}}}}"#);
    let helpers = format!(r#"{{"credHelpers":{{"{host}":"test"}}}}"#);
    for (config, succeeds) in [(file, true), (helpers, true), ("{}".into(), false)] {
        fs::write(docker.join("config.json"), &config).unwrap();
        let store = directory.path().join("store");
        let _ = fs::remove_dir_all(&store);
        let path = format!("{}:{}", text(&docker), env::var("PATH").unwrap());
        let mut child = child(&store, &registry.name("x"));
        let child = child
            .env("DOCKER_CONFIG", &docker)
            .env("PATH", path)
            .env_remove("REGISTRY_AUTH_FILE")
            .env_remove("XDG_RUNTIME_DIR");
        assert_eq!(
            child.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success(),
            succeeds,
            "{config}"
        );
    }
}

#[test]
fn a_certificate_must_be_trusted_even_on_loopback() {
    let directory = tempfile::tempdir().unwrap();
    let mut layout = Layout::new(directory.path().join("layout"));
    layout.tag(layout.image("amd64", &[noise(1, 1000)]), "x");
    let registry = Registry::start_with_tls();
    registry.push(&format!("oci:{}:x", text(&layout.path)), "x", &[]);
    let mut pulling = child(&directory.path().join("store"), &registry.name("x"));
    let output = pulling.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && stderr.contains("certificate"), "{stderr}");
    let output =
        pulling.env("SSL_CERT_FILE", registry.directory.path().join("certificate.pem")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// This test binary again, as a process that pulls `name` into the store at `store`.
fn child(store: &std::path::Path, name: &str) -> Command {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "child_that_pulls", "--ignored", "--nocapture"]);
    command.env("TEST_STORE", store).env("TEST_NAME", name);
    command
}

/// Tells each layer that is done.
struct Tell;

impl Progress for Tell {
    fn event(&self, event: Event<'_>) {
        if !matches!(event, Event::LayerProgress { .. }) {
            println!("{event:?}");
        }
    }
}

#[test]
#[ignore = "run by the tests that need a process of their own"]
fn child_that_pulls() {
    let store = Store::open(env::var("TEST_STORE").unwrap());
    let name = Reference::parse(&env::var("TEST_NAME").unwrap()).unwrap();
    let options = PullOptions { parallelism: 2, retries: 0, ..PullOptions::default() };
    pull(&store, &name, &options, &Tell).unwrap();
}

#[test]
fn killed_at_any_point_it_leaves_a_store_that_the_next_pull_completes() {
    let (registry, layers) = registry_with_big(8);
    for done in [0, 1, 3, 6] {
        let directory = tempfile::tempdir().unwrap();
        let mut process =
            child(directory.path(), &registry.name("big")).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let wanted = if done == 0 { "LayerStarted" } else { "LayerDone" };
        lines.map(Result::unwrap).filter(|line| line.starts_with(wanted)).take(done.max(1)).for_each(drop);
        process.kill().unwrap();
        process.wait().unwrap();
        let store = Store::open(directory.path());
        for entry in fs::read_dir(directory.path().join("blobs/sha256")).unwrap() {
            let entry = entry.unwrap();
            let got = Digest::of(&fs::read(entry.path()).unwrap()).hex();
            assert_eq!(entry.file_name().to_str().unwrap(), got, "a visible blob is whole");
        }
        let log = Log::default();
        let image =
            pull(&store, &Reference::parse(&registry.name("big")).unwrap(), &PullOptions::default(), &log)
                .unwrap();
        assert_whole(&image);
        assert!(log.count("LayerExists") >= done, "{:?}", log.lines());
        assert_eq!(image.layers.len(), layers.len());
        assert_eq!(
            store.prune(&PruneOptions::default()).unwrap().leftovers,
            0,
            "the next pull takes up everything"
        );
    }
}

#[test]
fn a_blob_continues_where_it_broke_off_and_starts_over_when_that_was_wrong() {
    let (registry, layers) = registry_with_big(1);
    let digest = Digest::of(&layers[0]);
    let mut wrong = layers[0][..400_000].to_vec();
    wrong[7] ^= 1;
    for (left, starts) in [(layers[0][..400_000].to_vec(), 1), (wrong, 2)] {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path());
        fs::create_dir_all(directory.path().join("tmp")).unwrap();
        fs::write(directory.path().join("tmp").join(format!("blob-{}", digest.hex())), &left).unwrap();
        let log = Log::default();
        let image =
            pull(&store, &Reference::parse(&registry.name("big")).unwrap(), &PullOptions::default(), &log)
                .unwrap();
        assert_whole(&image);
        assert_eq!(log.count("LayerStarted"), starts, "{:?}", log.lines());
        assert!(log.lines().iter().any(|line| line.contains("resumed_from: 400000")));
    }
}

#[test]
fn several_processes_and_threads_fetch_each_blob_once() {
    let (registry, layers) = registry_with_big(6);
    let directory = tempfile::tempdir().unwrap();
    let name = registry.name("big");
    let mut processes: Vec<_> =
        (0..2).map(|_| child(directory.path(), &name).stdout(Stdio::piped()).spawn().unwrap()).collect();
    let log = Log::default();
    let store = Store::open(directory.path());
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                assert_whole(
                    &pull(&store, &Reference::parse(&name).unwrap(), &PullOptions::default(), &log).unwrap(),
                )
            });
        }
    });
    let mut done = log.count("LayerDone");
    for process in &mut processes {
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        done += lines.map(Result::unwrap).filter(|line| line.starts_with("LayerDone")).count();
        assert!(process.wait().unwrap().success());
    }
    assert_eq!(done, layers.len());
    assert_eq!(store.list().unwrap().len(), 1);
}

#[test]
fn a_full_disk_is_named_and_the_store_stays_usable() {
    let (registry, _) = registry_with_big(4);
    let directory = tempfile::tempdir().unwrap();
    let pulling = child(directory.path(), &registry.name("big"));
    // A disk of 2 MB that only this process sees; the second pull is the last word on the state that the first one left.
    let script = "mount -t tmpfs -o size=2m none \"$TEST_STORE\" || exit 99; \"$0\" \"$@\" && exit 98; \
                  mount -o remount,size=20m \"$TEST_STORE\" || exit 97; exec \"$0\" \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["-r", "-m", "sh", "-c", script]).arg(pulling.get_program()).args(pulling.get_args());
    command.envs(pulling.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let output = command.output().unwrap_or_else(|error| panic!("unshare ({error}): apt install util-linux"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {stderr}", output.status);
    assert!(stderr.contains("NoSpace"), "{stderr}");
}

#[test]
fn damage_in_the_registry_is_found() {
    let (registry, layers) = registry_with_big(3);
    let path = registry.blob_path(&Digest::of(&layers[1]));
    let mut flipped = layers[1].clone();
    flipped[1000] ^= 0x80;
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path());
    let options = PullOptions { retries: 0, ..PullOptions::default() };
    for damaged in [&flipped[..], &layers[1][..500_000], &[&layers[1][..], b"more"].concat()] {
        fs::write(&path, damaged).unwrap();
        let error = get(&store, &registry.name("big"), &options).unwrap_err();
        assert!(matches!(error, Error::DigestMismatch { .. } | Error::SizeMismatch { .. }), "{error}");
        assert!(store.list().unwrap().is_empty());
        assert!(!directory.path().join("blobs/sha256").join(Digest::of(&layers[1]).hex()).exists());
    }
    fs::write(&path, &layers[1]).unwrap();
    assert_whole(&get(&store, &registry.name("big"), &options).unwrap());
}

#[test]
fn prune_leaves_a_pull_under_way_alone() {
    struct PruneMeanwhile<'a>(&'a Store, AtomicBool);
    impl Progress for PruneMeanwhile<'_> {
        fn event(&self, event: Event<'_>) {
            if matches!(event, Event::LayerDone { .. }) {
                let report = self.0.prune(&PruneOptions { all: true, keep: vec![] }).unwrap();
                assert!(report.busy && report.blobs.is_empty(), "{report:?}");
                self.1.store(true, Ordering::Relaxed);
            }
        }
    }
    let (registry, _) = registry_with_big(3);
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path());
    let progress = PruneMeanwhile(&store, AtomicBool::new(false));
    let image =
        pull(&store, &Reference::parse(&registry.name("big")).unwrap(), &PullOptions::default(), &progress)
            .unwrap();
    assert!(progress.1.into_inner());
    assert_whole(&image);
}
