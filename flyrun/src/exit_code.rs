//! The exit codes of flyrun, the same as docker's.

/// Why the process ends. A workload's own exit code is passed through as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitCode {
    /// The command did what it was asked for.
    Success,
    /// A check of `flyrun doctor` found something that will not work.
    Unhealthy,
    /// flyrun itself failed: usage, image, host, or virtual machine.
    Flyrun,
    /// The workload's command exists and cannot be executed.
    NotExecutable,
    /// The workload's command does not exist.
    NotFound,
    /// The user interrupted before the workload ran (128 + SIGINT).
    Interrupted,
    /// The workload's own code, or 128 + the number of the signal that ended it.
    Workload(u8),
}

impl ExitCode {
    /// The number handed to the shell.
    pub fn number(self) -> u8 {
        match self {
            ExitCode::Success => 0,
            ExitCode::Unhealthy => 1,
            ExitCode::Flyrun => 125,
            ExitCode::NotExecutable => 126,
            ExitCode::NotFound => 127,
            ExitCode::Interrupted => 130,
            ExitCode::Workload(code) => code,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_those_docker_documents() {
        let codes = [ExitCode::Flyrun, ExitCode::NotExecutable, ExitCode::NotFound, ExitCode::Workload(7)];
        assert_eq!(codes.map(ExitCode::number), [125, 126, 127, 7]);
    }
}
