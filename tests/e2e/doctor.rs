//! `flyrun doctor`, `version` and `--help`.

use tests::Flyrun;

#[test]
fn doctor_finds_this_host_fit() {
    let outcome = Flyrun::shared().command(&["doctor"]).end().code(0).prints_something_with("kvm");
    outcome.prints_something_with("jail     machines are locked up, as users 2000000000-2000065535");
}

#[test]
fn doctor_tells_scripts_the_same() {
    let mut outcome = Flyrun::shared().command(&["doctor", "--json"]).end().code(0);
    let checks = outcome.json();
    let checks = checks.as_array().unwrap();
    assert!(checks.iter().any(|check| check["name"] == "kvm" && check["result"] == "ok"), "{checks:?}");
    assert!(checks.iter().all(|check| check["message"].as_str().is_some_and(|message| !message.is_empty())));
}

#[test]
fn doctor_without_kvm_fails_with_a_remedy() {
    let hidden = ["unshare", "--mount", "sh", "-c", "mount --bind /dev/null /dev/kvm && exec \"$0\" \"$@\""];
    let mut outcome = Flyrun::shared().command(&["doctor", "--json"]).end_under(&hidden).code(1);
    let checks = outcome.json();
    let kvm = checks.as_array().unwrap().iter().find(|check| check["name"] == "kvm").unwrap().clone();
    assert_eq!(kvm["result"], "failed");
    assert!(kvm["remedy"].as_str().is_some_and(|remedy| !remedy.is_empty()), "{kvm}");
}

#[test]
fn version_and_help_answer() {
    Flyrun::shared().command(&["version"]).end().code(0).prints_something_with(env!("CARGO_PKG_VERSION"));
    Flyrun::shared().command(&["--help"]).end().code(0).prints_something_with("flyrun run");
    Flyrun::shared().command(&["run", "--help"]).end().code(0).prints_something_with("--entrypoint");
}

#[test]
fn completions_and_man_pages_are_written() {
    Flyrun::shared().command(&["completions", "bash"]).end().code(0).prints_something_with("_flyrun");
    let directory = tests::flyrun::scratch();
    Flyrun::shared().command(&["man", directory.path().to_str().unwrap()]).end().code(0);
    assert!(directory.path().join("flyrun-run.1").is_file());
}

#[test]
fn doctor_of_a_production_host_finds_what_lets_guests_watch_each_other() {
    let merging = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        "echo 1 > /tmp/merges; mount --bind /tmp/merges /sys/kernel/mm/ksm/run && exec \"$0\" \"$@\"",
    ];
    let mut outcome =
        Flyrun::shared().command(&["doctor", "--production", "--json"]).end_under(&merging).code(1);
    let checks = outcome.json();
    let check =
        |name: &str| checks.as_array().unwrap().iter().find(|check| check["name"] == name).cloned().unwrap();
    assert_eq!(check("ksm")["result"], "failed");
    assert!(check("ksm")["remedy"].as_str().is_some_and(|remedy| remedy.contains("/sys/kernel/mm/ksm/run")));
    // QEMU's CPU has one thread a core.
    assert_eq!(check("smt")["result"], "ok");
    for name in ["mitigations", "nx_huge_pages", "swap", "kernel", "cgroup2", "thp", "root-mode", "kvm-mode"]
    {
        check(name);
    }
    Flyrun::shared()
        .command(&["doctor", "--production"])
        .end()
        .prints_something_with("equal pages of different guests");
}
