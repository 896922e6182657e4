//! What is left to somebody who has taken over flyrun-vmm: what a probe in its place can do (tests/jail_probe), and what a running
//! machine's process looks like from outside.

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::process::Command;
use std::sync::LazyLock;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::mount::{OpenTreeFlags, open_tree};
use serde_json::{Value, json};
use tests::flyrun::{Invocation, scratch};
use tests::suspended::{COUNTER, Machine, command, wait_until};

/// A user that nobody is.
const UID: u32 = 1_999_999_999;

/// Runs the probe once, as a monitor starts flyrun-vmm.
static FOUND: LazyLock<Value> = LazyLock::new(|| {
    let directory = scratch();
    let root = directory.path().join("j/s");
    let lent = directory.path().join("lent");
    fs::create_dir_all(&root).unwrap();
    fs::create_dir_all(&lent).unwrap();
    for open in [directory.path(), root.parent().unwrap(), &root] {
        fs::set_permissions(open, fs::Permissions::from_mode(0o711)).unwrap();
    }
    fs::write(root.join("v"), "").unwrap();
    std::os::unix::fs::chown(&lent, Some(UID), Some(UID)).unwrap();
    let tree = open_tree(CWD, &lent, OpenTreeFlags::OPEN_TREE_CLONE).unwrap();
    let open = openat(&tree, ".", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
    fcntl_setfd(&open, FdFlags::empty()).unwrap();
    drop(tree);
    let loopback = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = loopback.local_addr().unwrap().port();
    let name = format!("flyrun-jail-test-{}", std::process::id());
    let _abstract = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    let mut victim = Command::new("sleep").arg("1000").spawn().unwrap();
    let mut probe = Command::new(env!("CARGO_BIN_EXE_jail-probe"));
    probe.arg(&root).arg(UID.to_string()).arg(open.as_raw_fd().to_string());
    probe.args([victim.id().to_string(), port.to_string(), name]);
    // The thread's own property, and its child's.
    let output = std::thread::spawn(move || {
        vmm::jail::ask_for_own_pids().unwrap();
        probe.output().unwrap()
    });
    let output = output.join().unwrap();
    assert_eq!(victim.try_wait().unwrap(), None, "the victim lives");
    victim.kill().unwrap();
    victim.wait().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text} {output:?}"))
});

/// What came of each of these.
#[track_caller]
fn expect(expected: &[(&str, Value)]) {
    for (what, value) in expected {
        assert_eq!(&FOUND[*what], value, "{what}; all that was found: {:#}", *FOUND);
    }
}

/// Each of these failed with this error.
#[track_caller]
fn expect_each(words: &[impl AsRef<str>], errno: Errno) {
    words.iter().for_each(|word| expect(&[(word.as_ref(), json!(errno.raw_os_error()))]));
}

#[test]
fn no_file_of_the_host_is_readable_and_none_can_be_made() {
    expect_each(&["names above /", "names in /"], Errno::ACCESS);
    let paths = [
        "/etc/passwd",
        "/proc/self/status",
        "/proc/1/environ",
        "/sys/kernel",
        "/dev/null",
        "/run",
        "/var/lib/flyrun",
    ];
    expect_each(&paths.map(|path| format!("open {path}")), Errno::NOENT);
    expect_each(&["create a file", "create a directory"], Errno::ROFS);
    expect(&[("a descriptor of a directory by number", json!([]))]);
}

#[test]
fn what_is_lent_for_a_snapshot_leads_nowhere_else() {
    expect(&[("write to what is lent", json!("done")), ("from what is lent to ..", json!("still there"))]);
    expect_each(
        &[
            "from what is lent to ../etc/passwd",
            "from what is lent to ../../../../../../etc/passwd",
            "link out of what is lent",
        ],
        Errno::NOENT,
    );
}

