//! The user's terminal: its size, and its raw mode while a workload has it.

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;

use protocol::TtySize;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// What a workload gets when flyrun has no terminal to take the size from.
pub const DEFAULT_SIZE: TtySize = TtySize { rows: 24, cols: 80 };

/// The size of the terminal that flyrun's output, or else its input, is.
pub fn size() -> TtySize {
    let of = |fd: &dyn AsFd| tcgetwinsize(fd.as_fd()).ok().filter(|size| size.ws_row > 0 && size.ws_col > 0);
    match of(&io::stdout()).or_else(|| of(&io::stdin())) {
        Some(size) => TtySize { rows: size.ws_row, cols: size.ws_col },
        None => DEFAULT_SIZE,
    }
}

/// The terminal in raw mode, given back as it was when dropped.
#[derive(Debug)]
pub struct RawMode {
    before: Termios,
}

impl RawMode {
    /// `None` if standard input is no terminal.
    pub fn enter() -> io::Result<Option<RawMode>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(Some(RawMode { before }))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}
