//! The socket of those who want something done: `flyrun deploy`, `flyrun scale`. One request, a line of JSON; then each step as a line,
//! the last of which is `done` or `failed`. What was begun goes on when whoever asked has left.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::log::Log;
use super::status::{ask_all, control_of};
use crate::error::{Context as _, Error, Result};
use crate::paths::Paths;

/// A request has at most so many bytes: a fly.toml, and what JSON makes of it.
const MAX_ASK: u64 = 8 << 20;
/// So many are read at a time; others wait for their turn.
const MAX_READ: usize = 16;
/// It has to be there after so long.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is wanted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
pub enum Ask {
    Deploy(Deploy),
    Scale(Scale),
}

/// A version of an app.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deploy {
    pub app: String,
    /// The text of a fly.toml, and where it was read; the file that is served if there is none.
    pub file: Option<(String, String)>,
    pub image: Option<String>,
    pub strategy: Option<Strategy>,
    pub wait_timeout_ms: Option<u64>,
}

/// As the command line names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    Rolling,
    Bluegreen,
}

/// Numbers of machines.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scale {
    pub app: String,
    /// Of each group; of the app's only one, if its name is empty.
    pub counts: BTreeMap<String, u32>,
}

/// What is told while it is done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Step {
    /// What was wanted before is not done yet.
    Waiting,
    /// The image is fetched and unpacked if that was never done, and `release_command` run.
    Preparing {
        image: String,
    },
    /// So many machines of the new version are to be ready.
    Starting {
        group: String,
        machines: usize,
    },
    /// A check fails as yet.
    Unhealthy {
        machine: String,
        why: String,
    },
    Healthy {
        machine: String,
    },
    /// So many machines of the old version end their requests.
    Draining {
        machines: usize,
    },
    /// Requests go to the new version alone.
    Switched,
    RollingBack {
        why: String,
    },
    /// The last word.
    Done {
        app: String,
        /// Of each group.
        versions: BTreeMap<String, String>,
        /// Whether there was anything to do.
        changed: bool,
    },
    /// The last word.
    Failed {
        why: String,
    },
}

/// Tells whoever wants to know.
#[derive(Debug)]
pub struct Tell {
    steps: Option<mpsc::UnboundedSender<Step>>,
    /// Machines that were told to be healthy.
    healthy: Mutex<BTreeSet<String>>,
}

/// Something wanted, and who is told.
#[derive(Debug)]
pub struct Job {
    pub ask: Ask,
    pub tell: Tell,
}

impl Tell {
    /// Nobody wants to know.
    pub fn nobody() -> Tell {
        Tell { steps: None, healthy: Mutex::default() }
    }

    pub fn step(&self, step: Step) {
        if let Step::Healthy { machine } = &step {
            self.healthy.lock().unwrap_or_else(PoisonError::into_inner).insert(machine.clone());
        }
        if let Some(steps) = &self.steps {
            let _ = steps.send(step);
        }
    }

    /// Whether this machine was told to be healthy.
    pub fn knows(&self, machine: &str) -> bool {
        self.healthy.lock().unwrap_or_else(PoisonError::into_inner).contains(machine)
    }
}

/// Where jobs are handed in.
#[derive(Clone, Debug)]
pub struct Desk {
    pub jobs: mpsc::Sender<Job>,
    /// One is being done.
    pub is_busy: Arc<AtomicBool>,
    pub log: Log,
}

/// Hands on what is wanted, and answers.
pub async fn answer(listener: UnixListener, desk: Desk) {
    let reading = Arc::new(Semaphore::new(MAX_READ));
    loop {
        let Ok(place) = reading.clone().acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            // Out of descriptors, for instance.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        tokio::spawn(converse(stream, desk.clone(), place));
    }
}

