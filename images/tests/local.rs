//! Images from layouts and archives, made by the tools that people use, and by those who mean harm.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "clippy exempts tests, but not their helpers"
)]

use std::{
    env, fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixListener,
    path::Path,
    process::Command,
};

use images::{
    Digest, Error, Image, NoProgress, PruneOptions, PullOptions, PullPolicy, Reference, RootfsSlot, Store,
    pull,
};
use proptest::prelude::*;

mod common;
use common::{Layout, digest_of, noise, skopeo, text, umoci_image};

fn get(store: &Store, name: &str) -> images::Result<Image> {
    pull(store, &Reference::parse(name).unwrap(), &PullOptions::default(), &NoProgress)
}

fn assert_whole(image: &Image) {
    for layer in &image.layers {
        assert_eq!(Digest::of(&fs::read(&layer.path).unwrap()), layer.digest);
    }
}

fn temporary_files(store: &Store) -> usize {
    fs::read_dir(store.root().join("tmp")).map_or(0, Iterator::count)
}

#[test]
fn one_image_is_the_same_from_every_kind_of_source() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    umoci_image(&at("layout"), "v1", &[("a", b"one"), ("b", b"two"), ("c", &noise(1, 300_000))]);
    let layout = format!("oci:{}:v1", text(&at("layout")));
    skopeo(&["copy", "-q", &layout, &format!("oci-archive:{}:v1", text(&at("oci.tar")))]);
    skopeo(&["copy", "-q", &layout, &format!("docker-archive:{}:busybox:v1", text(&at("docker.tar")))]);
    let store = Store::open(at("store"));
    let from_layout = get(&store, &layout).unwrap();
    assert_eq!(from_layout.layers.len(), 3);
    assert_eq!(from_layout.config.entrypoint, ["/bin/sh"]);
    assert_eq!(from_layout.config.env, ["GREETING=hello world"]);
    assert_eq!(
        (from_layout.config.user.as_str(), from_layout.config.working_dir.as_str()),
        ("nobody:nogroup", "/srv")
    );
    for name in [
        text(&at("layout")).into(),
        format!("oci-archive:{}", text(&at("oci.tar"))),
        text(&at("oci.tar")).into(),
        format!("docker-archive:{}", text(&at("docker.tar"))),
        format!("docker-archive:{}:docker.io/library/busybox:v1", text(&at("docker.tar"))),
        text(&at("docker.tar")).to_string(),
    ] {
        let name: String = name;
        let image = get(&store, &name).unwrap();
        assert_whole(&image);
        assert_eq!((image.chain_id, &image.config), (from_layout.chain_id, &from_layout.config), "{name}");
        assert_eq!(store.find(&Reference::parse(&name).unwrap()).unwrap(), Some(image));
    }
    assert_eq!(store.list().unwrap().len(), 7);
    assert_eq!(temporary_files(&store), 0);
}

#[test]
fn a_layout_that_changes_is_read_again() {
    let directory = tempfile::tempdir().unwrap();
    let mut layout = Layout::new(directory.path().join("layout"));
    layout.tag(layout.image("amd64", &[noise(1, 10)]), "x");
    let name = format!("oci:{}:x", text(&layout.path));
    let store = Store::open(directory.path().join("store"));
    let first = get(&store, &name).unwrap();
    fs::remove_file(layout.path.join("index.json")).unwrap();
    let mut layout = Layout::new(layout.path);
    layout.tag(layout.image("amd64", &[noise(2, 10)]), "x");
    assert_eq!(store.find(&Reference::parse(&name).unwrap()).unwrap(), None);
    let second = get(&store, &name).unwrap();
    assert_ne!(first.chain_id, second.chain_id);
}

