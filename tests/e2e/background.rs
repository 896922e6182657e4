//! A machine that runs while a test talks to it.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::process::{Pid, Signal, kill_process};

use crate::flyrun::{Flyrun, Invocation};
use crate::image::busybox;

/// A workload that does nothing for as long as it is let.
pub const IDLE: &str = "exec sleep 1000000";

/// A busybox machine that a `flyrun run` in the background owns.
#[derive(Debug)]
pub struct Machine {
    name: String,
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Machine {
    /// One that idles.
    pub fn idle() -> Machine {
        Machine::start(&[], IDLE)
    }

    /// One that runs this script.
    pub fn start(flags: &[&str], script: &str) -> Machine {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("m{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let image = busybox();
        let script = format!("echo ready; {script}");
        let arguments = [&["--name", &name], flags, &[&image, "sh", "-c", &script]].concat();
        let mut command = Flyrun::shared().run(&arguments).build(&[]);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        Machine { name, child, output }
    }

    /// What commands call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `flyrun exec FLAGS… NAME WORDS…`
    pub fn exec(&self, flags: &[&str], words: &[&str]) -> Invocation<'static> {
        Flyrun::shared().command(&[&["exec"], flags, &[&self.name], words].concat())
    }

    /// `flyrun exec NAME sh -c SCRIPT`
    pub fn sh(&self, script: &str) -> Invocation<'static> {
        self.exec(&[], &["sh", "-c", script])
    }

    /// Sends its owner, and so the workload, a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for its end; gives the owner's exit code and what the workload wrote.
    pub fn end(mut self) -> (Option<i32>, String) {
        let mut rest = String::new();
        self.output.read_to_string(&mut rest).unwrap();
        (self.child.wait().unwrap().code(), rest)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