#[test]
fn no_process_is_visible_but_itself() {
    expect(&[("own number", json!(1)), ("its parent", json!(0)), ("other processes", json!([]))]);
    expect_each(&["kill a host's process", "trace a host's process", "read a host's process"], Errno::SRCH);
}

#[test]
fn there_is_no_network() {
    expect_each(&["connect to the host's loopback", "connect to the internet"], Errno::NETUNREACH);
    expect_each(&["connect to an abstract socket of the host"], Errno::CONNREFUSED);
    // Its own namespace: the name is free there.
    expect(&[("take its name here", json!("done"))]);
    expect_each(&["listen to all packets", "send raw packets"], Errno::PERM);
}

#[test]
fn there_is_no_device_but_those_that_are_given() {
    expect(&[("kvm that was given", json!(12))]);
    let paths = ["/dev/mem", "/dev/kvm", "/dev/net/tun", "/dev/vhost-net"];
    expect_each(&paths.map(|path| format!("open {path}")), Errno::NOENT);
    expect_each(&["make /dev/mem"], Errno::ROFS);
}

#[test]
fn there_is_no_way_to_become_root_or_anybody_else() {
    expect(&[("user", json!(UID)), ("group", json!(UID)), ("groups", json!([]))]);
    expect(&[("capabilities", json!([0, 0, 0])), ("bounding and ambient capabilities", json!([]))]);
    expect(&[("no new privileges", json!(true)), ("dumpable", json!("NotDumpable"))]);
    expect(&[("core dumps", json!(0)), ("threads", json!(128)), ("files", json!(2048))]);
    let denied = [
        "become root",
        "become root's group",
        "take other groups",
        "more files",
        "mount",
        "make the root writable",
        "unmount",
        "change the root",
        "be root of new users",
        "have new mounts",
        "name the host",
        "load a module",
    ];
    expect_each(&denied, Errno::PERM);
}

fn status(pid: i32, name: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name}:")));
    line.unwrap_or_else(|| panic!("no {name} in {text}")).split_whitespace().collect::<Vec<_>>().join(" ")
}

#[track_caller]
fn check_from_outside(pid: i32) -> u32 {
    let uids = status(pid, "Uid");
    let uid: u32 = uids.split(' ').next().unwrap().parse().unwrap();
    assert!((2_000_000_000..2_000_065_536).contains(&uid), "{uid}");
    assert_eq!(
        (uids, status(pid, "Gid")),
        (format!("{uid} {uid} {uid} {uid}"), format!("{uid} {uid} {uid} {uid}"))
    );
    assert_eq!(status(pid, "Groups"), "");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(pid, set), "0000000000000000", "{set}");
    }
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    assert_eq!(status(pid, "NSpid"), format!("{pid} 1"));
    for kind in ["mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        let of = |who: &str| fs::read_link(format!("/proc/{who}/ns/{kind}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "{kind}");
    }
    // Its root has the machine's sockets, and above that there is nothing.
    let names = |path: String| -> BTreeSet<String> {
        fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    };
    let sockets = names(format!("/proc/{pid}/root/"));
    assert!(
        sockets.contains("v") && sockets.iter().all(|name| name == "v" || name.starts_with("v_")),
        "{sockets:?}"
    );
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    // The one mount is that of the directory above.
    assert_eq!(mounts, "");
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    assert!(limits.lines().any(|line| {
        line.split_whitespace().collect::<Vec<_>>().starts_with(&["Max", "core", "file", "size", "0", "0"])
    }));
    check_descriptors(pid);
    uid
}