#[test]
fn the_platform_is_chosen_and_the_others_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let mut layout = Layout::new(directory.path().join("layout"));
    let images = [layout.image("arm64", &[noise(1, 10)]), layout.image("amd64", &[noise(2, 10)])];
    layout.tag(layout.index(&images), "both");
    layout.tag(layout.index(&images[..1]), "foreign");
    let store = Store::open(directory.path().join("store"));
    let image = get(&store, &format!("oci:{}:both", text(&layout.path))).unwrap();
    assert_eq!(image.manifest_digest, digest_of(&images[1]));
    let error = get(&store, &format!("oci:{}:foreign", text(&layout.path))).unwrap_err().to_string();
    assert!(error.ends_with("no image for linux/amd64; it has linux/arm64"), "{error}");
    let error = get(&store, text(&layout.path)).unwrap_err();
    assert!(
        matches!(&error, Error::TagNeeded { available, .. } if available == &["both", "foreign"]),
        "{error}"
    );
    let error = get(&store, &format!("oci:{}:none", text(&layout.path))).unwrap_err();
    assert!(matches!(error, Error::NoSuchTag { .. }));
}

#[test]
fn damaged_layers_are_refused_and_leave_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let mut layout = Layout::new(directory.path().join("layout"));
    let layer = noise(1, 100_000);
    layout.tag(layout.image("amd64", std::slice::from_ref(&layer)), "x");
    let name = format!("oci:{}:x", text(&layout.path));
    let store = Store::open(directory.path().join("store"));
    let path = layout.blob_path(&Digest::of(&layer));
    let mut flipped = layer.clone();
    flipped[77_777] ^= 1;
    fs::write(&path, &flipped).unwrap();
    assert!(matches!(get(&store, &name), Err(Error::DigestMismatch { .. })));
    fs::write(&path, &layer[..50_000]).unwrap();
    assert!(matches!(get(&store, &name), Err(Error::SizeMismatch { .. })));
    fs::remove_file(&path).unwrap();
    assert!(get(&store, &name).unwrap_err().to_string().contains("is not in"));
    assert!(store.list().unwrap().is_empty());
    assert_eq!(fs::read_dir(store.root().join("blobs/sha256")).unwrap().count(), 0);
    fs::write(&path, &layer).unwrap();
    assert_whole(&get(&store, &name).unwrap());
    assert_eq!(temporary_files(&store), 0);
}

#[test]
fn a_fifo_in_a_layout_does_not_hang() {
    let directory = tempfile::tempdir().unwrap();
    let mut layout = Layout::new(directory.path().join("layout"));
    let layer = noise(1, 100);
    layout.tag(layout.image("amd64", std::slice::from_ref(&layer)), "x");
    let path = layout.blob_path(&Digest::of(&layer));
    fs::remove_file(&path).unwrap();
    common::run("coreutils", "mkfifo", &[text(&path)]);
    let store = Store::open(directory.path().join("store"));
    let error = get(&store, &format!("oci:{}:x", text(&layout.path))).unwrap_err().to_string();
    assert!(error.contains("not a regular file"), "{error}");
}

/// A tar of these files and symbolic links, as docker before version 25 wrote it.
fn docker_tar(path: &Path, files: &[(&str, &[u8])], links: &[(&str, &str)]) {
    let mut tar = tar::Builder::new(fs::File::create(path).unwrap());
    for (name, contents) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(contents.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, *contents).unwrap();
    }
    for (name, target) in links {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        tar.append_link(&mut header, name, target).unwrap();
    }
    tar.into_inner().unwrap().flush().unwrap();
}

fn config_of(layers: &[&[u8]]) -> Vec<u8> {
    let diff_ids: Vec<_> = layers.iter().map(|layer| Digest::of(layer)).collect();
    serde_json::json!({"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": diff_ids}})
        .to_string()
        .into()
}

