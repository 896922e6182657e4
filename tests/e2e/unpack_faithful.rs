//! Everything a layer may hold arrives as it was.

use serde_json::json;
use tests::flyrun::scratch;
use tests::image::{Layer, write_layout};
use tests::tar::{Entry, Tar, kind};
use tests::{Flyrun, Outcome};

/// Runs a script on top of busybox and these layers.
fn unpacked(layers: &[Layer], script: &str) -> Outcome {
    let directory = scratch();
    let layers = [&[Layer::busybox()], layers].concat();
    let image = write_layout(directory.path(), &layers, &json!({}));
    Flyrun::shared().run(&[&image, "/bin/sh", "-c", script]).end()
}

#[test]
fn modes_owners_times_and_links() {
    let tar = Tar::new()
        .entry(&Entry {
            name: "d",
            kind: kind::DIRECTORY,
            mode: 0o1777,
            uid: 5,
            gid: 6,
            mtime: 1_000_000,
            ..Entry::default()
        })
        .entry(&Entry {
            name: "d/setuid",
            mode: 0o4755,
            uid: 1000,
            gid: 2000,
            mtime: 1_234_567,
            data: b"x",
            ..Entry::default()
        })
        .entry(&Entry { name: "d/setgid", mode: 0o2711, uid: 0, gid: 42, ..Entry::default() })
        .hard_link("d/twin", "d/setuid")
        .symlink("d/link", "../d/setuid")
        .symlink("d/absolute", "/d/setuid")
        .entry(&Entry { name: "d/pipe", kind: kind::FIFO, mode: 0o600, ..Entry::default() })
        .entry(&Entry {
            name: "d/null",
            kind: kind::CHAR_DEVICE,
            mode: 0o666,
            device: (1, 3),
            ..Entry::default()
        });
    let script = "cd /d; stat -c '%n %a %u %g %Y' . setuid setgid; stat -c %h twin; readlink link; readlink absolute; cat absolute; echo
        stat -c '%F' pipe; stat -c '%F %t %T' null";
    unpacked(&[Layer::gzip(&tar.finish())], script).code(0).prints(
        ". 1777 5 6 1000000\nsetuid 4755 1000 2000 1234567\nsetgid 2711 0 42 1\n2\n../d/setuid\n/d/setuid\nx\n\
         fifo\ncharacter special file 1 3",
    );
}

#[test]
fn all_compressions_in_one_image() {
    let layer = |name: &str| Tar::new().file(name, 0o644, name.as_bytes()).finish();
    let layers = [Layer::plain(layer("plain")), Layer::zstd(&layer("zstd")), Layer::gzip(&layer("gzip"))];
    unpacked(&layers, "cat /plain /zstd /gzip").code(0).prints("plainzstdgzip");
}

#[test]
fn whiteouts_and_opaque_directories_hide_what_is_below() {
    let below = Tar::new()
        .directory("a")
        .file("a/one", 0o644, b"1")
        .file("a/two", 0o644, b"2")
        .directory("a/deep")
        .file("a/deep/three", 0o644, b"3")
        .directory("o")
        .file("o/old", 0o644, b"old")
        .directory("o/sub")
        .file("o/sub/old", 0o644, b"old")
        .directory("r")
        .file("r/x", 0o644, b"x");
    let above = Tar::new()
        .file("a/.wh.one", 0, b"")
        .file("a/.wh.deep", 0, b"")
        .file("a/.wh.never-there", 0, b"")
        .directory("o")
        .file("o/new", 0o644, b"new")
        .file("o/.wh..wh..opq", 0, b"")
        // A file takes the place of a directory, and comes back in the next layer as one.
        .file("r", 0o644, b"now a file");
    let top = Tar::new().file("a/one", 0o644, b"again");
    let layers = [below, above, top].map(|tar| Layer::gzip(&tar.finish()));
    unpacked(&layers, "cd /; find a o r | sort; cat a/one r")
        .code(0)
        .prints("a\na/one\na/two\no\no/new\nr\nagainnow a file");
}