/// Nothing but what a machine is made of is open, and no directory at all.
#[track_caller]
fn check_descriptors(pid: i32) {
    let expected = [
        "/dev/kvm",
        "/dev/null",
        "/dev/net/tun",
        "/dev/vhost-net",
        "anon_inode:",
        "socket:[",
        "disk.ext4",
        "rootfs",
        "vmlinux",
        "memory",
        "base",
        "state",
        "console.log",
        "vmm.log",
        "/lock",
        "pagemap",
        "flyrun-uids",
        "working-set",
        "memfd:",
        "/bases/",
    ];
    // What is lent for a moment, a mount of one directory alone, is given back.
    let links = || {
        let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        entries.filter_map(|entry| fs::read_link(entry.path()).ok()).collect::<Vec<_>>()
    };
    wait_until("nothing is lent", || {
        !links().iter().any(|to| to.to_string_lossy().starts_with("/ (deleted)"))
    });
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
        let Ok(to) = fs::read_link(entry.path()) else { continue };
        let to = to.display().to_string();
        assert!(expected.iter().any(|part| to.contains(part)), "{to} is open");
        assert!(!fs::metadata(entry.path()).unwrap().is_dir(), "{to} is a directory");
    }
}

#[test]
fn machines_that_run_are_locked_up_each_as_a_user_of_its_own_and_so_are_those_that_come_back() {
    let one = Machine::start("jail-one", &[], COUNTER);
    let two = Machine::start("jail-two", &["--network", "none"], COUNTER);
    let uids = [&one, &two].map(|machine| check_from_outside(machine.vmm()));
    assert_ne!(uids[0], uids[1]);
    one.wait_for_lines(2);
    for _ in 0..2 {
        one.call(&["suspend"]).code(0);
        let directory =
            tests::Flyrun::shared().root().join("machines").join(one.inspect("id").as_str().unwrap());
        for entry in fs::read_dir(directory.join("snapshot")).unwrap().flatten() {
            let found = entry.metadata().unwrap();
            assert_eq!((found.uid(), found.gid(), found.is_file()), (0, 0, true), "{entry:?}");
        }
        one.call(&["resume"]).code(0);
        check_from_outside(one.vmm());
        one.check_count();
    }
    // From a base, whose memory all machines of its shape share: no one may write to it.
    let three = Machine("jail-three".into());
    let image = tests::image::busybox();
    command(&["run", "-d", "--name", "jail-three", &image, "sh", "-c", COUNTER]).end().code(0);
    let pid = three.vmm();
    check_from_outside(pid);
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
        let to = fs::read_link(entry.path()).unwrap();
        if to.components().any(|part| part.as_os_str() == "bases") {
            let number = entry.file_name().into_string().unwrap();
            let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).unwrap();
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
            assert_eq!(
                u32::from_str_radix(flags, 8).unwrap() & 3,
                0,
                "{} is open for reading alone",
                to.display()
            );
        }
    }
}

#[test]
fn a_host_that_grants_no_jail_runs_no_machine_and_says_so_unless_it_is_told_to() {
    let image = tests::image::busybox();
    let run = |name: &str, value: &str| {
        let words = ["run", "--cold", "--rm", "--network", "none", &image, "echo", "here"];
        command(&words).env(name, value).end()
    };
    run("FLYRUN_UIDS", "7-x").code(125).complains_about("is not a range of user ids");
    run("FLYRUN_JAIL", "maybe").code(125).complains_about("neither on nor off");
    run("FLYRUN_JAIL", "off").code(0).prints("here").complains_about("flyrun-vmm is not jailed");
    // It has its seccomp filters then too, and all that a life needs is in them.
    let machine = Machine("jail-off".into());
    let call = |invocation: Invocation<'static>| invocation.env("FLYRUN_JAIL", "off").end().code(0);
    call(Machine::invocation("jail-off", &[], COUNTER));
    for _ in 0..2 {
        machine.wait_for_lines(2);
        call(machine.invoke(&["suspend"]));
        call(machine.invoke(&["resume"]));
        // What it has touched is noted some time after.
        wait_until("its first pages are noted", || machine.directory().join("snapshot/working-set").exists());
        assert_eq!(
            (machine.last_start().as_str(), status(machine.vmm(), "NoNewPrivs").as_str()),
            ("resumed", "1")
        );
    }
    machine.check_count();
}