#[test]
fn old_archives_with_linked_layers_and_several_images_are_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("saved.tar");
    let (one, two) = (noise(1, 5000), noise(2, 5000));
    let manifest = r#"[{"Config":"c1.json","RepoTags":["one:latest"],"Layers":["a/layer.tar","b/layer.tar"]},
        {"Config":"c2.json","RepoTags":null,"Layers":["x/layer.tar"]},
        {"Config":"c3.json","RepoTags":["out:1"],"Layers":["out/layer.tar"]}]"#;
    let files: [(&str, &[u8]); 6] = [
        ("a/layer.tar", &one),
        ("x/layer.tar", &two),
        ("c1.json", &config_of(&[&one, &one])),
        ("c2.json", &config_of(&[&two])),
        ("c3.json", &config_of(&[b"root:x:0:0"])),
        ("manifest.json", manifest.as_bytes()),
    ];
    docker_tar(&path, &files, &[("b/layer.tar", "../a/layer.tar"), ("out/layer.tar", "../../../etc/passwd")]);
    let store = Store::open(directory.path().join("store"));
    let image = get(&store, &format!("docker-archive:{}:one", text(&path))).unwrap();
    assert_eq!(image.layers.iter().map(|layer| layer.digest).collect::<Vec<_>>(), [Digest::of(&one); 2]);
    let error = get(&store, text(&path)).unwrap_err();
    assert!(matches!(&error, Error::TagNeeded { available, .. } if available.len() == 2), "{error}");
    let error = get(&store, &format!("docker-archive:{}:out:1", text(&path))).unwrap_err().to_string();
    assert!(error.contains("is missing"), "{error}");
}

#[test]
fn a_layer_that_is_not_its_diff_id_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("saved.tar");
    let manifest = br#"[{"Config":"c","RepoTags":[],"Layers":["l"]}]"#;
    docker_tar(
        &path,
        &[("l", b"forged"), ("c", &config_of(&[b"promised"])), ("manifest.json", manifest)],
        &[],
    );
    let store = Store::open(directory.path().join("store"));
    assert!(matches!(get(&store, text(&path)), Err(Error::Malformed { .. })));
    assert!(store.list().unwrap().is_empty());
}

#[test]
fn what_is_never_pulled_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path());
    let options = PullOptions { policy: PullPolicy::Never, ..PullOptions::default() };
    let error = pull(&store, &Reference::parse("alpine").unwrap(), &options, &NoProgress).unwrap_err();
    assert!(
        matches!(&error, Error::NotInStore { name } if name == "docker.io/library/alpine:latest"),
        "{error}"
    );
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "looking makes nothing");
}

fn store_with_image(directory: &Path, seed: u64) -> (Store, Image, String) {
    let mut layout = Layout::new(directory.join(format!("layout{seed}")));
    layout.tag(layout.image("amd64", &[noise(0, 1000), noise(seed, 1000)]), "x");
    let store = Store::open(directory.join("store"));
    let name = format!("oci:{}:x", text(&layout.path));
    let image = get(&store, &name).unwrap();
    (store, image, name)
}

fn unpack(store: &Store, image: &Image) -> images::RootfsLease {
    match store.begin_rootfs(&image.chain_id, &NoProgress).unwrap() {
        RootfsSlot::Ready(lease) => lease,
        RootfsSlot::Draft(draft) => {
            assert!(!draft.path().starts_with(store.root().join("rootfs")));
            draft.commit().unwrap()
        }
    }
}

#[test]
fn a_root_filesystem_is_made_once_and_held_while_it_is_used() {
    let directory = tempfile::tempdir().unwrap();
    let (store, image, name) = store_with_image(directory.path(), 1);
    drop(store.begin_rootfs(&image.chain_id, &NoProgress).unwrap());
    assert_eq!(store.rootfs(&image.chain_id), None, "a draft that is given up leaves nothing");
    assert!(store.hold_rootfs(&image.chain_id).unwrap().is_none());
    let lease = unpack(&store, &image);
    assert!(matches!(store.begin_rootfs(&image.chain_id, &NoProgress).unwrap(), RootfsSlot::Ready(_)));
    assert!(store.list().unwrap()[0].in_use);
    assert!(matches!(store.remove(&name, &[]), Err(Error::InUse { .. })));
    let report = store.prune(&PruneOptions { all: true, keep: vec![] }).unwrap();
    assert!(report.images.is_empty() && report.rootfs.is_empty(), "{report:?}");
    drop(lease);
    assert!(
        matches!(store.remove(&name, &[image.chain_id]), Err(Error::InUse { .. })),
        "a stopped machine keeps it"
    );
    let report = store.remove(&name, &[]).unwrap();
    assert_eq!((report.images.len(), report.rootfs, report.busy), (1, vec![image.chain_id], false));
    assert_eq!(report.blobs.len(), 4, "two layers, a configuration and a manifest");
    assert!(store.list().unwrap().is_empty());
}

