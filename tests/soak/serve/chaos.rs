//! Kills what flyrun consists of, and writes new versions of apps.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tests::Flyrun;
use tests::serving::Serving;

use super::world::World;
use super::{APPS, Random, file, name};
use crate::{Process, processes};

pub struct Chaos<'w> {
    world: &'w World,
    random: Random,
}

impl<'w> Chaos<'w> {
    pub fn new(world: &'w World, random: Random) -> Chaos<'w> {
        Chaos { world, random }
    }

    /// Until the end; from `calm` on `flyrun serve` is left alone.
    pub fn run(&mut self, serving: &mut Serving, end: Instant, calm: Instant) {
        let mut minute = Instant::now();
        let mut restart = Instant::now() + self.until_restart();
        while Instant::now() < end && !self.world.has_failed() {
            sleep(Duration::from_millis(1000 + self.random.below(9000)));
            match self.random.below(14) {
                0..5 => self.kill_one("a monitor", |process| is_of(process, "monitor")),
                5..10 => self.kill_one("a VMM", |process| {
                    process.arguments.first().is_some_and(|name| name.ends_with("flyrun-vmm"))
                }),
                _ => self.deploy(serving),
            }
            if Instant::now() > restart && restart < calm {
                self.restart(serving);
                restart = Instant::now() + self.until_restart();
            }
            if minute.elapsed() > Duration::from_secs(60) {
                minute = Instant::now();
                println!("{:?}", super::Rest::of(serving));
            }
        }
    }

    fn kill_one(&mut self, what: &str, is_meant: impl Fn(&Process) -> bool) {
        let candidates: Vec<_> = processes()
            .into_iter()
            .filter(is_meant)
            .filter_map(|process| Some((process.pid, app_of(&process)?)))
            .collect();
        if candidates.is_empty() {
            return;
        }
        let (pid, app) = candidates[self.random.below(candidates.len() as u64) as usize];
        self.world.kills(app);
        if kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).is_ok() {
            self.world.counts(&format!("kills of {what}"));
        }
    }

    /// Often one after another, so that the next finds the last one under way.
    fn deploy(&mut self, serving: &Serving) {
        for _ in 0..=self.random.below(2) {
            let app = self.random.below(APPS as u64) as usize;
            serving.write(&name(app), &file(app, self.world.deploys(app)));
            self.world.counts("deploys");
            sleep(Duration::from_millis(self.random.below(1500)));
        }
    }

    fn until_restart(&mut self) -> Duration {
        Duration::from_secs(20 + self.random.below(100))
    }

    /// Mostly without a warning.
    fn restart(&mut self, serving: &mut Serving) {
        let signal = if self.random.below(3) == 0 { Signal::TERM } else { Signal::KILL };
        self.world.serves(false);
        serving.end(signal);
        sleep(Duration::from_millis(self.random.below(2000)));
        serving.again();
        self.world.serves(true);
        self.world.counts(&format!("ends of serve by {signal:?}"));
    }
}

fn is_of(process: &Process, word: &str) -> bool {
    let root = Flyrun::shared().root().display().to_string();
    process.arguments.iter().any(|argument| argument == word)
        && process.arguments.iter().any(|argument| *argument == root)
}

/// The app whose machine a monitor or a VMM is.
fn app_of(process: &Process) -> Option<usize> {
    let machines = Flyrun::shared().root().join("machines");
    let ids = std::fs::read_dir(&machines).ok()?.flatten();
    let ids = ids.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let id =
        ids.into_iter().find(|id| process.arguments.iter().any(|argument| argument.contains(id.as_str())))?;
    let record = std::fs::read(Path::new(&machines).join(id).join("machine.json")).ok()?;
    let record: serde_json::Value = serde_json::from_slice(&record).ok()?;
    let label = record["config"]["labels"]["flyrun.app"].as_str()?.to_string();
    (0..APPS).find(|app| name(*app) == label)
}