async fn converse(mut stream: UnixStream, desk: Desk, place: OwnedSemaphorePermit) {
    let (reader, mut writer) = stream.split();
    let mut line = String::new();
    let mut reader = tokio::io::BufReader::new(reader.take(MAX_ASK));
    if !matches!(tokio::time::timeout(PATIENCE, reader.read_line(&mut line)).await, Ok(Ok(_))) {
        return;
    }
    drop(place);
    let (steps, mut told) = mpsc::unbounded_channel();
    let tell = Tell { steps: Some(steps), healthy: Mutex::default() };
    match serde_json::from_str(&line) {
        Ok(ask) => {
            if desk.is_busy.load(Ordering::Relaxed) {
                tell.step(Step::Waiting);
            }
            if let Err(full) = desk.jobs.try_send(Job { ask, tell }) {
                let why = "too much waits to be done by this flyrun serve".to_string();
                full.into_inner().tell.step(Step::Failed { why });
            }
        }
        Err(error) => {
            desk.log.line("control").with("why", format!("a request is not understood: {error}")).end();
            let why = "flyrun serve does not understand this: it is of another version".to_string();
            tell.step(Step::Failed { why });
            drop(tell);
        }
    }
    while let Some(step) = told.recv().await {
        let mut bytes = serde_json::to_vec(&step).unwrap_or_default();
        bytes.push(b'\n');
        if writer.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

/// Asks the `flyrun serve` that serves an app, and hands on each step.
///
/// # Errors
/// None serves it, or it has failed.
pub fn ask(paths: &Paths, app: &str, ask: &Ask, mut each: impl FnMut(&Step) -> Result<()>) -> Result<()> {
    let all = ask_all(paths)?;
    let serves = all.iter().find(|status| status.groups.iter().any(|group| *group.app == *app));
    let pid = serves.map(|status| status.pid).ok_or_else(|| {
        Error::new(format!("no app '{}' is served here", app.escape_debug())).advice(
            "`flyrun status` shows those that are; a fly.toml in a directory that is served is followed at once.",
        )
    })?;
    let told = || format!("flyrun serve (process {pid}) does not answer");
    let mut stream = StdUnixStream::connect(control_of(paths, pid)).context(told())?;
    let mut line = serde_json::to_vec(ask).context("cannot write JSON")?;
    line.push(b'\n');
    stream.write_all(&line).context(told())?;
    for line in BufReader::new(stream).lines() {
        let step: Step = serde_json::from_str(&line.context(told())?).context(told())?;
        each(&step)?;
        if let Step::Failed { why } = step {
            return Err(Error::new(why));
        }
        if matches!(step, Step::Done { .. }) {
            return Ok(());
        }
    }
    Err(Error::new(format!("flyrun serve (process {pid}) has ended before this was done"))
        .advice("Start it again, and repeat this."))
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    /// What is told to whoever sends this, where nobody does any job.
    async fn told(lines: &[&str], desk: Desk) -> Vec<Step> {
        let mut steps = Vec::new();
        for line in lines {
            let (mut ours, theirs) = StdUnixStream::pair().unwrap();
            theirs.set_nonblocking(true).unwrap();
            ours.write_all(line.as_bytes()).unwrap();
            ours.shutdown(std::net::Shutdown::Write).unwrap();
            let place = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
            let served = tokio::spawn(converse(UnixStream::from_std(theirs).unwrap(), desk.clone(), place));
            // Jobs that wait are told of nothing more.
            let _ = tokio::time::timeout(Duration::from_millis(200), served).await;
            ours.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
            let mut text = Vec::new();
            let _ = ours.read_to_end(&mut text);
            steps.extend(
                text.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()),
            );
        }
        steps
    }

    fn desk(jobs: usize, is_busy: bool) -> (Desk, mpsc::Receiver<Job>) {
        let (jobs, receiver) = mpsc::channel(jobs);
        let log = Log::on_stderr(false).unwrap();
        (Desk { jobs, is_busy: Arc::new(AtomicBool::new(is_busy)), log }, receiver)
    }

    #[tokio::test]
    async fn what_is_not_understood_is_told_so_and_reaches_nobody() {
        let (desk, mut jobs) = desk(1, false);
        let lines = ["nonsense\n", "{\"ask\":\"explode\"}\n", "\n", "[[[[\n"];
        let steps = told(&lines, desk).await;
        assert_eq!(steps.len(), lines.len());
        assert!(steps.iter().all(|step| matches!(step, Step::Failed { .. })), "{steps:?}");
        assert!(jobs.try_recv().is_err());
    }

    #[tokio::test]
    async fn who_has_to_wait_is_told_so_and_who_waits_in_vain_too() {
        let (desk, mut jobs) = desk(1, true);
        let ask = Ask::Scale(Scale { app: "web".into(), counts: [(String::new(), 3)].into() });
        let line = format!("{}\n", serde_json::to_string(&ask).unwrap());
        let steps = told(&[&line, &line], desk).await;
        assert!(matches!(steps[..], [Step::Waiting, Step::Waiting, Step::Failed { .. }]), "{steps:?}");
        assert_eq!(jobs.try_recv().unwrap().ask, ask);
    }
}
