//! How a session ended, and what flyrun's exit code becomes of it.

use protocol::{ExitStatus, FailureKind};

use crate::error::{Error, Result};
use crate::exit_code::ExitCode;

/// The end of a session with a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The command ended.
    Exited(ExitStatus),
    /// It could not be done.
    Failed { kind: FailureKind, message: String },
    /// The user left by the detach keys, or it was started detached.
    Detached,
    /// The user insisted on ending flyrun itself.
    Interrupted,
    /// The connection ended before the command: the machine has ended.
    Lost,
    /// The machine was suspended and is there again, but the command is not, for this reason.
    Gone(String),
}

impl End {
    /// Tells the user what the exit code alone does not, and gives it.
    ///
    /// # Errors
    /// The command could not be run; the error has the exit code.
    pub fn report(self) -> Result<ExitCode> {
        match self {
            End::Exited(status) => {
                if status == ExitStatus::OutOfMemory {
                    anstream::eprintln!(
                        "flyrun: the machine ran out of memory, and the kernel killed the command"
                    );
                }
                Ok(ExitCode::Workload(status.code()))
            }
            End::Failed { kind, message } => Err(failure(kind, message)),
            End::Detached => Ok(ExitCode::Success),
            End::Interrupted => Ok(ExitCode::Interrupted),
            End::Gone(why) => Err(Error::new(why).advice("Run the command again.")),
            End::Lost => Err(Error::new("the machine ended before the command did")
                .code(ExitCode::Workload(ExitStatus::Signal(9).code()))),
        }
    }
}

/// Text of a machine's for the user's terminal: it must not hold anything that the terminal obeys.
pub fn printable(text: &str) -> String {
    text.chars().take(4096).map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// A failure that the machine told, as an error with the right exit code.
pub fn failure(kind: FailureKind, message: String) -> Error {
    let error = Error::new(printable(&message));
    match kind {
        FailureKind::CommandNotFound => error.code(ExitCode::NotFound),
        FailureKind::CommandNotExecutable => error.code(ExitCode::NotExecutable),
        FailureKind::UnknownUser => error.advice("Choose another with --user, by name or number."),
        FailureKind::NoSpace => error.advice("Make room in the machine."),
        FailureKind::BadConfig
        | FailureKind::BadLayer
        | FailureKind::LimitExceeded
        | FailureKind::Setup
        | FailureKind::NoSession => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_cannot_speak_to_the_terminal() {
        let error = failure(FailureKind::Setup, "a\x1b[2Jb\nc".into());
        assert_eq!(error.to_string(), "a?[2Jb?c");
    }

    #[test]
    fn exit_codes_are_dockers() {
        let code = |end: End| end.report().unwrap_or_else(|error| error.exit_code()).number();
        let failed = |kind| code(End::Failed { kind, message: "x".into() });
        assert_eq!(code(End::Exited(ExitStatus::Code(7))), 7);
        assert_eq!(code(End::Exited(ExitStatus::Signal(15))), 143);
        assert_eq!(code(End::Lost), 137);
        assert_eq!(code(End::Gone("x".into())), 125);
        assert_eq!(code(End::Detached), 0);
        assert_eq!(failed(FailureKind::CommandNotFound), 127);
        assert_eq!(failed(FailureKind::CommandNotExecutable), 126);
        assert_eq!(failed(FailureKind::UnknownUser), 125);
        assert_eq!(failed(FailureKind::Setup), 125);
    }
}
