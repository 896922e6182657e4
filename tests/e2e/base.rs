//! Machines that start from a base snapshot: like those that boot, but for the time it takes.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use tests::image::busybox;
use tests::{Flyrun, flyrun::Outcome};

/// A memory size that no other test has, so that no base is there yet.
const OWN_SIZE: &str = "97m";

fn run(flyrun: &Flyrun, flags: &[&str], script: &str) -> Outcome {
    let image = busybox();
    flyrun.command(&[&["run"], flags, &[&image, "sh", "-c", script]].concat()).end()
}

fn last_start(flyrun: &Flyrun, machine: &str) -> serde_json::Value {
    let mut inspected = flyrun.command(&["inspect", machine]).end().code(0);
    inspected.json()[0]["last_start"].clone()
}

/// The bases of a store that shares none with others.
fn bases(flyrun: &Flyrun) -> Vec<PathBuf> {
    let entries = fs::read_dir(flyrun.root().join("bases")).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    found.sort();
    found
}

/// A store without bases.
fn without_bases() -> Flyrun {
    let flyrun = Flyrun::fresh();
    fs::remove_file(flyrun.root().join("bases")).unwrap();
    flyrun
}

#[test]
fn the_first_machine_of_a_size_makes_the_base_and_all_others_use_it() {
    let flyrun = without_bases();
    run(&flyrun, &["--cold", "--name", "cold", "-m", OWN_SIZE], "echo cold").code(0).prints("cold");
    assert_eq!(last_start(&flyrun, "cold")["kind"], "cold_boot");
    assert_eq!(bases(&flyrun), [] as [PathBuf; 0]);
    for name in ["one", "two", "three"] {
        run(&flyrun, &["--name", name, "-m", OWN_SIZE], &format!("echo {name}")).code(0).prints(name);
        assert_eq!(last_start(&flyrun, name)["kind"], "base");
    }
    let made = bases(&flyrun);
    assert_eq!(made.len(), 1, "{made:?}");
    flyrun.command(&["start", "-a", "two"]).end().code(0).prints_something_with("two");
    assert_eq!(last_start(&flyrun, "two")["kind"], "base");
    // One that has a disk already mounts it itself.
    assert_eq!(bases(&flyrun).len(), 2);
    // Another shape is another base.
    run(&flyrun, &["--rm", "-m", OWN_SIZE, "--read-only"], "echo ro").code(0).prints("ro");
    assert_eq!(bases(&flyrun).len(), 3);
    flyrun.command(&["prune"]).end().code(0);
    assert_eq!(bases(&flyrun), [] as [PathBuf; 0]);
}

#[test]
fn machines_of_one_base_have_disks_of_their_own() {
    let flyrun = without_bases();
    let flags = |name| ["--name", name, "-m", OWN_SIZE, "--network", "none"];
    let count = "echo life >> /lives; dd if=/dev/urandom of=/big bs=1M count=3 2>/dev/null; wc -l < /lives";
    for name in ["one", "two", "three"] {
        run(&flyrun, &flags(name), count).code(0).prints("1");
        assert_eq!(last_start(&flyrun, name)["kind"], "base");
    }
    let base = bases(&flyrun).remove(0);
    for lives in ["2", "3"] {
        flyrun.command(&["start", "-a", "two"]).end().code(0).prints(lives);
        assert_eq!(last_start(&flyrun, "two")["kind"], "base");
    }
    for name in ["one", "two"] {
        let mut inspected = flyrun.command(&["inspect", name]).end().code(0);
        let directory = PathBuf::from(inspected.json()[0]["directory"].as_str().unwrap());
        let check =
            std::process::Command::new("/sbin/e2fsck").arg("-fn").arg(directory.join("disk.ext4")).output();
        let check = check.unwrap();
        assert!(check.status.success(), "{name}: {}", String::from_utf8_lossy(&check.stdout));
    }
    // One of another size is made for the machine, and needs no base of its own.
    let made = bases(&flyrun);
    run(&flyrun, &[&flags("small")[..], &["--disk", "64m"]].concat(), count).code(0).prints("1");
    assert_eq!((last_start(&flyrun, "small")["kind"].clone(), bases(&flyrun)), ("base".into(), made));
    fs::remove_file(base.join("disk.ext4")).unwrap();
    run(&flyrun, &flags("without"), count).code(0).prints("1");
    assert_eq!(last_start(&flyrun, "without")["kind"], "cold_boot");
    run(&flyrun, &flags("again"), count).code(0).prints("1");
    assert_eq!(last_start(&flyrun, "again")["kind"], "base");
}

