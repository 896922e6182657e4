//! What flags and the image's configuration make of the process.

use serde_json::json;
use tests::flyrun::scratch;
use tests::image::{Layer, busybox, write_layout};
use tests::{Flyrun, Outcome};

fn shell(flags: &[&str], script: &str) -> Outcome {
    let image = busybox();
    Flyrun::shared().run(&[flags, &[&image, "sh", "-c", script]].concat()).end()
}

#[test]
fn environment_comes_from_flags_files_and_flyrun_s_own() {
    let directory = scratch();
    let file = directory.path().join("env");
    std::fs::write(&file, "# a comment\nFROM_FILE=one two\nBOTH=file\n\nINHERITED\n").unwrap();
    let image = busybox();
    let flags =
        ["-e", "A=1", "-e", "EMPTY=", "-e", "TAKEN", "-e", "BOTH=flag", "--env-file", file.to_str().unwrap()];
    let script = r#"echo "$A|${EMPTY-unset}|$TAKEN|$FROM_FILE|$BOTH|$INHERITED|$PATH""#;
    Flyrun::shared()
        .run(&[&flags, &[image.as_str(), "sh", "-c", script][..]].concat())
        .env("TAKEN", "from outside")
        .env("INHERITED", "too")
        .end()
        .code(0)
        .prints(
            "1||from outside|one two|flag|too|/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        );
}

#[test]
fn the_host_s_environment_stays_outside() {
    shell(&[], "env | grep -c ^CARGO").prints("0");
}

#[test]
fn home_and_path_are_set_when_the_image_sets_none() {
    let directory = scratch();
    let image = write_layout(directory.path(), &[Layer::busybox()], &json!({}));
    let outcome = Flyrun::shared().run(&[&image, "/bin/sh", "-c", "echo $HOME $PATH"]).end().code(0);
    assert!(outcome.text().starts_with("/ ") || outcome.text().starts_with("/root "), "{}", outcome.text());
    assert!(outcome.text().ends_with(":/bin"), "{}", outcome.text());
}

#[test]
fn the_working_directory_is_made_when_missing() {
    shell(&["-w", "/tmp/a/b"], "pwd").code(0).prints("/tmp/a/b");
    shell(&["-w", "/etc"], "pwd; ls passwd").code(0).prints("/etc\npasswd");
}

#[test]
fn users_are_found_by_name_and_number_with_their_groups() {
    shell(&["-u", "nobody"], "id -u; id -g; id -G").code(0).prints("65534\n65534\n65534 33 100");
    shell(&["-u", "33"], "id -u; id -g").code(0).prints("33\n33");
    shell(&["-u", "nobody:users"], "id -g").code(0).prints("100");
    shell(&["-u", "1234:5678"], "id -u; id -g").code(0).prints("1234\n5678");
}

#[test]
fn an_entrypoint_replaces_the_image_s_and_drops_its_command() {
    let directory = scratch();
    let config = json!({ "Entrypoint": ["/bin/echo", "entry"], "Cmd": ["command"] });
    let image = write_layout(directory.path(), &[Layer::busybox()], &config);
    Flyrun::shared().run(&[&image]).end().code(0).prints("entry command");
    Flyrun::shared().run(&[&image, "mine"]).end().code(0).prints("entry mine");
    Flyrun::shared()
        .run(&["--entrypoint", "/bin/readlink", &image, "/bin/sh"])
        .end()
        .code(0)
        .prints("busybox");
}

#[test]
fn flags_behind_the_image_belong_to_the_command() {
    Flyrun::shared().run(&[&busybox(), "echo", "--rm", "-e", "--", "x"]).end().code(0).prints("--rm -e -- x");
}

#[test]
fn the_host_name_is_set_and_resolves() {
    shell(&["--hostname", "web-1"], "hostname; cat /etc/hostname; grep web-1 /etc/hosts | wc -l")
        .code(0)
        .prints("web-1\nweb-1\n2"); // by IPv4 and by IPv6
}

#[test]
fn a_read_only_root_refuses_writes_and_tmpfs_takes_them() {
    let script = "touch /x 2>/dev/null && echo wrote; echo data > /scratch/x && cat /scratch/x; echo ok > /tmp/y; cat /tmp/y";
    shell(&["--read-only", "--tmpfs", "/scratch", "--tmpfs", "/tmp:size=1m"], script)
        .code(0)
        .prints("data\nok");
}

#[test]
fn the_options_of_a_tmpfs_are_kept() {
    let script = "head -c 3000000 /dev/zero > /small/x 2>/dev/null || echo full; stat -c %a /small";
    shell(&["--tmpfs", "/small:size=1m,mode=711"], script).code(0).prints("full\n711");
}

#[test]
fn writes_stay_in_their_machine() {
    shell(&[], "echo x > /etc/mine && cat /etc/mine").code(0).prints("x");
    shell(&[], "ls /etc/mine 2>/dev/null || echo gone").prints("gone");
}

#[test]
fn processors_and_memory_are_as_asked() {
    shell(&["--cpus", "3"], "nproc").code(0).prints("3");
    let outcome =
        shell(&["--memory", "96m"], "awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo").code(0);
    let mib: u32 = outcome.text().parse().unwrap();
    assert!((50..=96).contains(&mib), "{mib} MiB of 96");
}

#[test]
fn the_disk_has_the_size_that_was_asked_for() {
    let outcome = shell(&["--disk", "200m"], "df -m / | awk 'END { print $2 }'").code(0);
    let mib: u32 = outcome.text().parse().unwrap();
    assert!((120..=200).contains(&mib), "{mib} MiB of 200");
}

#[test]
fn what_containers_expect_is_mounted() {
    let script = "for d in /proc /sys /dev /dev/pts /dev/shm /sys/fs/cgroup; do
        grep -q \" $d \" /proc/mounts || echo no $d; done
        for f in null zero full random urandom tty fd stdin stdout stderr ptmx; do [ -e /dev/$f ] || echo no /dev/$f; done
        grep -wq memory /sys/fs/cgroup/cgroup.controllers || echo no memory controller
        echo x > /dev/stdout; echo done";
    shell(&[], script).code(0).prints("x\ndone");
}

#[test]
fn zombies_are_reaped() {
    let script = "for i in 1 2 3 4 5; do sh -c 'sleep 0.1 &' ; done; sleep 1; ps -o stat= | grep -c Z";
    shell(&[], script).prints("0");
}

#[test]
fn the_kernel_does_not_wake_to_compact_memory() {
    // Left to itself, kcompactd wakes twice a second.
    let script = "cd $(dirname $(grep -l '^kcompactd' /proc/[0-9]*/comm))
        sleeps() { grep '^voluntary' status; }
        sleep 1; before=$(sleeps); sleep 5; echo ${before#*:} $(sleeps | cut -d: -f2)";
    let outcome = shell(&[], script).code(0);
    let text = outcome.text();
    let (before, after) = text.split_once(' ').unwrap();
    assert_eq!(before, after, "so often it has gone to sleep");
}

#[test]
fn running_out_of_memory_is_named() {
    // It looks for the end of a line that has none, in memory.
    shell(&["--memory", "96m"], "exec tail /dev/zero").code(137).complains_about("ran out of memory");
}
