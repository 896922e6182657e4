//! What is known of the apps while others ask and kill, and what follows for an answer.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tests::http::{Answer, Fault};

use super::{machines, name};

/// So long after a kill its consequences may be seen: nothing tells the proxy before.
const ECHO: Duration = Duration::from_secs(30);

/// Shared by all.
pub struct World {
    inner: Mutex<Inner>,
    has_failed: AtomicBool,
}

struct Inner {
    apps: Vec<App>,
    /// When `flyrun serve` did not run.
    downs: Vec<(Instant, Option<Instant>)>,
    counts: BTreeMap<String, u64>,
    faults: Vec<String>,
}

#[derive(Clone, Default)]
struct App {
    /// The newest version that was written down, and that has answered.
    written: u64,
    answered: u64,
    /// When it was killed, or replaced.
    kills: Vec<Instant>,
}

/// A request that is under way.
pub struct Asked {
    pub app: usize,
    pub kind: &'static str,
    /// What follows the version on the first line, and the lines after that.
    pub rest: String,
    pub begun: Instant,
    /// No answer is older, where there is one machine.
    least: u64,
}

impl World {
    pub fn new(apps: usize) -> World {
        let apps = vec![App { written: 1, answered: 1, kills: Vec::new() }; apps];
        let (downs, counts, faults) = Default::default();
        World { inner: Mutex::new(Inner { apps, downs, counts, faults }), has_failed: AtomicBool::new(false) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    /// Whether there is any use in going on.
    pub fn has_failed(&self) -> bool {
        self.has_failed.load(Ordering::Relaxed)
    }

    pub fn counts(&self, what: &str) {
        *self.lock().counts.entry(what.to_string()).or_default() += 1;
    }

    /// A machine of this app is about to be killed. A deploy that is under way, and whose machine has answered already, is rolled back
    /// then, to whichever version was the last that was deployed.
    pub fn kills(&self, app: usize) {
        let app = &mut self.lock().apps[app];
        app.kills.push(Instant::now());
        app.answered = 0;
    }

    /// The version to write next.
    pub fn deploys(&self, app: usize) -> u64 {
        let app = &mut self.lock().apps[app];
        app.written += 1;
        app.kills.push(Instant::now());
        app.written
    }

    pub fn written(&self, app: usize) -> u64 {
        self.lock().apps[app].written
    }

    /// `flyrun serve` ends now, or runs again.
    pub fn serves(&self, does: bool) {
        let downs = &mut self.lock().downs;
        match downs.last_mut() {
            Some((_, until)) if does => *until = Some(Instant::now()),
            _ => downs.push((Instant::now(), None)),
        }
    }

    pub fn asks(&self, app: usize, kind: &'static str, rest: String) -> Asked {
        Asked { app, kind, rest, begun: Instant::now(), least: self.lock().apps[app].answered }
    }

    /// What came of a request is right, or the run has failed.
    pub fn judges(&self, asked: &Asked, connected: Instant, result: Result<Answer, Fault>) {
        // Nothing may have told a connection of before that nobody is there any more.
        let was_down = self.was_down(connected.min(asked.begun), Duration::ZERO);
        let told = match &result {
            Ok(answer) => match answer.status {
                200 => self.page(asked, answer),
                502..=504 => self.failure(asked, answer),
                status => Err(format!("{status} {:?}", answer.text())),
            },
            Err(Fault::Unanswered(_)) if was_down => Ok("no answer: serve had ended".into()),
            Err(Fault::Broken(_)) if was_down => Ok("broken off: serve had ended".into()),
            // The head was out already.
            Err(Fault::Broken(_)) if self.was_killed(asked) => {
                Ok("broken off: its machine was killed".into())
            }
            Err(fault) => Err(format!("{fault:?}")),
        };
        match told {
            Ok(told) => self.counts(&format!("{} {told}", asked.kind)),
            Err(why) => {
                let app = name(asked.app);
                let fault = format!("{} of {app}, begun {:?} ago: {why}", asked.kind, asked.begun.elapsed());
                eprintln!("FAULT: {fault}");
                self.lock().faults.push(fault);
                self.has_failed.store(true, Ordering::Relaxed);
            }
        }
    }

    /// A page is its app's, of a version that there may be, and what was asked for.
    fn page(&self, asked: &Asked, answer: &Answer) -> Result<String, String> {
        let text = String::from_utf8_lossy(&answer.body);
        let wrong = |why: &str| Err(format!("{why}: {:?}", text.get(..300).unwrap_or(&text)));
        let prefix = format!("{} v", name(asked.app));
        let Some(rest) = text.strip_prefix(&prefix) else { return wrong("not this app's") };
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        let Ok(version) = digits.parse::<u64>() else { return wrong("no version") };
        if rest[digits.len()..] != asked.rest {
            return wrong("not what was asked for");
        }
        let was_killed = self.was_killed(asked);
        let app = &mut self.lock().apps[asked.app];
        let is_old = machines(asked.app) == 1 && version < asked.least && !was_killed;
        if version > app.written || is_old {
            return wrong(&format!("a version that there is not: {} to {} are", asked.least, app.written));
        }
        app.answered = app.answered.max(version);
        Ok("200".into())
    }

    /// Nobody is told of a failure without a reason, nor of one that was not ours.
    fn failure(&self, asked: &Asked, answer: &Answer) -> Result<String, String> {
        let text = answer.text();
        let told = format!("{} {text:?} {:?}", answer.status, answer.head);
        let Some((why, id)) = text.split_once(" (id ") else {
            return Err(format!("without a reason: {told}"));
        };
        if why.is_empty() || id.len() < 2 || answer.field("retry-after").is_none() {
            return Err(format!("without a reason or Retry-After: {told}"));
        }
        if !self.was_killed(asked) && !self.was_down(asked.begun, ECHO) {
            return Err(format!("nothing was killed: {told}"));
        }
        Ok(format!("{} {why}", answer.status))
    }

    fn was_down(&self, since: Instant, echo: Duration) -> bool {
        self.lock().downs.iter().any(|(_, until)| until.is_none_or(|until| until + echo >= since))
    }

    fn was_killed(&self, asked: &Asked) -> bool {
        self.lock().apps[asked.app].kills.iter().any(|at| *at + ECHO >= asked.begun)
    }

    /// What there was, and what was wrong.
    pub fn tell(&self) {
        let inner = self.lock();
        for (what, count) in &inner.counts {
            println!("{count:>7} {what}");
        }
        assert!(inner.faults.is_empty(), "{} faults:\n{}", inner.faults.len(), inner.faults.join("\n"));
    }
}
