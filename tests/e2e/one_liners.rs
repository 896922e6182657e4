//! One-liners of a user of docker, as scripts that can also be read and run by hand.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use tests::{Flyrun, image, program};

/// The scripts count interfaces, rules and cgroups, so they are in a network and a hierarchy where no other test has any. sysfs shows
/// the network of whoever mounted it, cgroup2 what is below the cgroup of whoever mounted it; and processes have to be in a leaf.
const OWN_HOST: &str = r#"
mount -t sysfs sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
own=/sys/fs/cgroup/one-liners-$$
mkdir "$own"
sed 's/^/+/; s/ / +/g' /sys/fs/cgroup/cgroup.controllers > /sys/fs/cgroup/cgroup.subtree_control
echo $$ > "$own/cgroup.procs"
exec unshare --cgroup sh -ec '
    umount /sys/fs/cgroup
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    mkdir /sys/fs/cgroup/leaf
    echo $$ > /sys/fs/cgroup/leaf/cgroup.procs
    ip link set lo up
    exec bash "$@"' sh "$@"
"#;

#[test]
fn one_liners_do_what_users_of_docker_expect() {
    passes("one_liners.sh", 60);
}

#[test]
fn bad_input_gets_one_clear_error_and_leaves_nothing() {
    passes("bad_input.sh", 100);
}

fn passes(script: &str, least: usize) {
    let flyrun = Flyrun::fresh();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("e2e").join(script);
    let mut command = Command::new("unshare");
    command.args(["--net", "--mount", "sh", "-ec", OWN_HOST, "sh"]).arg(script).arg(image::directory());
    flyrun.environment(&mut command);
    let path = std::env::var("PATH").unwrap();
    command.env("PATH", format!("{}:{path}", program().parent().unwrap().display()));
    // A command that hangs ends its process group.
    command.process_group(0);
    let output = command.output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{told}{}", String::from_utf8_lossy(&output.stderr));
    let passed: usize = told.split_whitespace().next().unwrap().parse().unwrap();
    assert!(passed >= least, "{told}");
}
