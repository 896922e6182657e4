//! What the user reads when something fails: one line with the facts, one with what to do.

use std::fmt;

use crate::exit_code::ExitCode;

pub type Result<T> = std::result::Result<T, Error>;

/// A failure of flyrun, ready to be printed.
#[derive(Debug)]
pub struct Error {
    message: String,
    advice: Option<String>,
    code: ExitCode,
}

impl Error {
    /// A failure with exit code 125.
    pub fn new(message: impl Into<String>) -> Self {
        Error { message: message.into(), advice: None, code: ExitCode::Flyrun }
    }

    /// A failure caused by another error, whose chain of sources is told behind the message.
    pub fn caused(message: impl fmt::Display, cause: &dyn std::error::Error) -> Self {
        let mut text = message.to_string();
        let mut next = Some(cause);
        while let Some(error) = next {
            let told = error.to_string();
            if !text.contains(&told) {
                text = if text.is_empty() { told } else { format!("{text}: {told}") };
            }
            next = error.source();
        }
        Error::new(text)
    }

    /// Says what to do about it.
    pub fn advice(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    /// Ends with another exit code than 125.
    pub fn code(mut self, code: ExitCode) -> Self {
        self.code = code;
        self
    }

    pub fn exit_code(&self) -> ExitCode {
        self.code
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.message)?;
        match &self.advice {
            Some(advice) => write!(f, "\n  {advice}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {}

/// Adds what was being done to an error of the system.
pub trait Context<T> {
    fn context(self, message: impl fmt::Display) -> Result<T>;
}

impl<T, E: std::error::Error + 'static> Context<T> for std::result::Result<T, E> {
    fn context(self, message: impl fmt::Display) -> Result<T> {
        self.map_err(|error| Error::caused(message, &error))
    }
}

/// A failure of the image store or of a registry. Its messages say themselves what to do.
pub fn from_images(error: &images::Error) -> Error {
    Error::caused("", error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_once_and_the_advice_comes_last() {
        let cause = std::io::Error::other("no such thing");
        let error = Error::caused("cannot open it: no such thing", &cause).advice("make one");
        assert_eq!(error.to_string(), "cannot open it: no such thing\n  make one");
    }
}
