//! A machine with a workload that counts, for the tests that suspend it.

use std::path::PathBuf;
use std::time::Duration;

use crate::flyrun::{Flyrun, Invocation, Outcome};
use crate::image::busybox;

/// Counts on standard output, and in a file of its own disk.
pub const COUNTER: &str = "i=0; while :; do i=$((i+1)); echo line $i; echo $i > /count; sleep 0.05; done";

/// How often something is looked at that is to come true in a while.
const ATTEMPTS: usize = 3000;
const PAUSE: Duration = Duration::from_millis(100);

/// `flyrun ARGUMENTS…`
pub fn command(arguments: &[&str]) -> Invocation<'static> {
    Flyrun::shared().command(arguments)
}

/// Waits until it is true.
#[track_caller]
pub fn wait_until(what: &str, mut is_true: impl FnMut() -> bool) {
    for _ in 0..ATTEMPTS {
        if is_true() {
            return;
        }
        std::thread::sleep(PAUSE);
    }
    panic!("this does not come true: {what}");
}

/// The process with these words in its command line.
#[track_caller]
pub fn pid_of(program: &str, id: &str) -> i32 {
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let is_meant = match program {
            "flyrun monitor" => line.contains(" monitor ") && line.contains(id),
            _ => line.contains("flyrun-vmm") && line.contains(id),
        };
        if let (true, Ok(pid)) = (is_meant, entry.file_name().to_string_lossy().parse()) {
            return pid;
        }
    }
    panic!("no {program} of {id} runs");
}

/// A machine in the background, removed at the end of its test.
#[derive(Debug)]
pub struct Machine(pub String);

impl Machine {
    /// `flyrun run -d --name NAME FLAGS… busybox sh -c SCRIPT`, to be started.
    pub fn invocation(name: &str, flags: &[&str], script: &str) -> Invocation<'static> {
        let image = busybox();
        command(&[&["run", "-d", "--cold", "--name", name], flags, &[&image, "sh", "-c", script]].concat())
    }

    /// One that runs this script.
    pub fn start(name: &str, flags: &[&str], script: &str) -> Machine {
        let machine = Machine(name.to_string());
        Machine::invocation(name, flags, script).end().code(0);
        machine
    }

    /// `flyrun COMMAND… NAME`
    pub fn invoke(&self, words: &[&str]) -> Invocation<'static> {
        command(&[words, &[&self.0]].concat())
    }

    /// The same, to its end.
    pub fn call(&self, words: &[&str]) -> Outcome {
        self.invoke(words).end()
    }

    /// `flyrun exec NAME sh -c SCRIPT`, which must succeed.
    #[track_caller]
    pub fn exec(&self, script: &str) -> String {
        command(&["exec", &self.0, "sh", "-c", script]).end().code(0).text()
    }

    /// Something that `flyrun inspect` tells.
    #[track_caller]
    pub fn inspect(&self, key: &str) -> serde_json::Value {
        self.call(&["inspect"]).code(0).json()[0][key].clone()
    }

    /// The process id of its flyrun-vmm.
    #[track_caller]
    pub fn vmm(&self) -> i32 {
        pid_of("flyrun-vmm", self.inspect("id").as_str().unwrap())
    }

    /// The machine's state.
    #[track_caller]
    pub fn state(&self) -> String {
        self.inspect("state").as_str().unwrap().to_string()
    }

    /// How it came to run: `resumed` or `cold_boot`.
    #[track_caller]
    pub fn last_start(&self) -> String {
        self.inspect("last_start")["kind"].as_str().unwrap_or_default().to_string()
    }

    /// Its directory.
    #[track_caller]
    pub fn directory(&self) -> PathBuf {
        self.inspect("directory").as_str().unwrap().into()
    }

    /// What it has written.
    #[track_caller]
    pub fn log(&self) -> String {
        self.call(&["logs"]).code(0).text()
    }

    /// Waits until it is in that state.
    #[track_caller]
    pub fn wait_for_state(&self, state: &str) {
        wait_until(&format!("{} is {state}", self.0), || self.state() == state);
    }

    /// Waits until it has written so many more lines.
    #[track_caller]
    pub fn wait_for_lines(&self, more: usize) {
        let before = self.log().lines().count();
        wait_until("it prints something", || self.log().lines().count() >= before + more);
    }

    /// Checks that a counter has counted without a gap, from one again after each boot.
    #[track_caller]
    pub fn check_count(&self) {
        let mut last = 0;
        for line in self.log().lines() {
            let number: usize = line.strip_prefix("line ").unwrap().parse().unwrap();
            assert!(number == last + 1 || number == 1, "{number} behind {last}");
            last = number;
        }
    }

    /// Writes the snapshot's state over, so that it is refused.
    pub fn damage_snapshot(&self) {
        let state = self.directory().join("snapshot/state");
        let mut bytes = std::fs::read(&state).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&state, bytes).unwrap();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.call(&["rm", "-f"]);
    }
}
