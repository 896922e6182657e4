//! Why guest-init could not do what it was told, as one line for the user.

use std::fmt::{self, Display};

use protocol::{FailureKind, FromGuest};

/// A failure that ends the boot and is reported to the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The kind, which decides the exit code of the command.
    pub kind: FailureKind,
    /// One line with the facts.
    pub message: String,
}

impl Failure {
    /// A failure of this kind.
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// The message as one line, cut to what one frame can carry many times over.
    pub fn one_line(&self) -> String {
        self.message.chars().take(4096).map(|c| if c.is_control() { ' ' } else { c }).collect()
    }

    /// The frame that reports it.
    pub fn to_frame(&self) -> FromGuest {
        FromGuest::Failed { kind: self.kind, message: self.one_line() }
    }
}

impl Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// Turns an error of a setup step into a [`Failure`] that names the step.
pub trait OrSetup<T> {
    /// Names the step, such as "mount /proc"; the error's own text follows it.
    ///
    /// # Errors
    /// The failure, of kind [`FailureKind::Setup`], or [`FailureKind::NoSpace`] when that is the cause.
    fn or_setup(self, step: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T> OrSetup<T> for rustix::io::Result<T> {
    fn or_setup(self, step: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|errno| {
            let kind = match errno {
                rustix::io::Errno::NOSPC | rustix::io::Errno::DQUOT => FailureKind::NoSpace,
                _ => FailureKind::Setup,
            };
            Failure::new(kind, format!("cannot {}: {errno}", step()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_one_bounded_line() {
        let failure = Failure::new(FailureKind::Setup, format!("a\nb{}", "x".repeat(100_000)));
        let FromGuest::Failed { message, .. } = failure.to_frame() else { panic!("not a failure frame") };
        assert!(message.starts_with("a b"));
        assert!(message.len() < 5000);
    }

    #[test]
    fn a_full_disk_is_told_apart() {
        let full: rustix::io::Result<()> = Err(rustix::io::Errno::NOSPC);
        let failure = full.or_setup(|| "write".into()).unwrap_err();
        assert_eq!(failure.kind, FailureKind::NoSpace);
        assert!(failure.message.starts_with("cannot write: "));
    }
}
