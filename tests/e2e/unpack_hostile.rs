//! Images that are broken or mean harm: one clear error, and nothing of them in the store.

use serde_json::json;
use tests::flyrun::scratch;
use tests::image::{Layer, busybox, sha256, write_layout};
use tests::tar::{Entry, Tar, kind};
use tests::{Flyrun, Outcome};

/// Runs an image of busybox and one more layer, with a store of its own.
fn run(flyrun: &Flyrun, layer: Layer, script: &str) -> Outcome {
    let directory = scratch();
    let image = write_layout(directory.path(), &[Layer::busybox(), layer], &json!({}));
    flyrun.run(&[&image, "/bin/sh", "-c", script]).end()
}

/// The image is refused with a message about `reason`, leaves no root filesystem, and the store works on.
fn is_refused(layer: Layer, reason: &str) {
    let flyrun = Flyrun::fresh();
    run(&flyrun, layer, "echo it ran").fails_clearly().complains_about(reason).prints("");
    let left: Vec<_> = flyrun
        .contents()
        .into_iter()
        .filter(|line| line.starts_with("rootfs/") || line.contains("tmp"))
        .collect();
    assert!(left.is_empty(), "left in the store: {left:?}");
    flyrun.run(&[&busybox(), "echo", "the store works"]).end().code(0).prints("the store works");
}

#[test]
fn names_that_leave_the_root_do_not_get_out() {
    // Refused or kept inside: both are safe. What counts is that nothing is above the root and the host is untouched.
    let flyrun = Flyrun::fresh();
    for name in ["../escaped", "a/../../escaped", "/../escaped"] {
        let outcome =
            run(&flyrun, Layer::gzip(&Tar::new().file(name, 0o644, b"out").finish()), "echo inside");
        assert!(matches!(outcome.code, 0 | 125), "{}", outcome.errors());
        assert!(!outcome.errors().contains("panicked"), "{}", outcome.errors());
    }
    assert!(!std::path::Path::new("/escaped").exists());
}

#[test]
fn a_write_through_a_symbolic_link_stays_in_the_root() {
    let flyrun = Flyrun::fresh();
    let tar = Tar::new().symlink("out", "../../../../../../proc/self/root/tmp").file(
        "out/planted",
        0o644,
        b"planted",
    );
    let outcome =
        run(&flyrun, Layer::gzip(&tar.finish()), "cat /tmp/planted /out/planted 2>/dev/null; echo inside");
    assert!(matches!(outcome.code, 0 | 125), "{}", outcome.errors());
    assert!(!std::path::Path::new("/tmp/planted").exists());
}

#[test]
fn a_hard_link_to_outside_is_refused() {
    is_refused(Layer::gzip(&Tar::new().hard_link("shadow", "../../../../etc/shadow").finish()), "shadow");
}

#[test]
fn a_hard_link_through_a_symbolic_link_does_not_reach_guest_init() {
    let flyrun = Flyrun::fresh();
    let tar = Tar::new().symlink("up", "/..").hard_link("init", "up/init");
    let outcome = run(&flyrun, Layer::gzip(&tar.finish()), "test ! -e /init && echo inside");
    assert!(outcome.code == 125 || outcome.text() == "inside", "{}\n{}", outcome.text(), outcome.errors());
}

#[test]
fn a_layer_that_is_not_what_its_digest_says_is_refused() {
    let mut layer = Layer::gzip(&Tar::new().file("x", 0o644, b"x").finish());
    layer.digest = sha256(b"something else");
    is_refused(layer, "is damaged or forged: wanted sha256:");
}

#[test]
fn a_flipped_bit_is_found() {
    let mut layer = Layer::gzip(&Tar::new().file("x", 0o644, &[7; 5000]).finish());
    let middle = layer.blob.len() / 2;
    layer.blob[middle] ^= 4;
    is_refused(layer, "is damaged or forged: wanted sha256:");
}

