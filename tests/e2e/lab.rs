//! A host of its own for a test, and an outside: two network namespaces and a cable between them.

use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::Flyrun;
use crate::flyrun::Outcome;

/// The outside's end of the cable.
pub const OUTSIDE: &str = "192.0.2.1";
/// The host's.
pub const HOST: &str = "192.0.2.2";
/// The outside's, of IPv6.
pub const OUTSIDE6: &str = "2001:db8::1";
/// The host's, of IPv6.
pub const HOST6: &str = "2001:db8::2";

/// How often something is tried that is to come true in a while.
const ATTEMPTS: usize = 600;

/// Both namespaces. They go when it is dropped.
#[derive(Debug)]
pub struct Lab {
    host: String,
    outside: String,
}

impl Lab {
    /// Both, with addresses, and nothing of flyrun's in them. `resolv_conf` is what the host has.
    pub fn new(resolv_conf: &str) -> Lab {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let number = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let lab = Lab { host: format!("host-{number}"), outside: format!("out-{number}") };
        let Lab { host, outside } = &lab;
        std::fs::create_dir_all(format!("/etc/netns/{host}")).unwrap();
        std::fs::write(format!("/etc/netns/{host}/resolv.conf"), resolv_conf).unwrap();
        sh(&format!(
            "ip netns add {host}; ip netns add {outside}
             ip link add name cable netns {host} type veth peer name cable netns {outside}
             ip -n {host} address add {HOST}/24 dev cable; ip -n {host} address add {HOST6}/64 dev cable nodad
             ip -n {outside} address add {OUTSIDE}/24 dev cable; ip -n {outside} address add {OUTSIDE6}/64 dev cable nodad
             for space in {host} {outside}; do ip -n $space link set lo up; ip -n $space link set cable up; done"
        ));
        lab
    }

    fn wrapper(space: &str) -> [&str; 4] {
        ["ip", "netns", "exec", space]
    }

    /// Runs a script on the host and gives what it prints.
    pub fn host(&self, script: &str) -> String {
        sh(&format!("{} sh -ec '{script}'", Self::wrapper(&self.host).join(" ")))
    }

    /// Runs a script outside and gives what it prints.
    pub fn outside(&self, script: &str) -> String {
        sh(&format!("{} sh -ec '{script}'", Self::wrapper(&self.outside).join(" ")))
    }

    /// Starts a program on the host that runs for as long as the value lives.
    pub fn on_host(&self, words: &[&str]) -> Background {
        Self::start(&self.host, words)
    }

    /// Starts a program outside.
    pub fn on_outside(&self, words: &[&str]) -> Background {
        Self::start(&self.outside, words)
    }

    fn start(space: &str, words: &[&str]) -> Background {
        let [program, rest @ ..] = Self::wrapper(space);
        let mut command = Command::new(program);
        Background::start(command.args(rest).args(words))
    }

    /// Runs this on a thread that is in the host's network.
    pub fn within<T: Send>(&self, run: impl FnOnce() -> T + Send) -> T {
        let run = || {
            self.enter();
            run()
        };
        std::thread::scope(|scope| scope.spawn(run).join().unwrap())
    }

    /// Brings the calling thread into the host's network, with those that it starts.
    pub fn enter(&self) {
        let space = std::fs::File::open(format!("/run/netns/{}", self.host)).unwrap();
        move_into_link_name_space(space.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
    }

    /// `flyrun run --rm …` to its end.
    pub fn run(&self, arguments: &[&str]) -> Outcome {
        Flyrun::shared().run(arguments).end_under(&Self::wrapper(&self.host))
    }

    /// `flyrun …` to its end.
    pub fn command(&self, arguments: &[&str]) -> Outcome {
        Flyrun::shared().command(arguments).end_under(&Self::wrapper(&self.host))
    }

    /// `run` without CAP_NET_ADMIN.
    pub fn run_without_rights(&self, arguments: &[&str]) -> Outcome {
        let [ip, netns, exec, space] = Self::wrapper(&self.host);
        let wrapper = [ip, netns, exec, space, "setpriv", "--bounding-set", "-net_admin", "--"];
        Flyrun::shared().run(arguments).end_under(&wrapper)
    }

    /// `flyrun run --rm …` for as long as the value lives.
    pub fn machine(&self, arguments: &[&str]) -> Background {
        Background::start(&mut Flyrun::shared().run(arguments).build(&Self::wrapper(&self.host)))
    }

    /// `flyrun ARGUMENTS…` for as long as the value lives; what it tells on standard error goes to a file.
    pub fn background(&self, arguments: &[&str], errors: &std::path::Path) -> Background {
        let mut command = Flyrun::shared().command(arguments).build(&Self::wrapper(&self.host));
        Background::start(command.stderr(std::fs::File::create(errors).unwrap()))
    }

    /// Waits until the script, run on the host, succeeds and prints something.
    #[track_caller]
    pub fn wait_for(&self, script: &str) -> String {
        for _ in 0..ATTEMPTS {
            let output = command(&format!("{} sh -ec '{script}'", Self::wrapper(&self.host).join(" ")));
            if output.status.success() && !output.stdout.is_empty() {
                return String::from_utf8_lossy(&output.stdout).trim().to_string();
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        panic!("this does not come true: {script}");
    }

    /// What flyrun has made in the host's network: its interfaces and its rules.
    pub fn traces(&self) -> String {
        self.host("ip -brief link | grep fly || true; nft list ruleset")
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for space in [&self.host, &self.outside] {
            let _ = Command::new("ip").args(["netns", "delete", space]).status();
            let _ = std::fs::remove_dir_all(format!("/etc/netns/{space}"));
        }
    }
}

/// A process that is asked to end, and waited for, when dropped.
#[derive(Debug)]
pub struct Background(Child);

impl Background {
    fn start(command: &mut Command) -> Background {
        Background(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap())
    }

    /// Sends a signal and waits for the end; gives the exit code, where there is one.
    pub fn end(mut self, signal: Signal) -> Option<i32> {
        self.signal(signal);
        self.0.wait().unwrap().code()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let _ = kill_process(Pid::from_child(&self.0), signal);
    }
}

impl Background {
    /// Its process id.
    pub fn pid(&self) -> i32 {
        Pid::from_child(&self.0).as_raw_nonzero().get()
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.signal(Signal::TERM);
        let _ = self.0.wait();
    }
}

fn command(script: &str) -> std::process::Output {
    Command::new("sh").args(["-ec", script]).stdin(Stdio::null()).output().unwrap()
}

#[track_caller]
fn sh(script: &str) -> String {
    let output = command(script);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{script}\nended with {}: {out}{err}", output.status);
    out.trim().to_string()
}
