//! What a signal to a foreground `flyrun run` does: passed on, and on insistence the machine is given up. Pure.

use std::time::Duration;

/// The signals that flyrun passes on to the workload, as docker's sig-proxy does.
pub const SIGHUP: i32 = 1;
pub const SIGINT: i32 = 2;
pub const SIGQUIT: i32 = 3;
pub const SIGKILL: i32 = 9;
pub const SIGUSR1: i32 = 10;
pub const SIGUSR2: i32 = 12;
pub const SIGTERM: i32 = 15;
/// The terminal changed its size.
pub const SIGWINCH: i32 = 28;

/// What to do about a signal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Response {
    /// Send it to the workload.
    Forward(i32),
    /// Send it to the workload, and tell the user what one more does.
    ForwardAndTell(i32, &'static str),
    /// Tell the workload the terminal's new size.
    Resize,
    /// Send this signal, and kill the workload if it has not ended after that time.
    Stop(i32, Duration),
    /// End the machine at once.
    Kill,
    /// It means nothing here.
    Nothing,
}

/// Remembers how often the user has insisted.
#[derive(Debug, Default)]
pub struct Interrupts {
    insisted: u32,
}

impl Interrupts {
    /// Before the workload runs there is nobody to pass a signal to.
    pub fn on_signal(&mut self, signal: i32, started: bool) -> Response {
        match signal {
            SIGWINCH => Response::Resize,
            SIGINT | SIGTERM | SIGHUP | SIGQUIT if !started => Response::Kill,
            SIGINT => {
                self.insisted += 1;
                match self.insisted {
                    1 => Response::Forward(SIGINT),
                    2 => Response::ForwardAndTell(
                        SIGTERM,
                        "asked the workload to terminate; once more ends the machine",
                    ),
                    _ => Response::Kill,
                }
            }
            other => Response::Forward(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_third_interrupt_ends_the_machine() {
        let mut interrupts = Interrupts::default();
        assert_eq!(interrupts.on_signal(SIGINT, true), Response::Forward(SIGINT));
        assert!(matches!(interrupts.on_signal(SIGINT, true), Response::ForwardAndTell(SIGTERM, _)));
        assert_eq!(interrupts.on_signal(SIGINT, true), Response::Kill);
    }

    #[test]
    fn sigterm_is_passed_on_however_often() {
        let mut interrupts = Interrupts::default();
        for _ in 0..5 {
            assert_eq!(interrupts.on_signal(SIGTERM, true), Response::Forward(SIGTERM));
        }
    }

    #[test]
    fn before_the_workload_runs_any_of_them_ends_the_machine() {
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            assert_eq!(Interrupts::default().on_signal(signal, false), Response::Kill);
        }
        assert_eq!(Interrupts::default().on_signal(SIGWINCH, false), Response::Resize);
    }
}
