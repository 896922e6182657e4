//! What is left when nothing is asked for any more.

use std::collections::BTreeSet;
use std::path::Path;

use rustix::process::Signal;
use tests::Flyrun;
use tests::http;
use tests::serving::Serving;
use tests::suspended::wait_until;

use super::world::World;
use super::{APPS, name};
use crate::{entries, left_in_run_dir, processes};

/// More memory than this is not needed by a `flyrun serve` after many requests than after few.
const MORE_KIB: u64 = 24 << 10;
/// Of a runtime's threads and connections that are kept for a while.
const MORE_DESCRIPTORS: usize = 16;

/// The lock of machines' names, which stays.
const NAMES: &str = ".names";

/// What a `flyrun serve` has.
#[derive(Clone, Copy, Debug)]
#[expect(dead_code, reason = "it is shown")]
pub struct Rest {
    resident_kib: u64,
    most_kib: u64,
    threads: u64,
    descriptors: usize,
    zombies: usize,
    machines_kib: u64,
}

impl Rest {
    pub fn of(serving: &Serving) -> Rest {
        let pid = serving.pid();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let figure = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
        };
        Rest {
            resident_kib: figure("VmRSS:"),
            most_kib: figure("VmHWM:"),
            threads: figure("Threads:"),
            descriptors: std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count),
            zombies: zombies(pid),
            machines_kib: disk_kib(&Flyrun::shared().root().join("machines")),
        }
    }
}

fn zombies(parent: i32) -> usize {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let stats = entries.filter_map(|entry| std::fs::read_to_string(entry.path().join("stat")).ok());
    let is_zombie = |stat: &String| {
        let fields = stat.rsplit(')').next().unwrap_or_default();
        fields.trim_start().starts_with(&format!("Z {parent} "))
    };
    stats.filter(is_zombie).count()
}

fn disk_kib(directory: &Path) -> u64 {
    let told = std::process::Command::new("du").arg("-sk").arg(directory).output().unwrap().stdout;
    String::from_utf8_lossy(&told).split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0)
}

/// Whether nothing runs, and nobody is waiting.
pub fn is_calm(serving: &Serving) -> bool {
    let told = serving.lab.command(&["status", "--json"]).code(0).json();
    let groups = told.as_array().unwrap();
    let rests =
        |machine: &serde_json::Value| ["suspended", "cold"].contains(&machine["state"].as_str().unwrap());
    groups.len() == APPS
        && groups
            .iter()
            .all(|group| group["waiting"] == 0 && group["machines"].as_array().unwrap().iter().all(rests))
        && company().is_empty()
}

/// Monitors and VMMs.
fn company() -> Vec<String> {
    let is_ours = |arguments: &[String]| {
        arguments.first().is_some_and(|name| name.ends_with("flyrun-vmm"))
            || arguments.iter().any(|argument| argument == "monitor")
    };
    let ours = processes().into_iter().filter(|process| is_ours(&process.arguments));
    ours.map(|process| process.arguments.join(" ")).collect()
}

/// Every app answers with the newest version that there is of it.
pub fn check_all_new(serving: &Serving, world: &World) {
    for app in 0..APPS {
        let wanted = format!("{} v{}", name(app), world.written(app));
        let request = http::get(&format!("{}.test", name(app)), "/");
        wait_until(&format!("{wanted} answers"), || {
            let answer =
                serving.lab.within(|| http::Client::connect(80).map(|mut client| client.ask(&request)));
            matches!(answer, Ok(Ok(answer)) if answer.text() == wanted)
        });
    }
}

/// Nothing has leaked.
pub fn check(serving: &mut Serving, before: &Rest, world: &World) {
    wait_until("nothing is left in the network", || {
        serving.lab.host("ip -brief link | grep fly || true").is_empty()
    });
    let after = Rest::of(serving);
    println!("at rest: {after:?}; {} descriptors at first", before.descriptors);
    assert_eq!(after.zombies, 0, "children whom nobody asked");
    assert!(after.descriptors <= before.descriptors + MORE_DESCRIPTORS, "{after:?} after {before:?}");
    assert!(after.resident_kib <= before.resident_kib + MORE_KIB, "{after:?} after {before:?}");
    assert_eq!(serving.end(Signal::TERM), Some(0));
    let flyrun = Flyrun::shared();
    let mut listed = flyrun.command(&["ps", "-a", "--json"]).end().code(0);
    let machines: Vec<_> = listed.json().as_array().unwrap().clone();
    let names: BTreeSet<_> = machines.iter().map(|machine| machine["name"].to_string()).collect();
    assert_eq!(names.len(), machines.len(), "{names:?}");
    let most: usize = (0..APPS).map(super::machines).sum();
    assert!(machines.len() <= most, "{} machines of {most}: {names:?}", machines.len());
    for machine in &machines {
        serving.lab.command(&["rm", "-f", machine["id"].as_str().unwrap()]).code(0);
    }
    let snapshots = flyrun.command(&["snapshot", "ls", "-q"]).end().code(0).text();
    for id in snapshots.lines() {
        serving.lab.command(&["snapshot", "rm", id]).code(0);
    }
    assert_eq!(serving.lab.traces(), "", "the network is as it was");
    let root = flyrun.root();
    for directory in ["machines", "snapshots", "usage/open"] {
        let left: Vec<_> = entries(&root.join(directory)).into_iter().filter(|name| name != NAMES).collect();
        assert_eq!(left, Vec::<String>::new(), "{directory}");
    }
    let left: Vec<_> = left_in_run_dir(flyrun).into_iter().filter(|name| !name.ends_with(".lock")).collect();
    assert_eq!(left, Vec::<String>::new(), "{}", flyrun.run_dir().display());
    assert!(!Path::new("/sys/fs/cgroup/flyrun").exists(), "a cgroup is left");
    assert_eq!(company(), Vec::<String>::new());
    assert!(!world.has_failed());
}
