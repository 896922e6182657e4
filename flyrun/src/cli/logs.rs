//! `flyrun logs`.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::path::Path;
use std::time::SystemTime;

use clap::Args;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};

use super::Context;
use crate::error::{Context as _, Error, Result};
use crate::exit_code::ExitCode;
use crate::moment::Moment;
use crate::monitor::log::{Entry, Reader, Stream};

/// How often a machine is looked at while its log is followed: its end is not written there.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };

/// Show what machines have written
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  flyrun logs web
  flyrun logs -f --tail 20 web
  flyrun logs --since 10m --timestamps web 2>&1 | grep error
  flyrun logs --kernel web        what its kernel and guest-init said
  flyrun logs -f -a shop          all machines of an app that `flyrun serve` serves, also those that are yet to come

Standard output and standard error of the process come out on those of flyrun.")]
pub struct Arguments {
    /// All machines of this app, each line with its machine's name
    #[arg(short, long, conflicts_with = "kernel")]
    app: Option<String>,
    /// Go on until the machine ends
    #[arg(short, long)]
    pub follow: bool,
    /// Only what is not older: a time (2026-01-31T12:00:00Z), seconds since the epoch, or a duration (10m)
    #[arg(long, value_name = "TIME")]
    since: Option<Moment>,
    /// Only what is older
    #[arg(long, value_name = "TIME")]
    pub until: Option<Moment>,
    /// Only the last lines
    #[arg(short = 'n', long, value_name = "N|all", default_value = "all")]
    pub tail: Tail,
    /// Put the time before each line
    #[arg(short, long)]
    pub timestamps: bool,
    /// Show the console of the guest's kernel instead
    #[arg(long, conflicts_with_all = ["follow", "since", "until", "timestamps"])]
    kernel: bool,
    /// Name, id, or beginning of the id
    #[arg(required_unless_present = "app", conflicts_with = "app")]
    machine: Option<String>,
}

impl Arguments {
    /// Whether this is of the time that was asked for.
    pub fn wants(&self, entry: &Entry) -> bool {
        self.since.is_none_or(|since| entry.time >= since.0)
            && self.until.is_none_or(|until| entry.time < until.0)
    }
}

/// How many lines from the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tail {
    All,
    Lines(usize),
}

impl std::str::FromStr for Tail {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Tail, String> {
        match text {
            "all" => Ok(Tail::All),
            _ => text.parse().map(Tail::Lines).map_err(|_| format!("'{text}' is neither a number nor all")),
        }
    }
}

pub fn execute(context: &Context, arguments: &Arguments) -> Result<ExitCode> {
    if let Some(app) = &arguments.app {
        return super::app_logs::execute(context, arguments, app);
    }
    let record = context.machines().find(arguments.machine.as_deref().unwrap_or_default())?;
    let directory = context.paths.machines().join(&record.id);
    if arguments.kernel {
        return kernel_log(&directory, arguments.tail);
    }
    if record.config.log.is_none() {
        return Err(Error::new("this machine keeps no log").advice("It was made with --log-driver none."));
    }
    let watch = if arguments.follow { Some(watch(&directory)?) } else { None };
    let mut reader = Reader::open(&directory).context("cannot read the log")?;
    let mut printer = Printer { timestamps: arguments.timestamps, begun: [false; 2] };
    let wanted = |entry: &Entry| arguments.wants(entry);
    let mut kept = VecDeque::new();
    while let Some(entry) = reader.next().context("cannot read the log")? {
        if !wanted(&entry) {
            continue;
        }
        match arguments.tail {
            Tail::All => {
                if !printer.print(&entry)? {
                    return Ok(ExitCode::Success);
                }
            }
            Tail::Lines(count) => {
                kept.push_back(entry);
                if kept.len() > count {
                    kept.pop_front();
                }
            }
        }
    }
    for entry in &kept {
        printer.print(entry)?;
    }
    let Some(watch) = watch else { return Ok(ExitCode::Success) };
    let over = |now: SystemTime| arguments.until.is_some_and(|until| now >= until.0);
    loop {
        // Asked before the last read: what was written before the end is then there to be read.
        let runs = context.machines().find(&record.id).is_ok_and(|record| record.state.needs_monitor());
        while let Some(entry) = reader.next().context("cannot read the log")? {
            if wanted(&entry) && !printer.print(&entry)? {
                return Ok(ExitCode::Success);
            }
        }
        if !runs || over(SystemTime::now()) {
            return Ok(ExitCode::Success);
        }
        let _ = poll(&mut [PollFd::new(&watch, PollFlags::IN)], Some(&LOOK));
        let _ = rustix::io::read(&watch, &mut [0_u8; 4096][..]);
    }
}

/// Becomes readable when a file of the log changes.
fn watch(directory: &Path) -> Result<rustix::fd::OwnedFd> {
    let flags = CreateFlags::CLOEXEC | CreateFlags::NONBLOCK;
    let watch = inotify::init(flags).context("cannot watch the log")?;
    inotify::add_watch(&watch, directory, WatchFlags::MODIFY | WatchFlags::CREATE | WatchFlags::MOVED_TO)
        .context("cannot watch the log")?;
    Ok(watch)
}

struct Printer {
    timestamps: bool,
    /// Whether the last entry of a stream was the beginning of a line.
    begun: [bool; 2],
}

impl Printer {
    /// Prints an entry; `false` if nobody reads any more.
    fn print(&mut self, entry: &Entry) -> Result<bool> {
        let mut text = String::new();
        let begun = &mut self.begun[entry.stream as usize];
        if self.timestamps && !*begun {
            text = format!("{} ", humantime::format_rfc3339_nanos(entry.time));
        }
        *begun = !entry.log.ends_with('\n');
        text.push_str(&entry.log);
        write_out(entry.stream, &text)
    }
}

/// Writes to flyrun's own stream of that kind; `false` if nobody reads any more.
///
/// # Errors
/// Any other failure of that stream.
pub fn write_out(stream: Stream, text: &str) -> Result<bool> {
    let mut to: Box<dyn Write> = match stream {
        Stream::Stdout => Box::new(io::stdout().lock()),
        Stream::Stderr => Box::new(io::stderr().lock()),
    };
    match to.write_all(text.as_bytes()).and_then(|()| to.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Error::caused("cannot write the log out", &error)),
    }
}

fn kernel_log(directory: &Path, tail: Tail) -> Result<ExitCode> {
    let bytes = match std::fs::read(directory.join("console.log")) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(Error::caused("cannot read the kernel's log", &error)),
    };
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().collect();
    let first = match tail {
        Tail::All => 0,
        Tail::Lines(count) => lines.len().saturating_sub(count),
    };
    for line in lines.iter().skip(first) {
        super::print_line(line)?;
    }
    Ok(ExitCode::Success)
}