#[test]
fn contents_that_do_not_match_the_diff_id_are_refused() {
    let mut layer = Layer::gzip(&Tar::new().file("x", 0o644, b"x").finish());
    layer.diff_id = sha256(b"another tar");
    is_refused(layer, "layer 1: its content has the digest");
}

#[test]
fn a_truncated_compressed_layer_is_refused() {
    for compress in [Layer::gzip, Layer::zstd] {
        let bytes: Vec<u8> =
            (0..200_000u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
        let whole = compress(&Tar::new().file("x", 0o644, &bytes).finish());
        let mut layer = whole.clone();
        layer.blob.truncate(whole.blob.len() / 2);
        layer.digest = sha256(&layer.blob);
        is_refused(layer, "layer");
    }
}

#[test]
fn a_tar_that_ends_within_a_file_is_refused() {
    let entry = Entry { name: "x", data: b"short", ..Entry::default() };
    is_refused(Layer::gzip(&Tar::new().announce(&entry, 1 << 30).unfinished()), "layer");
}

#[test]
fn what_is_no_tar_at_all_is_refused() {
    is_refused(Layer::gzip(&[0x55; 4096]), "layer");
}

#[test]
fn a_header_with_a_wrong_checksum_is_refused() {
    let mut tar = Tar::new().file("x", 0o644, b"x").finish();
    tar[148] ^= 1;
    is_refused(Layer::gzip(&tar), "layer");
}

#[test]
fn a_pax_header_that_announces_gigabytes_is_refused() {
    let entry = Entry { name: "PaxHeaders/x", kind: kind::PAX, data: b"11 path=x\n", ..Entry::default() };
    is_refused(Layer::gzip(&Tar::new().announce(&entry, 8 << 30).finish()), "layer");
}

#[test]
fn a_missing_blob_is_named() {
    let flyrun = Flyrun::fresh();
    let directory = scratch();
    let layer = Layer::busybox();
    let image = write_layout(directory.path(), std::slice::from_ref(&layer), &json!({}));
    std::fs::remove_file(directory.path().join("blobs/sha256").join(&layer.digest)).unwrap();
    flyrun.run(&[&image, "/bin/true"]).end().fails_clearly().complains_about(&layer.digest[..12]);
}

#[test]
fn an_index_or_manifest_that_is_no_json_is_refused() {
    let flyrun = Flyrun::fresh();
    for contents in ["", "{", "[]", "{\"manifests\":17}", "\u{0}\u{0}"] {
        let directory = scratch();
        let image = write_layout(directory.path(), &[Layer::busybox()], &json!({}));
        std::fs::write(directory.path().join("index.json"), contents).unwrap();
        flyrun.run(&[&image, "/bin/true"]).end().fails_clearly();
    }
}

#[test]
fn a_full_disk_of_the_host_is_named_and_leaves_nothing() {
    let mount = scratch();
    let store = mount.path().join("store");
    std::fs::create_dir(&store).unwrap();
    // Room for the blobs, not for what they unpack to.
    let bytes: Vec<u8> =
        (0..4_000_000u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    let mut tar = Tar::new();
    for index in 0..12 {
        tar = tar.file(&format!("copy-{index}"), 0o644, &bytes);
    }
    let directory = scratch();
    let image = write_layout(directory.path(), &[Layer::busybox(), Layer::zstd(&tar.finish())], &json!({}));
    let small = format!(
        "mount -t tmpfs -o size=24m small {0} && FLYRUN_ROOT={0} \"$0\" \"$@\"; code=$?; find {0}/tmp {0}/rootfs -type f; exit $code",
        store.display()
    );
    let flyrun = Flyrun::fresh();
    flyrun
        .run(&[&image, "/bin/echo", "it ran"])
        .end_under(&["unshare", "--mount", "sh", "-c", &small])
        .fails_clearly()
        .complains_about("No space left on device")
        .prints("");
}