/// All that a workload can find out about its machine and that is not to differ from one run to the next. Of two boots with two
/// processors themselves, the reserves of memory (vm.*_reserve_kbytes) differ: they are a part of what is free at one moment.
const PORTRAIT: &str = r#"
exec 2>&1
id; pwd; env | sort; ulimit -a; umask
cat /proc/cmdline /proc/mounts /proc/self/cgroup /proc/self/status | grep -v -e [Pp]id -e [Tt]gid -e pgid -e sid: -e ctxt -e Vm -e Rss -e nonvol
ls -la / /dev /etc | grep -v vm-generation-id | awk '{ print $1, $3, $4, $5, $NF }'
ls /sys/block /sys/class/net /sys/devices/system/cpu /proc | grep -v '^[0-9]*$'
for disk in /sys/block/*; do cat $disk/size $disk/ro $disk/serial $disk/queue/*; done
blockdev --getsize64 /dev/vda; df -P | awk '{ print $1, $2, $6 }'
head -c 4096 /dev/vda | md5sum
ip link show eth0 | grep -o 'mtu [0-9]*'; ip route | sed 's/[0-9.]*[0-9]/ADDRESS/g'
mac=$(cat /sys/class/net/eth0/address); echo ${mac%:*:*}
sysctl -a 2>/dev/null | sort | grep -v -e random -e nr_ -e state -e fs.quota -e inode -e dentry -e file-nr -e ns_last_pid -e neigh -e lowmem -e min_free -e reserve_kb -e watermark
grep -e MemTotal /proc/meminfo
cat /proc/cpuinfo | grep -v -e MHz -e bogomips
"#;

#[test]
fn a_workload_cannot_tell_a_base_from_a_boot() {
    for flags in [&[][..], &["--read-only", "--tmpfs", "/run"], &["--cpus", "2"], &["-v", "base-like:/data"]]
    {
        let portrait = |how: &[&str]| {
            let flags = [&["--rm", "--hostname", "like", "-m", "128m"], flags, how].concat();
            run(Flyrun::shared(), &flags, PORTRAIT).code(0).text()
        };
        let (booted, resumed) = (portrait(&["--cold"]), portrait(&[]));
        let lines = |text: &str| text.lines().map(str::to_string).collect::<BTreeSet<_>>();
        let (one, other) = (lines(&booted), lines(&resumed));
        let differing: Vec<_> = one.symmetric_difference(&other).collect();
        assert!(differing.is_empty(), "{flags:?}: {differing:#?}");
        assert_eq!(booted.lines().count(), resumed.lines().count(), "{flags:?}");
        assert!(booted.lines().count() > 300, "{booted}");
    }
}

fn now_ns() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos()
}

#[test]
fn each_machine_from_a_base_has_its_own_time_and_randomness() {
    let mut seen = BTreeSet::new();
    for _ in 0..6 {
        let before = now_ns();
        let script = "cat /dev/vm-generation-id /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid; \
                      head -c 16 /dev/urandom | md5sum; mktemp -u; cut -d. -f1 /proc/uptime; adjtimex | grep -e time.tv_";
        let text = run(Flyrun::shared(), &["--rm"], script).code(0).text();
        let after = now_ns();
        let lines: Vec<&str> = text.lines().collect();
        for secret in &lines[..5] {
            assert!(seen.insert(secret.to_string()), "{secret} came twice");
        }
        // A machine is as old as the time that its kernel ran.
        let uptime: u64 = lines[5].parse().unwrap();
        assert!(uptime < 60, "{text}");
        let number = |name: &str| -> u128 {
            let line = lines.iter().find(|line| line.contains(name)).unwrap();
            line.split_whitespace().last().unwrap().parse().unwrap()
        };
        // busybox counts its fractions in microseconds.
        let inside = number("tv_sec") * 1_000_000_000 + number("tv_usec") * 1000;
        assert!(before <= inside + 1000 && inside <= after, "{before} {inside} {after}");
    }
}

#[test]
fn a_base_that_is_none_is_replaced_and_the_machine_boots() {
    let flyrun = without_bases();
    let flags = ["--rm", "-m", OWN_SIZE, "--network", "none"];
    run(&flyrun, &flags, "echo first").code(0).prints("first");
    let base = bases(&flyrun).remove(0);
    let damages: [(&str, &dyn Fn()); 4] = [
        ("truncated", &|| fs::write(base.join("memory"), "short").unwrap()),
        ("corrupted", &|| {
            let mut state = fs::read(base.join("state")).unwrap();
            let middle = state.len() / 2;
            state[middle] ^= 1;
            fs::write(base.join("state"), state).unwrap();
        }),
        ("missing", &|| fs::remove_file(base.join("memory")).unwrap()),
        // A guest that wakes up without its memory crashes.
        ("triple-faulted", &|| {
            let memory = fs::File::create(base.join("memory")).unwrap();
            memory.set_len(97 << 20).unwrap();
        }),
    ];
    for (name, damage) in damages {
        damage();
        let outcome = run(&flyrun, &flags, "echo all the same").code(0).prints("all the same");
        outcome.complains_about("cannot start from the base snapshot, and boots").complains_about(name);
        assert_eq!(bases(&flyrun), [] as [PathBuf; 0], "{name}");
        run(&flyrun, &flags, "echo again").code(0).prints("again");
        assert_eq!(bases(&flyrun), std::slice::from_ref(&base), "{name}");
    }
}

#[test]
fn what_a_killed_maker_left_is_in_nobodys_way() {
    let flyrun = without_bases();
    run(&flyrun, &["--rm", "-m", OWN_SIZE, "--network", "none"], "true").code(0);
    let base = bases(&flyrun).remove(0);
    fs::rename(&base, base.with_extension("new")).unwrap();
    fs::remove_file(base.with_extension("new").join("state")).unwrap();
    fs::write(base.with_extension("lock"), "").unwrap();
    fs::create_dir(base.with_extension("gone7")).unwrap();
    run(&flyrun, &["--name", "next", "-m", OWN_SIZE, "--network", "none"], "echo next")
        .code(0)
        .prints("next");
    assert_eq!(last_start(&flyrun, "next")["kind"], "base");
    assert_eq!(bases(&flyrun), [base]);
}

#[test]
fn many_first_machines_at_once_all_run() {
    let flyrun = without_bases();
    run(&flyrun, &["--rm", "--cold", "--network", "none"], "true").code(0);
    let names = ["m0", "m1", "m2", "m3"];
    std::thread::scope(|scope| {
        let all = names.map(|name| {
            let flyrun = &flyrun;
            let flags = ["--name", name, "-m", OWN_SIZE, "--network", "none"];
            scope.spawn(move || run(flyrun, &flags, &format!("echo {name}")).code(0).prints(name))
        });
        all.into_iter().for_each(|one| drop(one.join().unwrap()));
    });
    // All but the one that makes the base boot, and say why.
    let starts = names.map(|name| last_start(&flyrun, name));
    assert_eq!(bases(&flyrun).len(), 1, "{:?} {starts:?}", bases(&flyrun));
    assert!(starts.iter().any(|start| start["kind"] == "base"), "{starts:?}");
}

#[test]
fn a_machine_from_a_base_is_suspended_resumed_and_cloned_also_when_the_base_is_gone() {
    let flyrun = without_bases();
    let script = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done";
    run(&flyrun, &["-d", "--name", "long", "-m", OWN_SIZE], script).code(0);
    let call = |words: &[&str]| flyrun.command(words).end().code(0);
    call(&["suspend", "long"]);
    let mut inspected = call(&["inspect", "long"]);
    let directory = PathBuf::from(inspected.json()[0]["directory"].as_str().unwrap()).join("snapshot");
    let allocated = |name: &str| {
        use std::os::unix::fs::MetadataExt;
        fs::metadata(directory.join(name)).unwrap().blocks() * 512
    };
    // Written is only what differs from the base.
    assert!(allocated("memory") < allocated("base"), "{} {}", allocated("memory"), allocated("base"));
    bases(&flyrun).iter().for_each(|base| fs::remove_dir_all(base).unwrap());
    call(&["resume", "long"]);
    assert_eq!(last_start(&flyrun, "long")["kind"], "resumed");
    call(&["suspend", "long"]);
    call(&["clone", "long", "--name", "other"]);
    call(&["resume", "long"]);
    for name in ["long", "other"] {
        assert_eq!(call(&["exec", name, "echo", "here"]).text(), "here");
        call(&["rm", "-f", name]);
    }
}

#[test]
fn a_mistake_is_told_as_after_a_boot_and_once() {
    for (code, words) in [(127, &["/no/such/program"][..]), (126, &["/etc/passwd"])] {
        let image = busybox();
        let words = [&["run", "--rm", "--network", "none", &image], words].concat();
        let outcome = Flyrun::shared().command(&words).end().code(code);
        assert!(!outcome.errors().contains("base snapshot"), "{}", outcome.errors());
    }
    let image = busybox();
    let words = ["run", "--rm", "--network", "none", "-u", "nobody-here", &image, "true"];
    let mut outcome = Flyrun::shared().command(&words).end().code(125).complains_about("nobody-here");
    if outcome.errors().contains("base snapshot") {
        outcome.fail("it was tried twice");
    }
}

#[test]
fn more_variables_than_one_message_holds_are_booted_with() {
    let flyrun = Flyrun::shared();
    let long = format!("LONG={}", "x".repeat(100_000));
    let flags = ["--name", "long-env", "--network", "none", "-e", &long];
    run(flyrun, &flags, "echo ${#LONG}").code(0).prints("100000");
    let last_start = last_start(flyrun, "long-env");
    flyrun.command(&["rm", "long-env"]).end().code(0);
    assert_eq!(last_start["kind"], "cold_boot");
    assert!(last_start["no_base"].as_str().unwrap().contains("too long"), "{last_start}");
}