#[test]
fn long_names_in_both_notations() {
    let name = format!("{}/{}", "d".repeat(120), "f".repeat(200));
    let tar = Tar::new()
        .pax(&[("path", format!("pax-{name}").as_bytes())])
        .file("short", 0o644, b"pax")
        .entry(&Entry {
            name: "././@LongLink",
            kind: kind::GNU_LONG_NAME,
            data: format!("gnu-{name}\0").as_bytes(),
            ..Entry::default()
        })
        .file("short", 0o644, b"gnu")
        .pax(&[("linkpath", format!("/pax-{name}").as_bytes())])
        .symlink("link", "short");
    let script = format!("cat /pax-{name} /gnu-{name} /link");
    unpacked(&[Layer::gzip(&tar.finish())], &script).code(0).prints("paxgnupax");
}

#[test]
fn capabilities_and_user_attributes_are_kept() {
    // cap_net_raw+ep, version 2 (linux/capability.h, struct vfs_cap_data).
    let capability: &[u8] = &[1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let program = std::fs::read("/bin/busybox").unwrap();
    let tar = Tar::new().pax(&[("SCHILY.xattr.security.capability", capability)]).file(
        "bin/busybox-privileged",
        0o755,
        &program,
    );
    let directory = scratch();
    let layers = [Layer::busybox(), Layer::gzip(&tar.finish())];
    let image = write_layout(directory.path(), &layers, &json!({}));
    let script = "exec /bin/busybox-privileged grep CapEff /proc/self/status";
    Flyrun::shared()
        .run(&["-u", "1000:1000", &image, "/bin/sh", "-c", script])
        .end()
        .code(0)
        .prints_something_with("0000000000002000");
}

#[test]
fn the_last_of_two_entries_wins() {
    let tar = Tar::new()
        .file("x", 0o644, b"first")
        .file("x", 0o600, b"second")
        .directory("d")
        .file("d/inside", 0o644, b"kept")
        .directory("d")
        .symlink("s", "x")
        .file("s", 0o644, b"no longer a link");
    unpacked(&[Layer::gzip(&tar.finish())], "cat /x; stat -c %a /x; cat /d/inside /s; cat /x")
        .code(0)
        .prints("second600\nkeptno longer a linksecond");
}

#[test]
fn a_file_of_zeros_takes_no_room() {
    let zeros = vec![0u8; 40 << 20];
    let tar = Tar::new().file("zeros", 0o644, &zeros).file("end", 0o644, b"end");
    let outcome =
        unpacked(&[Layer::zstd(&tar.finish())], "stat -c %s /zeros; du -k /zeros; cat /end").code(0);
    let text = outcome.text();
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("41943040"));
    let kib: u32 = lines.next().unwrap().split_whitespace().next().unwrap().parse().unwrap();
    assert!(kib < 4096, "{kib} KiB for zeros");
    assert_eq!(lines.next(), Some("end"));
}

#[test]
fn one_hundred_and_twenty_layers() {
    let layers: Vec<_> = (0..120)
        .map(|index| {
            let tar = Tar::new().file("count", 0o644, index.to_string().as_bytes()).file(
                &format!("layer-{index}"),
                0o644,
                b"",
            );
            Layer::gzip(&tar.finish())
        })
        .collect();
    unpacked(&layers, "cat /count; echo; ls / | grep -c layer-").code(0).prints("119\n120");
}

#[test]
fn parents_that_no_entry_makes_exist_all_the_same() {
    let tar = Tar::new().file("a/b/c/file", 0o644, b"deep");
    unpacked(&[Layer::gzip(&tar.finish())], "cat /a/b/c/file; stat -c ' %a %u' /a/b")
        .code(0)
        .prints("deep 755 0");
}
