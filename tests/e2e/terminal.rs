//! A terminal with somebody at it.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, ExitStatus};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::flyrun::Invocation;

/// After this long without what is waited for, a test hangs.
const HANG: Duration = Duration::from_secs(300);

/// flyrun on a terminal of its own, as its controlling terminal.
#[derive(Debug)]
pub struct Terminal {
    master: File,
    child: Child,
    shown: Arc<(Mutex<Shown>, Condvar)>,
}

#[derive(Debug, Default)]
struct Shown {
    text: String,
    ended: bool,
}

impl Terminal {
    /// Starts a command on a terminal of this size.
    pub fn start(invocation: &Invocation<'_>, rows: u16, cols: u16) -> Terminal {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let slave =
            open(name.as_c_str(), OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        tcsetwinsize(&slave, size(rows, cols)).unwrap();
        let mut command = invocation.build(&["setsid", "--ctty"]);
        let slave = File::from(slave);
        command.stdin(slave.try_clone().unwrap()).stdout(slave.try_clone().unwrap()).stderr(slave);
        let child = command.spawn().unwrap();
        drop(command);

        let master = File::from(master);
        let shown = Arc::new((Mutex::new(Shown::default()), Condvar::new()));
        let (mut reader, writer) = (master.try_clone().unwrap(), Arc::clone(&shown));
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                // A terminal whose last user is gone reads as EIO.
                let count = reader.read(&mut buffer).unwrap_or(0);
                let mut shown = writer.0.lock().unwrap();
                shown.text.push_str(&String::from_utf8_lossy(&buffer[..count]));
                shown.ended = count == 0;
                writer.1.notify_all();
                if count == 0 {
                    return;
                }
            }
        });
        Terminal { master, child, shown }
    }

    /// Waits until the terminal has shown this.
    #[track_caller]
    pub fn wait_for(&self, text: &str) {
        let (shown, changed) = &*self.shown;
        let waiting = |shown: &mut Shown| !shown.text.contains(text) && !shown.ended;
        let (shown, _) = changed.wait_timeout_while(shown.lock().unwrap(), HANG, waiting).unwrap();
        let seen = shown.text.clone();
        drop(shown);
        assert!(seen.contains(text), "the terminal never showed {text:?}, but:\n{seen}");
    }

    /// Types.
    pub fn send(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).unwrap();
    }

    /// Gives the terminal another size, as dragging a window's corner does.
    pub fn resize(&self, rows: u16, cols: u16) {
        tcsetwinsize(&self.master, size(rows, cols)).unwrap();
    }

    /// Waits for the end; gives the status and all that was shown.
    pub fn end(mut self) -> (ExitStatus, String) {
        let (shown, changed) = &*self.shown;
        let (guard, timeout) =
            changed.wait_timeout_while(shown.lock().unwrap(), HANG, |shown| !shown.ended).unwrap();
        let text = guard.text.clone();
        drop(guard);
        if timeout.timed_out() {
            let _ = self.child.kill();
            panic!("it did not end; the terminal shows:\n{text}");
        }
        (self.child.wait().unwrap(), text)
    }
}

fn size(rows: u16, cols: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 }
}
