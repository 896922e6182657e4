//! The user in front of a machine: signals, and the terminal. A machine in the background has none.

use std::time::Duration;

use signal_hook::iterator::Signals;

use crate::error::{Context, Result};
pub use crate::interrupt::Response;
use crate::interrupt::{self, Interrupts, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
use crate::terminal::RawMode;
use crate::vm::{Event, Post, spawn};

/// Who gets the monitor's signals, and what else the user has of the machine.
#[derive(Debug)]
pub enum Front {
    /// The monitor is the command the user waits for.
    User { interrupts: Interrupts, raw_mode: Option<RawMode> },
    /// The monitor is alone. A signal to it, as at the host's shutdown, stops the machine.
    Nobody { stop_signal: i32, stop_timeout: Duration },
}

impl Front {
    /// What a signal to the monitor means.
    pub fn on_signal(&mut self, signal: i32, started: bool) -> Response {
        match self {
            Front::User { interrupts, .. } => interrupts.on_signal(signal, started),
            Front::Nobody { stop_signal, stop_timeout } => match signal {
                SIGTERM | SIGINT => Response::Stop(*stop_signal, *stop_timeout),
                _ => Response::Nothing,
            },
        }
    }

    /// The machine is stopped in another way from now on.
    pub fn stop_with(&mut self, signal: i32, timeout: Duration) {
        if let Front::Nobody { stop_signal, stop_timeout } = self {
            (*stop_signal, *stop_timeout) = (signal, timeout);
        }
    }

    /// Takes the terminal over, where the workload is to have the keyboard too.
    ///
    /// # Errors
    /// The terminal refuses.
    pub fn enter_raw_mode(&mut self) -> Result<()> {
        if let Front::User { raw_mode, .. } = self {
            *raw_mode = RawMode::enter().context("cannot use the terminal")?;
        }
        Ok(())
    }
}

/// The signals to this process, which are kept from now on.
#[derive(Debug)]
pub struct Watch(Signals);

impl Watch {
    /// Keeps them.
    ///
    /// # Errors
    /// A signal cannot be watched.
    pub fn new() -> Result<Watch> {
        let watched = [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH];
        Signals::new(watched).map(Watch).context("cannot watch for signals")
    }

    /// Posts those that have come, and all that come.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn begin(self, post: Post) -> Result<()> {
        let Watch(mut signals) = self;
        spawn("signals", move || {
            for signal in signals.forever() {
                if !post.send(Event::Signal(signal)) {
                    return;
                }
            }
        })
        .context("cannot start a thread")
    }
}

/// The exit code of a command that its user interrupted.
pub fn interrupted(signal: i32) -> crate::exit_code::ExitCode {
    use crate::exit_code::ExitCode;
    match u8::try_from(signal) {
        Ok(signal) if signal != interrupt::SIGINT as u8 => ExitCode::Workload(128u8.saturating_add(signal)),
        _ => ExitCode::Interrupted,
    }
}
