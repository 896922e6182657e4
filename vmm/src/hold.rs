//! Places where a test stops this program, to kill it or another one there: `FLYRUN_HOLD=STEP` and `FLYRUN_HOLD_FIFO=PATH`.
//!
//! Who reaches the step first writes its process id into the FIFO, which waits for somebody who reads it, and then waits until
//! somebody has opened `PATH.go` for writing and closed it. Without both variables nothing is done.
//!
//! A process that goes to the [jail](crate::jail) calls [`prepare`] before, which keeps the FIFOs' directory for it.

use std::{
    fs::File,
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    mount::{OpenTreeFlags, open_tree},
};

struct Order {
    step: String,
    /// The FIFO, and for a jailed process the directory that it is in.
    fifo: PathBuf,
    directory: Option<File>,
    /// This process's number for those who hold it, who may see another one than itself.
    process: String,
}

static ORDER: OnceLock<Option<Order>> = OnceLock::new();
static DONE: AtomicBool = AtomicBool::new(false);

impl Order {
    fn read() -> Option<Self> {
        let fifo = std::env::var_os("FLYRUN_HOLD_FIFO").map(PathBuf::from)?;
        let step = std::env::var("FLYRUN_HOLD").ok()?;
        Some(Self { step, fifo, directory: None, process: std::process::id().to_string() })
    }

    fn open(&self, suffix: &str, how: OFlags) -> io::Result<File> {
        let mut path = self.fifo.clone().into_os_string();
        path.push(suffix);
        let how = how | OFlags::CLOEXEC;
        Ok(match (&self.directory, Path::new(&path).file_name()) {
            (Some(directory), Some(name)) => openat(directory, name, how, Mode::empty())?,
            _ => openat(CWD, &path, how, Mode::empty())?,
        }
        .into())
    }
}

/// Keeps what is needed to be held, if that is asked for, for when no path leads there.
pub fn prepare() {
    let Some(mut order) = Order::read() else { return };
    let parent = order.fifo.parent().unwrap_or(Path::new("/"));
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    order.directory = open_tree(CWD, parent, flags).ok().map(File::from);
    if let Ok(own) = std::fs::read_link("/proc/self") {
        order.process = own.display().to_string();
    }
    let _ = ORDER.set(Some(order));
}

/// Waits here, once, if this is the step that is asked for.
pub fn at(step: &str) {
    let order = ORDER.get_or_init(Order::read);
    let Some(order) = order.as_ref().filter(|order| order.step == step) else { return };
    if !DONE.swap(true, Ordering::Relaxed) {
        let told = order.open("", OFlags::WRONLY).and_then(|mut fifo| writeln!(fifo, "{}", order.process));
        // A test that has made no FIFOs waits for nobody.
        if told.is_ok()
            && let Ok(mut go) = order.open(".go", OFlags::RDONLY)
        {
            let _ = go.read_to_end(&mut Vec::new());
        }
    }
}
