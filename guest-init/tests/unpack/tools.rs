//! Archives of the tools that images are made with, in all their formats, against the tree they were made of.

use std::{
    collections::BTreeMap,
    fs,
    io::{Seek, SeekFrom, Write},
    os::unix::fs::{FileExt, PermissionsExt, chown, lchown, symlink},
    path::Path,
    process::Command,
};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags, makedev, mknodat, setxattr, utimensat,
};

use crate::{
    snapshot::{self, Node},
    unpacked::{ADDED, Unpacked},
};

/// A tree with one of everything.
fn make_source(root: &Path) {
    rustix::process::umask(Mode::empty());
    let long = "long-".repeat(45);
    fs::create_dir_all(root.join("dir/sub")).unwrap();
    fs::create_dir_all(root.join(&long).join(&long)).unwrap();
    fs::write(root.join("dir/file"), vec![7; 100_000]).unwrap();
    fs::write(root.join("dir/empty"), "").unwrap();
    fs::write(root.join(&long).join(&long).join("deep"), "deep").unwrap();
    fs::write(root.join("dir/ünïcode ☃"), "name").unwrap();
    fs::hard_link(root.join("dir/file"), root.join("dir/sub/linked")).unwrap();
    fs::hard_link(root.join(&long).join(&long).join("deep"), root.join("far")).unwrap();
    symlink("../file", root.join("dir/sub/symlink")).unwrap();
    symlink(format!("/{long}/{long}/deep"), root.join("long-symlink")).unwrap();
    fs::set_permissions(root.join("dir/empty"), fs::Permissions::from_mode(0o4711)).unwrap();
    fs::set_permissions(root.join("dir/sub"), fs::Permissions::from_mode(0o2750)).unwrap();
    mknodat(CWD, root.join("null"), FileType::CharacterDevice, Mode::from_raw_mode(0o666), makedev(1, 3))
        .unwrap();
    mknodat(CWD, root.join("loop"), FileType::BlockDevice, Mode::from_raw_mode(0o660), makedev(7, 300))
        .unwrap();
    mknodat(CWD, root.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    chown(root.join("dir/file"), Some(1000), Some(100)).unwrap();
    lchown(root.join("long-symlink"), Some(1000), Some(100)).unwrap();
    make_sparse(&root.join("sparse"));
    for (at, path) in paths(root).iter().enumerate() {
        let time = Timespec { tv_sec: 1_234_567_890 + at as i64, tv_nsec: 0 };
        let times = Timestamps { last_access: time, last_modification: time };
        utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}

/// Data at the start, in the middle, and a hole at the end, with more runs than an old header holds.
fn make_sparse(path: &Path) {
    let mut file = fs::File::create(path).unwrap();
    for run in 0..60u64 {
        file.write_all_at(&[run as u8 + 1; 4096], run * 40_960).unwrap();
    }
    file.seek(SeekFrom::End(0)).unwrap();
    file.flush().unwrap();
    file.set_len(10_000_000).unwrap();
}

/// Deepest first, so that setting the times of one does not change those of another.
fn paths(root: &Path) -> Vec<std::path::PathBuf> {
    let mut paths: Vec<_> = snapshot::take(root).into_keys().map(|name| root.join(name)).collect();
    paths.reverse();
    paths
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn assert_same(expected: &BTreeMap<String, Node>, image: &Unpacked, tool: &str) {
    let mut found = snapshot::take(&image.root());
    for added in ADDED {
        found.remove(added);
    }
    let names: Vec<_> = expected.keys().collect();
    assert_eq!(names, found.keys().collect::<Vec<_>>(), "{tool}");
    for (path, node) in expected {
        assert!(*node == found[path], "{tool}: {path:?} should be {node:?}\nand is {:?}", found[path]);
    }
}

/// Archives `source` with a tool that takes the archive's name behind `arguments`, unpacks that, and compares.
fn round_trip(program: &str, arguments: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source");
    fs::create_dir(&source).unwrap();
    make_source(&source);
    if arguments.iter().any(|argument| argument.contains("pax") || argument.contains("posix")) {
        // Bsdtar writes times before 1970 with a wrong fraction.
        make_pax_only(&source, if program == "bsdtar" { 5 } else { -5 });
    }
    let archive = directory.path().join("archive.tar");
    run(Command::new(program).args(arguments).arg(&archive).arg("-C").arg(&source).arg("."));
    let image = Unpacked::empty();
    image
        .unpack_tars(&[fs::read(&archive).unwrap()])
        .unwrap_or_else(|failure| panic!("{arguments:?}: {failure}"));
    assert_same(&snapshot::take(&source), &image, &format!("{program} {arguments:?}"));
}

/// What only pax can say: nanoseconds and attributes.
fn make_pax_only(root: &Path, seconds: i64) {
    let set =
        |name: &str, value: &[u8]| setxattr(root.join("dir/file"), name, value, XattrFlags::empty()).unwrap();
    set("user.comment", b"with = and \n and \0");
    // CAP_NET_RAW permitted and effective, as of ping (struct vfs_cap_data, revision 2).
    set("security.capability", &[1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let time = Timespec { tv_sec: seconds, tv_nsec: 123_456_789 };
    let times = Timestamps { last_access: time, last_modification: time };
    utimensat(CWD, root.join("dir/file"), &times, AtFlags::empty()).unwrap();
}

const GNU_SORTED: &str = "--sort=name";

#[test]
fn gnu_tar_in_gnu_format() {
    round_trip("tar", &[GNU_SORTED, "--format=gnu", "-cf"]);
}

#[test]
fn gnu_tar_in_gnu_format_with_sparse_files() {
    round_trip("tar", &[GNU_SORTED, "--format=gnu", "-S", "-cf"]);
}

#[test]
fn gnu_tar_in_old_gnu_format_with_sparse_files() {
    round_trip("tar", &[GNU_SORTED, "--format=oldgnu", "-S", "-cf"]);
}

#[test]
fn gnu_tar_in_pax_format_with_attributes() {
    round_trip("tar", &[GNU_SORTED, "--format=posix", "--xattrs", "--xattrs-include=*", "-cf"]);
}

#[test]
fn gnu_tar_in_pax_format_with_sparse_files_of_each_version() {
    for version in ["0.0", "0.1", "1.0"] {
        let version = format!("--sparse-version={version}");
        round_trip("tar", &["--format=pax", "--xattrs", "--xattrs-include=*", "-S", &version, "-cf"]);
    }
}

#[test]
fn gnu_tar_with_large_records() {
    round_trip("tar", &["--format=gnu", "-b", "200", "-cf"]);
}

#[test]
fn bsdtar_in_pax_and_gnu_format() {
    round_trip("bsdtar", &["--format=pax", "--numeric-owner", "-cf"]);
    round_trip("bsdtar", &["--format=gnutar", "--numeric-owner", "-cf"]);
}

#[test]
fn ustar_and_v7_have_shorter_names_only() {
    for format in ["--format=ustar", "--format=v7"] {
        let directory = tempfile::tempdir().unwrap();
        let source = directory.path().join("source");
        fs::create_dir_all(source.join("a".repeat(50)).join("b".repeat(40))).unwrap();
        fs::write(source.join("a".repeat(50)).join("b".repeat(40)).join("c"), "content").unwrap();
        symlink("target", source.join("link")).unwrap();
        for path in paths(&source) {
            let time = Timespec { tv_sec: 1_000_000_000, tv_nsec: 0 };
            let times = Timestamps { last_access: time, last_modification: time };
            utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
        }
        let archive = directory.path().join("archive.tar");
        run(Command::new("tar").args([format, "-cf"]).arg(&archive).arg("-C").arg(&source).arg("."));
        let image = Unpacked::empty();
        image.unpack_tars(&[fs::read(&archive).unwrap()]).unwrap();
        assert_same(&snapshot::take(&source), &image, format);
    }
}

#[test]
fn numbers_beyond_octal() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "x").unwrap();
    chown(source.join("file"), Some(3_000_000_000), Some(2_100_000)).unwrap();
    for path in [source.join("file"), source.clone()] {
        let time = Timespec { tv_sec: -86_400, tv_nsec: 0 };
        utimensat(CWD, path, &Timestamps { last_access: time, last_modification: time }, AtFlags::empty())
            .unwrap();
    }
    for format in ["--format=gnu", "--format=posix"] {
        let archive = directory.path().join("archive.tar");
        run(Command::new("tar").args([format, "-cf"]).arg(&archive).arg("-C").arg(&source).arg("."));
        let image = Unpacked::empty();
        image.unpack_tars(&[fs::read(&archive).unwrap()]).unwrap();
        assert_same(&snapshot::take(&source), &image, format);
    }
}

#[test]
fn layers_of_umoci_with_its_whiteouts() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let layout = at("layout");
    let image = format!("{}:test", layout.display());
    let umoci = |arguments: &[&str]| run(Command::new("umoci").args(arguments));
    umoci(&["init", "--layout", layout.to_str().unwrap()]);
    umoci(&["new", "--image", &image]);
    let bundle = at("bundle");
    let bundle_name = bundle.to_str().unwrap();
    umoci(&["unpack", "--image", &image, bundle_name]);
    let root = bundle.join("rootfs");
    make_source(&root);
    umoci(&["repack", "--refresh-bundle", "--image", &image, bundle_name]);
    // The second layer removes, replaces and changes.
    fs::remove_file(root.join("dir/file")).unwrap();
    fs::remove_dir_all(root.join("dir/sub")).unwrap();
    fs::write(root.join("dir/sub"), "a file now").unwrap();
    fs::remove_file(root.join("null")).unwrap();
    fs::create_dir(root.join("null")).unwrap();
    fs::write(root.join("null/x"), "x").unwrap();
    umoci(&["repack", "--refresh-bundle", "--image", &image, bundle_name]);

    let layers = layers_of(&layout);
    assert_eq!(layers.len(), 2);
    let unpacked = Unpacked::empty();
    unpacked.unpack_raw(&layers, crate::unpacked::LIMITS).unwrap();
    let mut expected = snapshot::take(&root);
    // Umoci rounds times, and has no entry for a directory of which only the content changed.
    let mut found = snapshot::take(&unpacked.root());
    for added in ADDED {
        found.remove(added);
    }
    found.values_mut().chain(expected.values_mut()).for_each(|node| node.mtime = (0, 0));
    assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>());
    for (path, node) in &expected {
        assert!(*node == found[path], "{path:?} should be {node:?}\nand is {:?}", found[path]);
    }
}

/// The layers of the only image of an OCI layout, with the digests of its configuration.
fn layers_of(layout: &Path) -> Vec<(Vec<u8>, protocol::Compression, [u8; 32])> {
    let json =
        |path: &Path| -> serde_json::Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
    let blob =
        |digest: &serde_json::Value| layout.join("blobs").join(digest.as_str().unwrap().replace(':', "/"));
    let index = json(&layout.join("index.json"));
    let manifest = json(&blob(&index["manifests"][0]["digest"]));
    let config = json(&blob(&manifest["config"]["digest"]));
    let diff_ids = config["rootfs"]["diff_ids"].as_array().unwrap();
    let layers = manifest["layers"].as_array().unwrap();
    let unhex = |digest: &str| -> [u8; 32] {
        let text = digest.strip_prefix("sha256:").unwrap();
        std::array::from_fn(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap())
    };
    layers
        .iter()
        .zip(diff_ids)
        .map(|(layer, diff_id)| {
            let bytes = fs::read(blob(&layer["digest"])).unwrap();
            (bytes, protocol::Compression::Gzip, unhex(diff_id.as_str().unwrap()))
        })
        .collect()
}
