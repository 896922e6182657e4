//! A `flyrun serve` in a network of its own, with its apps' machines.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::flyrun::scratch;
use crate::lab::{Background, Lab};
use crate::suspended::wait_until;

/// Runs until it is dropped, and removes its machines then.
#[derive(Debug)]
pub struct Serving {
    /// Where it runs.
    pub lab: Arc<Lab>,
    directory: TempDir,
    process: Option<Background>,
    apps: Vec<String>,
    flags: Vec<String>,
    /// How many times it was started.
    starts: usize,
}

impl Serving {
    /// Serves these files, each a name and a text.
    pub fn start(files: &[(&str, &str)]) -> Serving {
        Serving::start_with(&[], files)
    }

    /// The same, with flags.
    pub fn start_with(flags: &[&str], files: &[(&str, &str)]) -> Serving {
        let flags = flags.iter().map(|flag| flag.to_string()).collect();
        let (lab, directory) = (Arc::new(Lab::new("")), scratch());
        let mut serving = Serving { lab, directory, process: None, apps: Vec::new(), flags, starts: 0 };
        std::fs::create_dir(serving.path()).unwrap();
        for (app, text) in files {
            serving.apps.push(app.to_string());
            serving.write(app, text);
        }
        serving.again();
        serving
    }

    /// Where the files of its apps are.
    pub fn path(&self) -> PathBuf {
        self.directory.path().join("apps")
    }

    /// Puts a file in the place of an app's.
    pub fn write(&self, app: &str, text: &str) {
        let draft = self.directory.path().join("new");
        std::fs::write(&draft, text).unwrap();
        std::fs::rename(draft, self.path().join(format!("{app}.toml"))).unwrap();
    }

    /// Starts it, where it has ended.
    pub fn again(&mut self) {
        let path = self.path().display().to_string();
        let flags: Vec<_> = self.flags.iter().map(String::as_str).collect();
        let words = [&["serve", "--json", "--metrics", "127.0.0.1:9464"], &*flags, &[&path]].concat();
        self.starts += 1;
        self.process = Some(self.lab.background(&words, &self.log_path()));
        wait_until("it serves", || self.log().contains("\"serving\""));
    }

    /// Ends it so; gives the exit code.
    pub fn end(&mut self, signal: Signal) -> Option<i32> {
        self.process.take().unwrap().end(signal)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        self.process.as_ref().unwrap().signal(signal);
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        // What is started is `ip netns exec`, which becomes flyrun.
        self.process.as_ref().unwrap().pid()
    }

    /// The file of what it tells, which is another one after each start.
    pub fn log_path(&self) -> PathBuf {
        self.directory.path().join(format!("log-{}", self.starts))
    }

    /// What it has told.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap()
    }

    /// The body of what is answered to a GET.
    #[track_caller]
    pub fn get(&self, host: &str, port: u16) -> String {
        let curl =
            format!("curl -sS --max-time 120 --fail-with-body -H host:{host} http://127.0.0.1:{port}/");
        self.lab.host(&curl)
    }

    /// The slots of an app, as `flyrun status` tells.
    #[track_caller]
    pub fn machines(&self, app: &str) -> Vec<Value> {
        self.told(&[app])
    }

    /// Those of all apps.
    #[track_caller]
    pub fn all_machines(&self) -> Vec<Value> {
        self.told(&[])
    }

    #[track_caller]
    fn told(&self, apps: &[&str]) -> Vec<Value> {
        let told = self.lab.command(&[&["status", "--json"], apps].concat()).code(0).json();
        let groups = told.as_array().unwrap().iter();
        groups.flat_map(|group| group["machines"].as_array().unwrap().clone()).collect()
    }

    /// The state of an app's first machine.
    pub fn state(&self, app: &str) -> String {
        let machines = self.machines(app);
        machines.first().map_or("none", |machine| machine["state"].as_str().unwrap()).to_string()
    }

    /// Waits for that.
    #[track_caller]
    pub fn wait_for_state(&self, app: &str, state: &str) {
        wait_until(&format!("{app} is {state}; {}", self.log()), || self.state(app) == state);
    }

    /// The most memory that it has needed so far, in KiB.
    pub fn peak_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// A figure of `/metrics`.
    #[track_caller]
    pub fn figure(&self, name: &str) -> f64 {
        let page = self.lab.host("curl -sS --max-time 60 http://127.0.0.1:9464/metrics");
        let line =
            page.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{name}: {page}"));
        line.trim().parse().unwrap()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- flyrun serve told:\n{}", self.log());
        }
        drop(self.process.take());
        if let Some(kept) = std::env::var_os("FLYRUN_TEST_LOGS") {
            for start in 1..=self.starts {
                let name = format!("log-{start}");
                let _ = std::fs::copy(self.directory.path().join(&name), Path::new(&kept).join(&name));
            }
        }
        for app in &self.apps {
            let filter = format!("label=flyrun.app={app}");
            let listed = self.lab.command(&["ps", "-aq", "--filter", &filter]).text();
            for id in listed.lines() {
                self.lab.command(&["rm", "-f", id]);
            }
        }
    }
}
