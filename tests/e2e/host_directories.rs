//! `-v /host/dir:/path`: a directory of the host in a machine.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tests::background::{IDLE, Machine};
use tests::flyrun::scratch;
use tests::image::busybox;
use tests::{Flyrun, Outcome};

/// How often something is looked for that is to come true in a while.
const ATTEMPTS: usize = 300;

fn shell(flags: &[&str], script: &str) -> Outcome {
    Flyrun::shared().run(&[flags, &[&busybox(), "sh", "-c", script]].concat()).end()
}

/// A directory with a file `greeting`.
fn directory() -> (TempDir, String) {
    let directory = scratch();
    std::fs::write(directory.path().join("greeting"), "hello\n").unwrap();
    let path = directory.path().to_str().unwrap().to_string();
    (directory, path)
}

/// The virtiofsd processes that serve this directory, and those on the way to become one.
fn daemons(directory: &str) -> Vec<Pid> {
    let pids = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| {
        let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
        let words = std::fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&words).replace('\0', " ");
        (line.contains("virtiofsd") && line.contains(directory)).then_some(pid)
    });
    pids.collect()
}

#[track_caller]
fn wait_for_no_daemon(directory: &str) {
    for _ in 0..ATTEMPTS {
        if daemons(directory).is_empty() {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("virtiofsd still serves {directory}: {:?}", daemons(directory));
}

#[test]
fn files_cross_the_border_both_ways_with_owner_and_mode() {
    let (directory, path) = directory();
    let script = "cat /data/greeting; cd /data && mkdir -p a/b && echo from the guest > a/b/file && chmod 640 a/b/file \
                  && chown 12:34 a/b/file && ln -s a/b/file link && mv greeting kept && cat link";
    shell(&["-v", &format!("{path}:/data")], script).code(0).prints("hello\nfrom the guest");
    let file = directory.path().join("a/b/file");
    assert_eq!(std::fs::read(&file).unwrap(), b"from the guest\n");
    let metadata = std::fs::metadata(&file).unwrap();
    assert_eq!((metadata.uid(), metadata.gid(), metadata.permissions().mode() & 0o7777), (12, 34, 0o640));
    assert!(directory.path().join("kept").exists() && !directory.path().join("greeting").exists());
    assert_eq!(daemons(&path), []);
}

#[test]
fn what_the_host_writes_meanwhile_is_seen_and_much_data_arrives_whole() {
    let (directory, path) = directory();
    let machine = Machine::start(&["-v", &format!("{path}:/data")], IDLE);
    std::fs::write(directory.path().join("later"), "later\n").unwrap();
    machine.sh("cat /data/later").end().code(0).prints("later");
    machine
        .sh("dd if=/dev/urandom of=/data/big bs=1M count=24 2> /dev/null; md5sum < /data/big")
        .end()
        .code(0);
    let sum = machine.sh("md5sum < /data/big").end().code(0).text();
    let own = std::process::Command::new("md5sum").arg(directory.path().join("big")).output().unwrap();
    assert_eq!(sum.split(' ').next(), String::from_utf8_lossy(&own.stdout).split(' ').next());
    // A new directory in it can be removed by the host, and the guest sees that too.
    std::fs::remove_file(directory.path().join("later")).unwrap();
    for _ in 0..ATTEMPTS {
        if machine.sh("ls /data").end().text() == "big\ngreeting" {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("the guest still sees what is gone");
}

#[test]
fn read_only_holds_even_when_the_guest_mounts_it_for_writing() {
    let (directory, path) = directory();
    let attempts = "cat /data/greeting
        for times in once again; do
            echo x > /data/new; echo x >> /data/greeting; rm /data/greeting; mkdir /data/d; chmod 777 /data/greeting
            touch /data/greeting; mv /data/greeting /data/moved; ln -s x /data/l
            mount -o remount,rw /data || { umount /data; mount -t virtiofs fs0 /data; }
        done
        grep ' /data ' /proc/mounts";
    for flags in [
        ["-v", &format!("{path}:/data:ro")],
        ["--mount", &format!("type=bind,source={path},target=/data,readonly")],
    ] {
        let outcome = shell(&flags, attempts).code(0).prints_something_with("hello");
        let text = outcome.text();
        assert!(text.contains("fs0 /data virtiofs rw"), "the guest must have got its way: {text}");
        assert_eq!(outcome.errors().matches("Read-only file system").count(), 16, "{}", outcome.errors());
        let names: Vec<_> = std::fs::read_dir(directory.path()).unwrap().flatten().collect();
        assert_eq!((names.len(), names[0].file_name().to_str()), (1, Some("greeting")));
        let file = directory.path().join("greeting");
        assert_eq!(std::fs::read(&file).unwrap(), b"hello\n");
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o644);
    }
}

#[test]
fn a_link_does_not_lead_out_of_the_directory() {
    let (directory, path) = directory();
    std::fs::create_dir(directory.path().join("inside")).unwrap();
    std::os::unix::fs::symlink("../../../../../../etc/hostname", directory.path().join("inside/up")).unwrap();
    let inside = format!("{path}/inside");
    // In the guest a link leads to the guest's own file; what lies above the root is not to be had at all.
    let script = "cat /data/up; ls -a /data/..; echo /data/*";
    let outcome = shell(&["--hostname", "mine", "-v", &format!("{inside}:/data")], script).code(0);
    assert!(
        outcome.text().starts_with("mine\n") && outcome.text().ends_with("/data/up"),
        "{}",
        outcome.text()
    );
    assert!(!outcome.text().contains("greeting"));
}

#[test]
fn directories_lie_in_each_other_whatever_the_order_of_the_flags() {
    let (_outer, outer) = directory();
    let (inner, inner_path) = directory();
    std::fs::write(inner.path().join("deep"), "deep\n").unwrap();
    let flags =
        ["--read-only", "-v", &format!("{inner_path}:/data/in/side"), "-v", &format!("{outer}:/data")];
    shell(&flags, "cat /data/in/side/deep /data/greeting").code(0).prints("deep\nhello");
}

#[test]
fn names_with_commas_backslashes_and_spaces_are_taken_as_they_are() {
    let (directory, path) = directory();
    let odd = directory.path().join(r"a,modcaps=-chown b\c");
    std::fs::create_dir(&odd).unwrap();
    std::fs::write(odd.join("x"), "odd\n").unwrap();
    shell(&["-v", &format!(r"{path}/a,modcaps=-chown b\c:/data")], "cat /data/x").code(0).prints("odd");
}

#[test]
fn a_relative_directory_counts_from_where_flyrun_runs() {
    let (_directory, path) = directory();
    let image = busybox();
    let invocation = Flyrun::shared().run(&["-v", ".:/data:ro", &image, "cat", "/data/greeting"]);
    invocation.end_under(&["env", "-C", &path]).code(0).prints("hello");
}

#[test]
fn what_cannot_be_shared_is_told_before_anything_is_made() {
    let flyrun = Flyrun::fresh();
    let (_directory, path) = directory();
    let image = busybox();
    let refused = |source: &str, program: Option<&str>| {
        let mount = format!("{source}:/data");
        let mut run = flyrun.run(&["-v", &mount, &image, "true"]);
        if let Some(program) = program {
            run = run.env("FLYRUN_VIRTIOFSD", program);
        }
        let outcome = run.end().fails_clearly();
        assert!(!flyrun.root().join("machines").exists(), "something was made");
        outcome
    };
    refused(&format!("{path}/none"), None).complains_about("mkdir -p").complains_about("/none");
    refused(&format!("{path}/greeting"), None).complains_about("not a directory");
    refused(&path, Some("/nonexistent/virtiofsd")).complains_about("apt-get install virtiofsd");
    refused(&path, Some("/bin/cat")).complains_about("is no virtiofsd");
}

#[test]
fn a_virtiofsd_that_fails_or_says_nothing_ends_the_start_with_one_error() {
    let (directory, path) = directory();
    let image = busybox();
    let own = |name: &str, script: &str| {
        let program = directory.path().join(name);
        let help = r#"[ "$1" = --help ] && { echo "source=PATH"; exit 0; }"#;
        std::fs::write(&program, format!("#!/bin/sh\n{help}\n{script}\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        program
    };
    let mount = format!("{path}:/data");
    let run = |program: &Path| {
        let run = Flyrun::shared().run(&["-v", &mount, &image, "true"]);
        run.env("FLYRUN_VIRTIOFSD", program).end().fails_clearly()
    };
    let failed = run(&own("failing", "echo virtiofsd: out of luck >&2; exit 1"));
    assert_eq!(failed.errors(), format!("flyrun: cannot share {path}: virtiofsd: out of luck\n"));
    run(&own("silent", "exec sleep 100000")).complains_about("has not answered");
    wait_for_no_daemon(&path);
}

#[test]
fn the_death_of_virtiofsd_costs_the_directory_and_not_the_machine() {
    let (_directory, path) = directory();
    let machine = Machine::start(&["-v", &format!("{path}:/data")], IDLE);
    machine.sh("cat /data/greeting").end().code(0).prints("hello");
    let processes = daemons(&path);
    assert!(!processes.is_empty());
    for process in processes {
        let _ = kill_process(process, Signal::KILL);
    }
    wait_for_no_daemon(&path);
    for script in ["ls /data/none", "cat /data/new > /dev/null", "echo x > /data/new"] {
        machine.sh(script).end().code(1).complains_about("not connected");
    }
    machine.sh("echo alive").end().code(0).prints("alive");
    machine.signal(Signal::TERM);
    assert_eq!(machine.end().0, Some(143));
}

#[test]
fn nothing_is_left_of_a_machine_whose_owner_is_killed() {
    let (_directory, path) = directory();
    let machine = Machine::start(&["-v", &format!("{path}:/data")], IDLE);
    assert!(!daemons(&path).is_empty());
    machine.signal(Signal::KILL);
    wait_for_no_daemon(&path);
    drop(machine);
}

#[test]
fn a_machine_in_the_background_keeps_its_directories_over_restarts_and_tells_of_them() {
    let flyrun = Flyrun::fresh();
    let (directory, path) = directory();
    let image = busybox();
    let script = "echo life >> /data/lives; exec sleep 100000";
    let flags = [
        "run",
        "-d",
        "--network",
        "none",
        "--name",
        "m",
        "-v",
        &format!("{path}:/data"),
        "--stop-timeout",
        "0",
    ];
    flyrun.command(&[&flags[..], &[&image, "sh", "-c", script]].concat()).end().code(0);
    let mut inspected = flyrun.command(&["inspect", "m"]).end().code(0);
    let share = inspected.json()[0]["config"]["shares"][0].clone();
    let expected = serde_json::json!({ "source": path, "path": "/data", "read_only": false });
    assert_eq!(share, expected);
    let lives = |count: usize| {
        for _ in 0..ATTEMPTS {
            let text = std::fs::read_to_string(directory.path().join("lives")).unwrap_or_default();
            if text == "life\n".repeat(count) {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        panic!("there have not been {count} lives");
    };
    lives(1);
    flyrun.command(&["restart", "m"]).end().code(0);
    lives(2);
    flyrun.command(&["stop", "m"]).end().code(0);
    assert_eq!(daemons(&path), []);
    flyrun.command(&["start", "m"]).end().code(0);
    lives(3);
    flyrun.command(&["rm", "-f", "m"]).end().code(0);
    assert_eq!(daemons(&path), []);
    assert!(directory.path().join("greeting").exists(), "a removed machine leaves the host's files alone");
}