#[test]
fn a_root_filesystem_from_elsewhere_is_taken_in_once_with_its_time() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path().join("store"));
    let id = images::Digest::of(b"id");
    let old = std::time::UNIX_EPOCH + std::time::Duration::from_nanos(1_234_567_891_234_567_890);
    let path = |name: &str| directory.path().join("store").join(name);
    for name in ["one", "two"] {
        fs::create_dir_all(path("")).unwrap();
        fs::write(path(name), name).unwrap();
        fs::File::options().write(true).open(path(name)).unwrap().set_modified(old).unwrap();
        let lease = store.adopt_rootfs(&id, &path(name)).unwrap();
        assert_eq!(fs::read(lease.path()).unwrap(), b"one");
        assert_eq!(fs::metadata(lease.path()).unwrap().modified().unwrap(), old);
        let report = store.prune(&PruneOptions::default()).unwrap();
        assert!(report.rootfs.is_empty(), "held, and removed all the same");
    }
    assert!(!path("one").exists() && path("two").exists());
}

#[test]
fn two_who_unpack_the_same_image_share_one_unpacking() {
    let directory = tempfile::tempdir().unwrap();
    let (store, image, _) = store_with_image(directory.path(), 1);
    let made = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                if let RootfsSlot::Draft(draft) = store.begin_rootfs(&image.chain_id, &NoProgress).unwrap() {
                    made.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    fs::write(draft.path(), b"unpacked").unwrap();
                    draft.commit().unwrap();
                }
            });
        }
    });
    assert_eq!(made.into_inner(), 1);
    assert_eq!(fs::read(store.rootfs(&image.chain_id).unwrap()).unwrap(), b"unpacked");
    assert_eq!(temporary_files(&store), 0);
}

#[test]
fn shared_layers_stay_and_what_the_dead_left_goes() {
    let directory = tempfile::tempdir().unwrap();
    let (store, first, first_name) = store_with_image(directory.path(), 1);
    let (_, second, _) = store_with_image(directory.path(), 2);
    drop(unpack(&store, &first));
    let digits = first.manifest_digest.hex();
    let report = store.remove(&digits[..12], &[]).unwrap();
    assert_eq!(report.images, [first_name]);
    assert_eq!(report.blobs.len(), 3, "the layer that both have stays");
    assert_whole(&second);

    fs::write(store.root().join("tmp/blob-of-a-dead-process"), noise(3, 9000)).unwrap();
    fs::write(store.root().join("refs/damaged.json"), b"{").unwrap();
    let stray = Digest::of(b"stray");
    fs::write(store.root().join("blobs/sha256").join(stray.hex()), b"stray").unwrap();
    fs::write(store.root().join("rootfs").join(format!("{}.ext4", stray.hex())), b"stray").unwrap();
    let report = store.prune(&PruneOptions { all: false, keep: vec![stray] }).unwrap();
    assert_eq!((report.leftovers, report.blobs, report.rootfs), (2, vec![stray], vec![]));
    let report = store.prune(&PruneOptions::default()).unwrap();
    assert_eq!((report.leftovers, report.rootfs), (0, vec![stray]));
    assert!(report.freed_bytes > 0);
    assert_eq!(store.list().unwrap().len(), 1);
}

/// A docker daemon that has one image, for as long as this lives.
fn serve_docker(socket: &Path, id: &'static str, archive: Vec<u8>) {
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut request = String::new();
            BufReader::new(&stream).read_line(&mut request).unwrap();
            let answer = match request.trim_end() {
                "GET /images/app:v1/json HTTP/1.0" => format!(r#"{{"Id":"{id}","Size":7}}"#).into_bytes(),
                "GET /images/app:v1/get HTTP/1.0" => archive.clone(),
                _ => {
                    let _ =
                        stream.write_all(b"HTTP/1.0 404 Not Found\r\n\r\n{\"message\":\"No such image\"}");
                    continue;
                }
            };
            let _ = stream
                .write_all(b"HTTP/1.0 200 OK\r\nContent-Type: x\r\n\r\n")
                .and_then(|()| stream.write_all(&answer));
        }
    });
}

