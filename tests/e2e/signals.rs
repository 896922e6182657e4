//! Signals to a foreground flyrun.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tests::Flyrun;
use tests::image::busybox;

struct Running {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Running {
    /// Runs a script and waits for its first line, `ready`.
    fn start(script: &str) -> Running {
        let image = busybox();
        let mut command = Flyrun::shared().run(&[&image, "sh", "-c", script]).build(&[]);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut running = Running { child, output };
        assert_eq!(running.line(), "ready");
        running
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_string()
    }

    fn send(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn end(mut self) -> (Option<i32>, String) {
        let mut rest = String::new();
        self.output.read_to_string(&mut rest).unwrap();
        (self.child.wait().unwrap().code(), rest)
    }
}

#[test]
fn sigterm_reaches_the_process() {
    let running =
        Running::start("trap 'echo terminated; exit 5' TERM; echo ready; while :; do sleep 0.1; done");
    running.send(Signal::TERM);
    assert_eq!(running.end(), (Some(5), "terminated\n".to_string()));
}

#[test]
fn a_process_without_a_handler_ends_by_sigterm() {
    let running = Running::start("echo ready; exec sleep 1000");
    running.send(Signal::TERM);
    assert_eq!(running.end().0, Some(143));
}

#[test]
fn one_interrupt_reaches_the_process() {
    let running =
        Running::start("trap 'echo interrupted; exit 6' INT; echo ready; while :; do sleep 0.1; done");
    running.send(Signal::INT);
    assert_eq!(running.end(), (Some(6), "interrupted\n".to_string()));
}

#[test]
fn the_third_interrupt_ends_the_machine() {
    let script = "trap 'echo INT' INT; trap 'echo TERM' TERM; echo ready; while :; do sleep 0.1; done";
    let mut running = Running::start(script);
    running.send(Signal::INT);
    assert_eq!(running.line(), "INT");
    running.send(Signal::INT);
    assert_eq!(running.line(), "TERM");
    running.send(Signal::INT);
    assert_eq!(running.end().0, Some(130));
}
