//! Signals by name or number, as kill(1) and docker take them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Linux's first and last real-time signals as glibc gives them out.
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

/// A signal's number, 1 to 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signal(pub i32);

impl Signal {
    pub const TERM: Signal = Signal(15);
}

/// What is not a signal.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("'{0}' is not a signal: write a name such as TERM or SIGUSR1, or a number from 1 to 64")]
pub struct NotASignal(String);

impl FromStr for Signal {
    type Err = NotASignal;

    fn from_str(text: &str) -> Result<Signal, NotASignal> {
        let refuse = || NotASignal(text.to_string());
        let in_range =
            |number: i32| (1..=RTMAX).contains(&number).then_some(Signal(number)).ok_or_else(refuse);
        if let Ok(number) = text.parse() {
            return in_range(number);
        }
        let upper = text.to_ascii_uppercase();
        let name = upper.strip_prefix("SIG").unwrap_or(&upper);
        let offset = |rest: &str, sign: char| match rest {
            "" => Some(0),
            _ => rest.strip_prefix(sign).and_then(|digits| digits.parse::<u8>().ok()).map(i32::from),
        };
        let real_time =
            |number: i32| (RTMIN..=RTMAX).contains(&number).then_some(Signal(number)).ok_or_else(refuse);
        if let Some(rest) = name.strip_prefix("RTMIN") {
            return real_time(RTMIN + offset(rest, '+').ok_or_else(refuse)?);
        }
        if let Some(rest) = name.strip_prefix("RTMAX") {
            return real_time(RTMAX - offset(rest, '-').ok_or_else(refuse)?);
        }
        let full = format!("SIG{name}");
        (1..RTMIN)
            .find(|&number| signal_hook::low_level::signal_name(number) == Some(full.as_str()))
            .map(Signal)
            .ok_or_else(refuse)
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match signal_hook::low_level::signal_name(self.0) {
            Some(name) => f.write_str(name),
            None => write!(f, "{}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_understood() {
        for (text, number) in [
            ("TERM", 15),
            ("SIGTERM", 15),
            ("sigusr1", 10),
            ("9", 9),
            ("RTMIN", 34),
            ("SIGRTMIN+3", 37),
            ("RTMAX-1", 63),
        ] {
            assert_eq!(text.parse(), Ok(Signal(number)), "{text}");
        }
        for text in ["", "0", "65", "-1", "SIG", "NOPE", "RTMIN+31", "RTMIN-1", "RTMAX-99", "SIGSIGTERM"] {
            assert!(text.parse::<Signal>().is_err(), "{text}");
        }
    }
}
