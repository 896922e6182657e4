use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::*;

/// A host as it should be: an AMD CPU of today.
fn fit() -> Facts {
    let told = [
        ("itlb_multihit", "Not affected"),
        ("l1tf", "Not affected"),
        (
            "spectre_v2",
            "Mitigation: Enhanced / Automatic IBRS; IBPB: conditional; STIBP: always-on; BHI: Not affected",
        ),
    ];
    Facts {
        smt_active: Some("0".into()),
        ksm_run: Some("0".into()),
        swaps: Some("Filename\t\tType\t\tSize".into()),
        nx_huge_pages: Some("N".into()),
        vulnerabilities: told.map(|(name, told)| (name.to_owned(), told.to_owned())).into(),
        mounts: Some("cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid,nsdelegate,favordynmods 0 0".into()),
        controllers: Some("cpuset cpu io memory hugetlb pids".into()),
        release: Some("6.12.117-amd64".into()),
        huge_pages: Some("always [madvise] never".into()),
        root_mode: Some(0o700),
        kvm_mode: Some(0o660),
    }
}

/// What is not good after a change of a fit host.
fn wrong(change: impl FnOnce(&mut Facts)) -> Vec<(&'static str, Grade)> {
    let mut facts = fit();
    change(&mut facts);
    let findings = judge(&facts);
    for finding in &findings {
        assert!(
            !finding.message.is_empty() && (finding.grade == Grade::Good) == finding.remedy.is_empty(),
            "{finding:?}"
        );
    }
    let wrong = findings.into_iter().filter(|finding| finding.grade != Grade::Good);
    wrong.map(|finding| (finding.name, finding.grade)).collect()
}

#[test]
fn a_fit_host_has_nothing_wrong() {
    assert_eq!(wrong(|_| {}), []);
}

#[test]
fn each_thing_that_lets_guests_watch_each_other_is_bad() {
    use Grade::Bad;
    assert_eq!(wrong(|it| it.smt_active = Some("1".into())), [("smt", Bad)]);
    assert_eq!(wrong(|it| it.ksm_run = Some("1".into())), [("ksm", Bad)]);
    assert_eq!(wrong(|it| it.root_mode = Some(0o755)), [("root-mode", Bad)]);
    assert_eq!(wrong(|it| it.root_mode = Some(0o770)), [("root-mode", Bad)]);
    assert_eq!(wrong(|it| it.release = Some("5.10.200".into())), [("kernel", Bad)]);
    assert_eq!(
        wrong(|it| it.mounts = Some("cgroup /sys/fs/cgroup cgroup rw 0 0".into())),
        [("cgroup2", Bad)]
    );
}

#[test]
fn what_costs_speed_or_a_second_layer_is_weak() {
    use Grade::Weak;
    let disk = "Filename Type Size\n/dev/sda2 partition 1";
    assert_eq!(wrong(|it| it.swaps = Some(disk.into())), [("swap", Weak)]);
    assert_eq!(wrong(|it| it.swaps = Some("Filename Type Size\n/dev/zram0 partition 1".into())), []);
    assert_eq!(wrong(|it| it.mounts = Some("c /sys/fs/cgroup cgroup2 rw 0 0".into())), [("cgroup2", Weak)]);
    assert_eq!(wrong(|it| it.controllers = Some("cpu pids".into())), [("cgroup2", Weak)]);
    let read_only = Some("c /sys/fs/cgroup cgroup2 ro,favordynmods 0 0".to_owned());
    assert_eq!(wrong(|it| it.mounts = read_only), [("cgroup2", Grade::Bad)]);
    assert_eq!(wrong(|it| it.huge_pages = Some("always madvise [never]".into())), [("thp", Weak)]);
    assert_eq!(wrong(|it| it.kvm_mode = Some(0o666)), [("kvm-mode", Weak)]);
    assert_eq!(wrong(|it| it.nx_huge_pages = Some("Y".into())), [("nx_huge_pages", Weak)]);
}

#[test]
fn a_hole_of_the_cpu_is_bad_and_one_of_smt_alone_is_told_once() {
    let told = |name: &str, told: &str| {
        wrong(|it| drop(it.vulnerabilities.insert(name.to_owned(), told.to_owned())))
    };
    for hole in [
        "Vulnerable",
        "Vulnerable: Safe RET, no microcode",
        "Vulnerable: Clear CPU buffers attempted, no microcode; SMT vulnerable",
        "Mitigation: PTE Inversion; VMX: vulnerable",
        "Mitigation: Enhanced IBRS; PBRSB-eIBRS: Vulnerable",
    ] {
        assert_eq!(told("mds", hole), [("mitigations", Grade::Bad)], "{hole}");
    }
    for fine in ["Mitigation: Clear CPU buffers; SMT vulnerable", "Mitigation: Safe RET", "Not affected"] {
        assert_eq!(told("mds", fine), [], "{fine}");
    }
}

#[test]
fn a_cpu_with_itlb_multihit_needs_its_mitigation() {
    let with = |nx: &str| {
        wrong(|it| {
            it.vulnerabilities.insert("itlb_multihit".into(), "KVM: Vulnerable".into());
            it.nx_huge_pages = Some(nx.into());
        })
    };
    assert_eq!(with("N"), [("nx_huge_pages", Grade::Bad)]);
    assert_eq!(with("Y"), []);
}

#[test]
fn a_host_that_says_nothing_is_never_taken_for_fit() {
    let findings = judge(&Facts::default());
    for name in ["smt", "mitigations", "kernel", "cgroup2", "kvm-mode"] {
        let finding = findings.iter().find(|finding| finding.name == name).unwrap();
        assert_ne!(finding.grade, Grade::Good, "{name}");
    }
}

#[test]
fn facts_are_read_from_their_files() {
    let system = tempfile::tempdir().unwrap();
    let put = |path: &str, text: &str| {
        let path = system.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    put("sys/devices/system/cpu/smt/active", "1\n");
    put("sys/kernel/mm/ksm/run", "0\n");
    put("sys/devices/system/cpu/vulnerabilities/mds", "Not affected\n");
    put("proc/sys/kernel/osrelease", "6.1.0\n");
    put("dev/kvm", "");
    fs::set_permissions(system.path().join("dev/kvm"), fs::Permissions::from_mode(0o606)).unwrap();
    let facts = Facts::read(system.path(), &system.path().join("nowhere"));
    assert_eq!((facts.smt_active.as_deref(), facts.ksm_run.as_deref()), (Some("1"), Some("0")));
    assert_eq!(facts.vulnerabilities.get("mds").map(String::as_str), Some("Not affected"));
    assert_eq!((facts.release.as_deref(), facts.swaps), (Some("6.1.0"), None));
    assert_eq!((facts.kvm_mode, facts.root_mode), (Some(0o606), None));
}
