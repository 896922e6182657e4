//! `[deploy] release_command`: runs once, in a machine of its own, before machines of a new version start.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::host::Host;
use super::template::Template;
use crate::cli::lifecycle;
use crate::error::{Context as _, Error, Result};
use crate::files::{self, Lasting};
use crate::machine::{Record, new_id};
use crate::monitor::Request;
use crate::monitor::log::Reader;
use crate::paths::make_private_dir;

/// How often it is looked whether the command has ended.
const POLL: Duration = Duration::from_millis(100);
/// How many lines of its output an error shows.
const LINES: usize = 10;

/// Runs an app's release command, unless it has run for this version already. Blocks.
///
/// # Errors
/// It fails, or takes too long: the new version is not to be served.
pub fn run(host: &Host, template: &Template, limit: Duration) -> Result<()> {
    let directory = host.context.paths.root.join("releases");
    if std::fs::read_to_string(directory.join(&*template.app))
        .is_ok_and(|version| version == template.version)
    {
        return Ok(());
    }
    let id = new_id()?;
    let mut record = template.record(0, &id);
    // No slot has such a name.
    record.name = format!("{}-release", template.app);
    record.config.labels.remove(super::template::SLOT);
    record.config.run.env.push("RELEASE_COMMAND=1".to_string());
    // One whose flyrun serve was killed.
    if let Ok(old) = host.context.machines().find(&record.name) {
        lifecycle::remove(&host.context, &old, true)?;
    }
    let owned = host.context.machines().create(record.clone())?;
    let ended = host.spawn(owned).and_then(|()| wait(host, &record, limit));
    let output: String = last_lines(host, &id, LINES).iter().map(|line| format!("\n  | {line}")).collect();
    host.remove(&id)?;
    let told = |why: String| Error::new(format!("app {}: release_command {why}{output}", template.app));
    match ended {
        Ok(Some(0)) => {
            make_private_dir(&directory)?;
            files::replace(&directory, &template.app, template.version.as_bytes(), Lasting::PowerCut)
                .context("cannot write down that release_command has run")
        }
        Ok(Some(code)) => Err(told(format!("ended with exit code {code}"))),
        Ok(None) => Err(told(format!("has not ended within {limit:?}"))),
        Err(error) => Err(told(format!("does not run: {error}"))),
    }
}

/// The exit code; `None` if there is none in time.
fn wait(host: &Host, record: &Record, limit: Duration) -> Result<Option<u8>> {
    let deadline = Instant::now() + limit;
    loop {
        let now = host.context.machines().find(&record.id)?;
        if !now.state.needs_monitor() {
            let code = now.outcome.map_or(crate::monitor::KILLED, |outcome| outcome.exit_code);
            return Ok(Some(code));
        }
        if Instant::now() >= deadline {
            let _ = lifecycle::ask(&host.context, record, &Request::Stop { timeout_s: Some(0) });
            return Ok(None);
        }
        std::thread::sleep(POLL);
    }
}

/// The last lines that a machine has written, as they can be shown.
pub fn last_lines(host: &Host, id: &str, count: usize) -> Vec<String> {
    let Ok(mut reader) = Reader::open(&host.context.paths.machines().join(id)) else { return Vec::new() };
    let mut lines = VecDeque::new();
    while let Ok(Some(entry)) = reader.next() {
        lines.push_back(crate::session::printable(entry.log.trim_end()));
        if lines.len() > count {
            lines.pop_front();
        }
    }
    lines.into()
}