/// What a process says that imports `name` with this docker daemon: the chain id, or the error; and whether it was cached.
fn import_from_docker(directory: &Path, socket: &Path, name: &str) -> String {
    let child = Command::new(env::current_exe().unwrap())
        .args(["--exact", "child_that_imports", "--ignored", "--nocapture"])
        .env("TEST_STORE", directory.join("store"))
        .env("TEST_NAME", name)
        .env("DOCKER_HOST", format!("unix://{}", socket.display()))
        .output()
        .unwrap();
    let said = String::from_utf8(child.stdout).unwrap();
    said.lines().find_map(|line| line.strip_prefix("SAID ")).map(String::from).unwrap_or(said)
}

#[test]
#[ignore = "run by the test that needs an environment of its own"]
fn child_that_imports() {
    let store = Store::open(env::var("TEST_STORE").unwrap());
    let name = Reference::parse(&env::var("TEST_NAME").unwrap()).unwrap();
    let cached = store.find(&name).unwrap().is_some();
    match pull(&store, &name, &PullOptions::default(), &NoProgress) {
        Ok(image) => println!("SAID {} cached={cached}", image.chain_id),
        Err(error) => println!("SAID {error}"),
    }
}

#[test]
fn an_image_of_the_docker_daemon_is_saved_and_followed_when_it_is_built_anew() {
    let directory = tempfile::tempdir().unwrap();
    let save = |layer: &[u8]| {
        let path = directory.path().join("saved.tar");
        let manifest = br#"[{"Config":"c","RepoTags":["app:v1"],"Layers":["l"]}]"#;
        docker_tar(&path, &[("l", layer), ("c", &config_of(&[layer])), ("manifest.json", manifest)], &[]);
        fs::read(path).unwrap()
    };
    let sockets = ["first", "second", "gone"].map(|name| directory.path().join(name));
    serve_docker(&sockets[0], "sha256:1", save(b"one"));
    serve_docker(&sockets[1], "sha256:2", save(b"two"));
    let import = |socket: &Path| import_from_docker(directory.path(), socket, "docker-daemon:app:v1");
    assert_eq!(import(&sockets[0]), format!("{} cached=false", Digest::of(b"one")));
    assert_eq!(import(&sockets[0]), format!("{} cached=true", Digest::of(b"one")));
    assert_eq!(import(&sockets[1]), format!("{} cached=false", Digest::of(b"two")));
    assert_eq!(
        import(&sockets[2]),
        format!("{} cached=true", Digest::of(b"two")),
        "without a daemon the last one is used"
    );
    let missing = import_from_docker(directory.path(), &sockets[0], "docker-daemon:other");
    assert!(missing.starts_with("the docker daemon has no image other:latest"), "{missing}");
    assert_eq!(temporary_files(&Store::open(directory.path().join("store"))), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// An archive with bytes changed is refused or gives the same image; it never gives another one, and never panics.
    #[test]
    fn a_mutated_archive_is_refused_or_harmless(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("saved.tar");
        let layer = noise(1, 700);
        let manifest = br#"[{"Config":"c","RepoTags":["x:1"],"Layers":["d/layer.tar","l"]}]"#;
        let files: [(&str, &[u8]); 3] = [("d/layer.tar", &layer), ("c", &config_of(&[&layer, &layer])), ("manifest.json", manifest)];
        docker_tar(&path, &files, &[("l", "d/layer.tar")]);
        let mut bytes = fs::read(&path).unwrap();
        for (index, value) in changes {
            let length = bytes.len();
            bytes[index.index(length)] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        fs::write(&path, bytes).unwrap();
        let store = Store::open(directory.path().join("store"));
        if let Ok(image) = get(&store, text(&path)) {
            assert_whole(&image);
            prop_assert_eq!(image.layers.len(), 2);
            prop_assert_eq!(image.layers[0].diff_id, Digest::of(&layer));
        } else {
            prop_assert!(store.list().unwrap().is_empty());
        }
        let outside = fs::read_dir(directory.path()).unwrap().count();
        prop_assert!(outside <= 2, "only the archive and the store are there");
    }
}
