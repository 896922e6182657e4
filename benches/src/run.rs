//! Starts a program and takes the time to the first sign of life on its standard output.

use std::{
    io::Read,
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

/// A program that has shown its sign of life. It is killed and reaped when dropped.
#[derive(Debug)]
pub struct Started {
    child: Child,
    stdout: ChildStdout,
    /// From the moment before the process was made to the sign's last byte being read.
    pub elapsed: Duration,
}

impl Started {
    /// Starts the program and reads until `sign` has appeared; the first byte is enough if it is empty.
    pub fn new(command: &mut Command, sign: &str) -> Result<Self> {
        let began = Instant::now();
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("it cannot be started")?;
        let Some(mut stdout) = child.stdout.take() else { bail!("it has no standard output") };
        let mut text = Vec::new();
        let mut chunk = [0; 4096];
        loop {
            let count = stdout.read(&mut chunk)?;
            let elapsed = began.elapsed();
            if count == 0 {
                let status = child.wait()?;
                bail!("it ended ({status}) without a sign of life: {}", String::from_utf8_lossy(&text));
            }
            text.extend_from_slice(chunk.get(..count).unwrap_or_default());
            if text.windows(sign.len().max(1)).any(|window| sign.is_empty() || window == sign.as_bytes()) {
                return Ok(Self { child, stdout, elapsed });
            }
        }
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the program ends by itself, and demands success.
    pub fn finish(mut self) -> Result<()> {
        let mut rest = String::new();
        let _unread = self.stdout.read_to_string(&mut rest);
        let status = self.child.wait()?;
        anyhow::ensure!(status.success(), "it ended with {status}: {rest}");
        Ok(())
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let _gone_already = self.child.kill();
        let _reaped_already = self.child.wait();
    }
}

/// Milliseconds with their fraction.
pub fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_ends_without_the_sign_is_an_error_with_its_output() {
        let error = Started::new(Command::new("echo").arg("something else"), "FIRST-LINE").unwrap_err();
        assert!(format!("{error:#}").contains("something else"), "{error:#}");
    }

    #[test]
    fn a_program_that_shows_the_sign_is_waited_for() {
        Started::new(Command::new("echo").arg("the FIRST-LINE"), "FIRST-LINE").unwrap().finish().unwrap();
    }

    #[test]
    fn a_program_that_fails_after_the_sign_is_an_error() {
        let started = Started::new(Command::new("sh").args(["-c", "echo x; exit 3"]), "").unwrap();
        assert!(started.finish().is_err());
    }
}
