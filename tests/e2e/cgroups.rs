//! A machine's cgroup on the host: who is in it, and that nothing of it is left.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::Stdio;

use tests::suspended::{COUNTER, Machine, command, pid_of, wait_until};

const ALL: &str = "/sys/fs/cgroup/flyrun";

/// The cgroup of the machine with this id, if it has one.
fn cgroup(id: &str) -> Option<PathBuf> {
    let entries = fs::read_dir(ALL).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).find(|path| path.to_string_lossy().ends_with(&format!("-{id}")))
}

/// Where a process is.
fn place(process: i32) -> String {
    let told = fs::read_to_string(format!("/proc/{process}/cgroup")).unwrap_or_default();
    told.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default().to_string()
}

fn is_gone(id: &str) {
    wait_until(&format!("there is no cgroup of {id}"), || cgroup(id).is_none());
}

fn id(machine: &Machine) -> String {
    machine.inspect("id").as_str().unwrap().to_string()
}

/// All that works for the machine is in there, and held to these microseconds of 100,000.
#[track_caller]
fn is_held(id: &str, quota: &str) {
    let monitor = pid_of("flyrun monitor", id);
    wait_until("the monitor joins", || place(monitor).ends_with(&format!("-{id}/monitor")));
    let vmm = place(pid_of("flyrun-vmm", id));
    assert!(vmm.ends_with(&format!("-{id}/vmm")), "{vmm}");
    let max = fs::read_to_string(cgroup(id).unwrap().join("cpu.max")).unwrap();
    assert_eq!(max.trim(), format!("{quota} 100000"));
}

#[test]
fn the_monitor_of_a_machine_in_the_background_is_in_its_cgroup_while_the_machine_runs() {
    let machine = Machine::start("cgroup-background", &["--cpus", "0.5"], COUNTER);
    let id = id(&machine);
    is_held(&id, "50000");
    machine.call(&["update", "--cpus", "0.8"]).code(0);
    is_held(&id, "80000");
    machine.call(&["suspend"]).code(0);
    is_gone(&id);
    machine.call(&["resume"]).code(0);
    is_held(&id, "80000");
    machine.call(&["restart", "-t", "0"]).code(0);
    is_held(&id, "80000");
    machine.call(&["stop", "-t", "0"]).code(0);
    is_gone(&id);
    machine.call(&["start"]).code(0);
    is_held(&id, "80000");
    machine.call(&["rm", "-f"]).code(0);
    is_gone(&id);
}

#[test]
fn a_machine_that_runs_without_a_limit_is_held_with_its_monitor_when_it_gets_one() {
    let machine = Machine::start("cgroup-update", &[], COUNTER);
    let id = id(&machine);
    assert_eq!(cgroup(&id), None);
    machine.call(&["update", "--cpus", "0.5"]).code(0);
    is_held(&id, "50000");
    machine.call(&["rm", "-f"]).code(0);
    is_gone(&id);
}

#[test]
fn a_foreground_flyrun_joins_its_machine_and_leaves_it_with_the_exit_code() {
    let script = "read line; exit 7";
    let busybox = tests::image::busybox();
    let name = "cgroup-foreground";
    let flags = ["run", "--rm", "-i", "--name", name, "--cpu-shares", "512", &busybox, "sh", "-c", script];
    let mut flyrun = command(&flags).build(&[]).stdin(Stdio::piped()).spawn().unwrap();
    let process = i32::try_from(flyrun.id()).unwrap();
    let before = place(std::process::id().try_into().unwrap());
    wait_until("flyrun joins", || place(process).ends_with("/monitor"));
    let joined = place(process);
    let id = joined.trim_end_matches("/monitor").rsplit_once('-').unwrap().1.to_string();
    assert!(before != joined && cgroup(&id).is_some(), "{before} {joined}");
    flyrun.stdin.take().unwrap().write_all(b"go\n").unwrap();
    assert_eq!(flyrun.wait().unwrap().code(), Some(7));
    assert_eq!(cgroup(&id), None, "flyrun has ended, and its machine's cgroup is there");
}

#[test]
fn a_machine_beyond_its_memory_on_the_host_dies_and_its_monitor_tells_of_it() {
    let machine = Machine::start("cgroup-memory", &["--cpu-shares", "1024"], COUNTER);
    let id = id(&machine);
    let monitor = pid_of("flyrun monitor", &id);
    wait_until("the monitor joins", || place(monitor).ends_with("/monitor"));
    let bound = cgroup(&id).unwrap().join("vmm/memory.max");
    assert!(fs::read_to_string(&bound).unwrap().trim().parse::<u64>().is_ok(), "it has a bound");
    // Less than it holds already: the kernel has to end somebody.
    fs::write(&bound, "4096").unwrap();
    wait_until("the machine has failed", || machine.inspect("state") == "failed");
    assert!(machine.inspect("outcome")["error"].to_string().contains("SIGKILL"));
    is_gone(&id);
}
