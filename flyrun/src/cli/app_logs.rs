//! `flyrun logs -a APP`: what all machines of an app write, as one.

use std::collections::BTreeMap;
use std::time::SystemTime;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};

use super::Context;
use super::logs::{Arguments, Tail, write_out};
use crate::error::{Context as _, Error, Result};
use crate::exit_code::ExitCode;
use crate::machine::Record;
use crate::monitor::log::{Entry, Reader};
use crate::serve::APP;

/// How often it is looked whether the app has other machines now.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };

pub fn execute(context: &Context, arguments: &Arguments, app: &str) -> Result<ExitCode> {
    let mut logs = Logs { context, app, readers: BTreeMap::new(), watch: watch()? };
    logs.find()?;
    if logs.readers.is_empty() && !arguments.follow {
        return Err(Error::new(format!("app '{}' has no machines", app.escape_debug()))
            .advice("`flyrun ps -a --filter label=flyrun.app` lists the machines of all apps."));
    }
    let mut lines = logs.read()?;
    lines.retain(|line| arguments.wants(&line.entry));
    if let Tail::Lines(count) = arguments.tail {
        lines.drain(..lines.len().saturating_sub(count));
    }
    loop {
        for line in &lines {
            if !line.print(arguments.timestamps)? {
                return Ok(ExitCode::Success);
            }
        }
        if !arguments.follow || arguments.until.is_some_and(|until| SystemTime::now() >= until.0) {
            return Ok(ExitCode::Success);
        }
        let _ = poll(&mut [PollFd::new(&logs.watch, PollFlags::IN)], Some(&LOOK));
        let _ = rustix::io::read(&logs.watch, &mut [0_u8; 4096][..]);
        logs.find()?;
        lines = logs.read()?;
        lines.retain(|line| arguments.wants(&line.entry));
    }
}

/// The logs of an app's machines.
struct Logs<'a> {
    context: &'a Context,
    app: &'a str,
    /// By the machine's id, with its name.
    readers: BTreeMap<String, (String, Reader)>,
    watch: rustix::fd::OwnedFd,
}

/// What a machine has written.
struct Line {
    machine: String,
    entry: Entry,
}

impl Logs<'_> {
    /// Machines come and go with the requests.
    fn find(&mut self) -> Result<()> {
        let is_ours = |record: &Record| record.config.labels.get(APP).is_some_and(|app| app == self.app);
        let records: Vec<_> = self.context.machines().list()?.into_iter().filter(is_ours).collect();
        self.readers.retain(|id, _| records.iter().any(|record| record.id == *id));
        for record in records.into_iter().filter(|record| record.config.log.is_some()) {
            if self.readers.contains_key(&record.id) {
                continue;
            }
            let directory = self.context.paths.machines().join(&record.id);
            let flags = WatchFlags::MODIFY | WatchFlags::CREATE | WatchFlags::MOVED_TO;
            // One that was removed in this moment has no log.
            if inotify::add_watch(&self.watch, &directory, flags).is_ok() {
                let reader = Reader::open(&directory).context("cannot read the log")?;
                self.readers.insert(record.id, (record.name, reader));
            }
        }
        Ok(())
    }

    /// What is new, in the order of time.
    fn read(&mut self) -> Result<Vec<Line>> {
        let mut lines = Vec::new();
        for (name, reader) in self.readers.values_mut() {
            while let Some(entry) = reader.next().context("cannot read the log")? {
                lines.push(Line { machine: name.clone(), entry });
            }
        }
        lines.sort_by_key(|line| line.entry.time);
        Ok(lines)
    }
}

impl Line {
    /// Prints it; `false` if nobody reads any more.
    fn print(&self, with_time: bool) -> Result<bool> {
        let time = match with_time {
            true => format!("{} ", humantime::format_rfc3339_nanos(self.entry.time)),
            false => String::new(),
        };
        // A part of a long line ends like a line, as another machine's may follow.
        let text = format!("{time}{} | {}\n", self.machine, self.entry.log.trim_end_matches('\n'));
        write_out(self.entry.stream, &text)
    }
}

fn watch() -> Result<rustix::fd::OwnedFd> {
    inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).context("cannot watch the logs")
}
