//! Many clones of one machine: what each of them takes of the host's memory, and that each is somebody of its own.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::Value;

use crate::Flyrun;
use crate::image::layout;

const MEMORY_MIB: u64 = 128;
/// Answers each connection with a random number, and with the address that it would send from itself.
const GUEST: &str = "
import os, socket
server = socket.create_server(('', 8000))
while True:
    connection, _ = server.accept()
    connection.recv(1)
    probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    probe.connect(('192.0.2.1', 9))
    connection.sendall(f'{os.urandom(16).hex()} {probe.getsockname()[0]} {socket.gethostname()}'.encode())
    connection.close()
";
const ATTEMPTS: usize = 600;

/// Makes `count` clones of a machine that runs python, asks each, and prints what one of them takes.
pub fn are_somebody_each(flyrun: &Flyrun, count: usize) {
    let memory = format!("{MEMORY_MIB}m");
    let words =
        ["run", "-d", "--name", "parent", "--memory", &memory, &layout("python"), "python3", "-c", GUEST];
    let parent = flyrun.command(&words).end().code(0).text();
    wait_until_it_answers(flyrun, &parent);
    let number = count.to_string();
    let cloned = flyrun.command(&["clone", "-n", &number, "--name", "child", "parent"]).end().code(0).text();
    let ids: Vec<_> = cloned.lines().chain([parent.as_str()]).collect();
    assert_eq!(ids.len(), count + 1);

    let mut seen = BTreeSet::new();
    for id in &ids {
        let inspected = inspect(flyrun, id);
        assert_eq!(inspected["last_start"]["kind"], "resumed", "{inspected}");
        let own = inspected["network"]["ipv4"].as_str().unwrap();
        let answer =
            ask(own).unwrap_or_else(|error| panic!("{id} does not answer: {error}{}", told(flyrun, id)));
        let [random, address, host] = answer.split(' ').collect::<Vec<_>>().try_into().unwrap();
        assert_eq!((address, host), (own, *id), "it takes itself for somebody else");
        for mark in [random, address] {
            assert!(seen.insert(mark.to_string()), "{mark} has been told by another");
        }
    }

    let takes: Vec<_> = ids[..count].iter().map(|id| memory_of(id)).collect();
    let mean = |part: fn(&Takes) -> u64| takes.iter().map(part).sum::<u64>() / count as u64;
    let (vmm, monitor) = (mean(|takes| takes.vmm_kib), mean(|takes| takes.monitor_kib));
    println!(
        "{count} clones of a python machine of {MEMORY_MIB} MiB: each takes {} KiB more of the host, {vmm} for its VMM with \
         the guest's memory, {monitor} for its monitor",
        vmm + monitor
    );
    // What they have not written to is one file's pages for all.
    assert!(vmm < (MEMORY_MIB << 10) / 4, "a clone takes {vmm} KiB");
    for part in ids.chunks(50) {
        flyrun.command(&[&["rm", "-f"], part].concat()).end().code(0);
    }
}

fn inspect(flyrun: &Flyrun, id: &str) -> Value {
    flyrun.command(&["inspect", id]).end().code(0).json()[0].take()
}

fn wait_until_it_answers(flyrun: &Flyrun, id: &str) {
    let address = inspect(flyrun, id)["network"]["ipv4"].as_str().unwrap().to_string();
    for _ in 0..ATTEMPTS {
        if ask(&address).is_ok() {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("{id} does not answer{}", told(flyrun, id));
}

/// What there is to say of one that does not do what it should.
fn told(flyrun: &Flyrun, id: &str) -> String {
    let (inspected, log) = (inspect(flyrun, id), flyrun.command(&["logs", id]).end());
    format!("\n{inspected}\n{}{}", log.text(), log.errors())
}

fn ask(address: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect((address, 8000))?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    stream.write_all(b"\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// The proportional shares of a machine's processes.
#[derive(Default)]
struct Takes {
    vmm_kib: u64,
    monitor_kib: u64,
}

fn memory_of(id: &str) -> Takes {
    let mut takes = Takes::default();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        if !line.contains(id) {
            continue;
        }
        let rollup = fs::read_to_string(entry.path().join("smaps_rollup")).unwrap();
        let pss = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap();
        let kib = pss.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
        match line.split('\0').next().is_some_and(|program| program.ends_with("flyrun-vmm")) {
            true => takes.vmm_kib += kib,
            false => takes.monitor_kib += kib,
        }
    }
    assert!(takes.vmm_kib > 0 && takes.monitor_kib > 0, "{id} does not run");
    takes
}
