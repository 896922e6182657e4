//! `flyrun cp`: files between the host and a machine.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use tests::Flyrun;
use tests::background::Machine;
use tests::flyrun::{Invocation, scratch};
use tests::tar::Tar;

fn cp(arguments: &[&str]) -> Invocation<'static> {
    Flyrun::shared().command(&[&["cp"], arguments].concat())
}

/// `NAME:PATH`
fn at(machine: &Machine, path: &str) -> String {
    format!("{}:{path}", machine.name())
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

#[test]
fn a_file_goes_in_and_comes_out_unharmed() {
    let directory = scratch();
    let (here, back) = (directory.path().join("file"), directory.path().join("back"));
    let bytes: Vec<u8> = (0..5_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    fs::write(&here, &bytes).unwrap();
    fs::set_permissions(&here, fs::Permissions::from_mode(0o750)).unwrap();
    let machine = Machine::idle();
    cp(&[here.to_str().unwrap(), &at(&machine, "/root/there")]).end().code(0).prints("");
    machine.exec(&[], &["stat", "-c", "%a %u %g %s", "/root/there"]).end().prints("750 0 0 5000000");
    cp(&[&at(&machine, "/root/there"), back.to_str().unwrap()]).end().code(0).prints("");
    assert!(fs::read(&back).unwrap() == bytes);
    assert_eq!(fs::metadata(&back).unwrap().mode() & 0o7777, 0o750);
    assert_eq!(fs::metadata(&back).unwrap().mtime(), fs::metadata(&here).unwrap().mtime());
}

#[test]
fn a_tree_keeps_links_modes_and_names() {
    let directory = scratch();
    let tree = directory.path().join("tree");
    fs::create_dir_all(tree.join("sub/empty")).unwrap();
    fs::write(tree.join("sub/a file"), "content").unwrap();
    fs::write(tree.join(".wh.hidden"), "not hidden").unwrap();
    fs::write(tree.join("x".repeat(200)), "long").unwrap();
    symlink("sub/a file", tree.join("link")).unwrap();
    symlink("/nowhere", tree.join("dangling")).unwrap();
    fs::set_permissions(tree.join("sub"), fs::Permissions::from_mode(0o500)).unwrap();
    let machine = Machine::idle();
    cp(&[tree.to_str().unwrap(), &at(&machine, "/srv")]).end().code(0);
    machine
        .sh("cd /srv; cat link; readlink dangling; stat -c %a sub; cat .wh.hidden; ls | wc -l")
        .end()
        .code(0)
        .prints("content/nowhere\n500\nnot hidden4");
    machine.sh("ln /srv/link /srv/hard 2>/dev/null; ln '/srv/sub/a file' /srv/hard2").end().code(0);

    let back = directory.path().join("back");
    cp(&[&at(&machine, "/srv"), back.to_str().unwrap()]).end().code(0);
    assert_eq!(text(&back.join("link")), "content");
    assert_eq!(fs::read_link(back.join("dangling")).unwrap(), Path::new("/nowhere"));
    assert_eq!(fs::metadata(back.join("sub")).unwrap().mode() & 0o777, 0o500);
    assert!(back.join("sub/empty").is_dir());
    assert_eq!(text(&back.join("x".repeat(200))), "long");
    let inode = |name: &str| fs::metadata(back.join(name)).unwrap().ino();
    assert_eq!(inode("hard2"), inode("sub/a file"), "the hard link is two files");
}

#[test]
fn the_destination_means_what_docker_makes_of_it() {
    let directory = scratch();
    let here = directory.path();
    fs::create_dir_all(here.join("dir/sub")).unwrap();
    fs::write(here.join("dir/f"), "f").unwrap();
    fs::write(here.join("file"), "file").unwrap();
    let path = |name: &str| here.join(name).display().to_string();
    let machine = Machine::idle();
    machine.sh("mkdir /d; echo old > /old").end().code(0);
    // Into the machine.
    cp(&[&path("file"), &at(&machine, "/d")]).end().code(0);
    cp(&[&path("file"), &at(&machine, "/d/")]).end().code(0);
    cp(&[&path("file"), &at(&machine, "old")]).end().code(0);
    cp(&[&path("dir"), &at(&machine, "/d")]).end().code(0);
    cp(&[&path("dir/."), &at(&machine, "/d")]).end().code(0);
    cp(&[&path("dir"), &at(&machine, "/new")]).end().code(0);
    machine.sh("cat /d/file /old /d/dir/f /d/f /new/f").end().code(0).prints("filefilefff");
    cp(&[&path("file"), &at(&machine, "/missing/")]).end().fails_clearly().complains_about("/missing");
    cp(&[&path("file"), &at(&machine, "/missing/x")]).end().fails_clearly().complains_about("/missing");
    cp(&[&path("dir"), &at(&machine, "/old")]).end().fails_clearly().complains_about("not a directory");
    cp(&[&path("missing"), &at(&machine, "/")]).end().fails_clearly().complains_about("missing");
    // A directory is never replaced by a file.
    machine.sh("mkdir -p /e/file; touch /e/file/kept").end().code(0);
    cp(&[&path("file"), &at(&machine, "/e")]).end().fails_clearly().complains_about("directory");
    machine.sh("test -e /e/file/kept").end().code(0);
    // Out of it.
    fs::create_dir(here.join("out")).unwrap();
    cp(&[&at(&machine, "/d/f"), &path("out")]).end().code(0);
    cp(&[&at(&machine, "/d/f"), &path("out/g")]).end().code(0);
    cp(&[&at(&machine, "/new"), &path("out")]).end().code(0);
    cp(&[&at(&machine, "/new/."), &path("content")]).end().code(0);
    cp(&[&at(&machine, "/new/."), &path("out")]).end().code(0);
    for name in ["out/f", "out/g", "out/new/f", "content/f"] {
        assert_eq!(text(&here.join(name)), "f", "{name}");
    }
    cp(&[&at(&machine, "/no/such"), &path("out")]).end().fails_clearly().complains_about("/no/such");
    cp(&[&at(&machine, "/new"), &path("file")]).end().fails_clearly().complains_about("not a directory");
    cp(&[&at(&machine, "/d/f"), &path("none/")]).end().fails_clearly().complains_about("does not exist");
    cp(&["a", "b"]).end().fails_clearly().complains_about("MACHINE:PATH");
    cp(&["nowhere:/a", "b"]).end().fails_clearly().complains_about("'nowhere'");
}

#[test]
fn a_dash_is_a_tar() {
    let directory = scratch();
    let machine = Machine::idle();
    machine.sh("mkdir -p /t/sub; echo one > /t/sub/one; ln -s sub/one /t/link").end().code(0);
    let tar = cp(&[&at(&machine, "/t"), "-"]).end().code(0).stdout;
    fs::write(directory.path().join("t.tar"), &tar).unwrap();
    let mut unpack = Command::new("tar");
    unpack.arg("-xf").arg(directory.path().join("t.tar")).arg("-C").arg(directory.path());
    assert!(unpack.status().unwrap().success());
    assert_eq!(text(&directory.path().join("t/link")), "one\n");
    machine.sh("mkdir /u").end().code(0);
    cp(&["-", &at(&machine, "/u")]).stdin(tar).end().code(0);
    machine.sh("cat /u/t/link").end().code(0).prints("one");
    cp(&["-", &at(&machine, "/u/t/link")]).stdin("").end().fails_clearly().complains_about("no directory");
    cp(&["-", &at(&machine, "/u")]).stdin("no tar".repeat(1000)).end().fails_clearly();
}

#[test]
fn links_in_the_machine_do_not_lead_a_copy_out_of_its_destination() {
    let machine = Machine::idle();
    machine.sh("mkdir /in /aside; ln -s /aside /in/away").end().code(0);
    let tar = Tar::new().file("away/f", 0o644, b"x").file("../escaped", 0o644, b"x").finish();
    cp(&["-", &at(&machine, "/in")]).stdin(tar).end().fails_clearly().complains_about("escaped");
    machine.sh("ls /aside /escaped").end().code(1).prints("/aside:");
}

#[test]
fn owners_are_kept_on_demand_only() {
    let directory = scratch();
    let path = |name: &str| directory.path().join(name).display().to_string();
    let machine = Machine::idle();
    machine.sh("echo x > /s; chown 33:34 /s; chmod 6755 /s").end().code(0);
    cp(&[&at(&machine, "/s"), &path("plain")]).end().code(0);
    cp(&["-a", &at(&machine, "/s"), &path("kept")]).end().code(0);
    let of = |name: &str| {
        let metadata = fs::metadata(directory.path().join(name)).unwrap();
        (metadata.uid(), metadata.gid(), metadata.mode() & 0o7777)
    };
    assert_eq!(of("plain"), (0, 0, 0o755));
    assert_eq!(of("kept"), (33, 34, 0o6755));
    cp(&["-a", &path("kept"), &at(&machine, "/back")]).end().code(0);
    machine.exec(&[], &["stat", "-c", "%u %g %a", "/back"]).end().prints("33 34 6755");
}

#[test]
fn a_link_named_as_the_source_is_followed_on_demand() {
    let directory = scratch();
    let path = |name: &str| directory.path().join(name).display().to_string();
    let machine = Machine::idle();
    machine.sh("echo x > /real; ln -s real /link").end().code(0);
    cp(&[&at(&machine, "/link"), &path("link")]).end().code(0);
    cp(&["-L", &at(&machine, "/link"), &path("file")]).end().code(0);
    assert_eq!(fs::read_link(directory.path().join("link")).unwrap(), Path::new("real"));
    assert_eq!(text(&directory.path().join("file")), "x\n");
}

/// What a hostile guest-init would say, in place of a machine's own: the frames of protocol::session by hand.
mod hostile {
    use super::*;

    fn bytes(value: &[u8]) -> Vec<u8> {
        assert!(value.len() < 128, "the length is a varint");
        [&[value.len() as u8], value].concat()
    }

    fn frame(body: &[u8]) -> Vec<u8> {
        [&(body.len() as u32).to_le_bytes(), body].concat()
    }

    /// FromSession::Entry; mode 0644, root's, of 1970.
    pub fn entry(path: &[u8], kind: &[u8]) -> Vec<u8> {
        let mode = [0xa4, 0x03];
        frame(&[&[2], &bytes(path)[..], kind, &mode, &[0, 0, 0]].concat())
    }

    pub fn file(path: &[u8], content: &[u8]) -> Vec<u8> {
        let kind = [0, content.len() as u8];
        [entry(path, &kind), frame(&[&[3], &bytes(content)[..]].concat())].concat()
    }

    pub fn directory(path: &[u8]) -> Vec<u8> {
        entry(path, &[1])
    }

    pub fn symlink(path: &[u8], target: &[u8]) -> Vec<u8> {
        entry(path, &[&[2], &bytes(target)[..]].concat())
    }

    pub fn hard_link(path: &[u8], target: &[u8]) -> Vec<u8> {
        entry(path, &[&[3], &bytes(target)[..]].concat())
    }

    pub fn exited() -> Vec<u8> {
        frame(&[5, 0, 0])
    }

    /// A machine that was only made: its record says that it runs, and its vsock socket is the test's.
    pub struct Fake {
        flyrun: Flyrun,
        run: std::path::PathBuf,
        _lock: fs::File,
    }

    impl Fake {
        pub fn new() -> Fake {
            let flyrun = Flyrun::fresh();
            let image = tests::image::busybox();
            let id = flyrun.command(&["create", "--name", "fake", &image, "true"]).end().code(0).text();
            let machine = flyrun.root().join("machines").join(&id);
            let lock = fs::File::open(machine.join("lock")).unwrap();
            lock.lock().unwrap();
            let path = machine.join("machine.json");
            let mut record: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            record["state"] = "started".into();
            fs::write(path, record.to_string()).unwrap();
            // Where flyrun-vmm listens, the root directory of its jail.
            let run = flyrun.root().join("../run").join(&id).join("j/s");
            fs::create_dir_all(&run).unwrap();
            Fake { flyrun, run, _lock: lock }
        }
    }

    /// `flyrun cp fake:/x DESTINATION` against a machine whose vsock socket this test is.
    pub fn copy_from(fake: &Fake, frames: &[Vec<u8>], destination: &Path) -> tests::Outcome {
        let socket = fake.run.join("v");
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        let said = frames.concat();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut line = [0; 11];
            stream.read_exact(&mut line).unwrap();
            assert_eq!(&line, b"CONNECT 10\n");
            stream.write_all(b"OK 5\n").unwrap();
            let mut length = [0; 4];
            stream.read_exact(&mut length).unwrap();
            let mut request = vec![0; u32::from_le_bytes(length) as usize];
            stream.read_exact(&mut request).unwrap();
            let _ = stream.write_all(&said);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let outcome = fake.flyrun.command(&["cp", "fake:/x", destination.to_str().unwrap()]).end();
        server.join().unwrap();
        outcome
    }
}

#[test]
fn a_hostile_machine_writes_nowhere_but_where_the_user_said() {
    use hostile::{Fake, copy_from, directory, exited, file, hard_link, symlink};
    let fake = Fake::new();
    let scratch = scratch();
    let secret = scratch.path().join("secret");
    fs::write(&secret, "untouched").unwrap();
    let outside = scratch.path().display().to_string();
    let attacks: Vec<Vec<Vec<u8>>> = vec![
        vec![directory(b""), file(b"../secret", b"evil")],
        vec![directory(b""), file(secret.as_os_str().as_encoded_bytes(), b"evil")],
        vec![directory(b""), symlink(b"way", b".."), file(b"way/secret", b"evil")],
        vec![directory(b""), symlink(b"way", outside.as_bytes()), file(b"way/secret", b"evil")],
        vec![
            directory(b""),
            symlink(b"way", outside.as_bytes()),
            directory(b"way"),
            file(b"way/secret", b"evil"),
        ],
        vec![directory(b""), hard_link(b"own", b"../secret"), file(b"own", b"evil")],
        vec![directory(b""), symlink(b"way", b".."), hard_link(b"own", b"way/secret")],
        vec![symlink(b"", outside.as_bytes()), file(b"secret", b"evil")],
        vec![file(b"..", b"evil")],
        vec![directory(b""), file(b"a/./b", b"evil")],
        vec![file(b"", b"whole")],
    ];
    let last = attacks.len() - 1;
    for (number, frames) in attacks.iter().enumerate() {
        let into = scratch.path().join(format!("into{number}"));
        let ending = if number == last { vec![] } else { vec![exited()] };
        copy_from(&fake, &[frames.clone(), ending].concat(), &into).fails_clearly();
        assert_eq!(text(&secret), "untouched", "attack {number}");
        assert_eq!(fs::metadata(&secret).unwrap().nlink(), 1, "attack {number}");
    }
    // The frames are right: the same without an attack is a copy.
    let good = [directory(b""), file(b"f", b"good"), symlink(b"l", b"f"), hard_link(b"h", b"f"), exited()];
    let into = scratch.path().join("good");
    copy_from(&fake, &good, &into).code(0);
    assert_eq!(text(&into.join("h")), "good");
    // A link that the user has in the destination is replaced, not followed.
    let mine = scratch.path().join("mine");
    fs::create_dir_all(mine.join("x")).unwrap();
    symlink_to(&secret, &mine.join("x/f"));
    copy_from(&fake, &good, &mine).code(0);
    assert_eq!(text(&secret), "untouched");
    assert_eq!(text(&mine.join("x/f")), "good");
}

fn symlink_to(target: &Path, link: &Path) {
    symlink(target, link).unwrap();
}
