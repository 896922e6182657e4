//! Runs the built flyrun and judges what came of it.

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;
use std::thread;

use tempfile::TempDir;

/// After this many seconds a run hangs, whatever the machine is busy with.
const HANG_SECONDS: &str = "600";

/// The flyrun under test: `FLYRUN_BIN`, or what `make build` made.
pub fn program() -> PathBuf {
    let path = std::env::var_os("FLYRUN_BIN").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/dist/bin/flyrun"),
        PathBuf::from,
    );
    assert!(path.is_file(), "{} is missing: run `make build`, or set FLYRUN_BIN", path.display());
    path
}

/// A new directory for a test's files, with room: in the test host it is in RAM.
pub fn scratch() -> TempDir {
    tempfile::Builder::new().prefix("flyrun-e2e-").tempdir_in("/var/tmp").unwrap()
}

/// flyrun with its store and its directory of sockets.
#[derive(Debug)]
pub struct Flyrun {
    directory: PathBuf,
    _scratch: Option<TempDir>,
}

/// The test harness tells why a test has failed when all have ended, and not at all if that is not in time.
fn tell_failures_at_once() {
    let harness = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        use std::io::Write as _;
        let thread = std::thread::current();
        // Not by eprintln!, which the harness keeps.
        let _ = writeln!(std::io::stderr(), "--- {}: {panic}", thread.name().unwrap_or("?"));
        harness(panic);
    }));
}

impl Flyrun {
    /// The store that most tests share, so that each image is unpacked once.
    pub fn shared() -> &'static Flyrun {
        static SHARED: LazyLock<Flyrun> = LazyLock::new(|| {
            let directory = PathBuf::from("/var/tmp/flyrun-e2e");
            let _ = std::fs::remove_dir_all(&directory);
            std::fs::create_dir_all(&directory).unwrap();
            tell_failures_at_once();
            Flyrun { directory, _scratch: None }
        });
        &SHARED
    }

    /// A store of its own, for a test that takes things away or counts them.
    pub fn fresh() -> Flyrun {
        let scratch = scratch();
        let fresh = Flyrun { directory: scratch.path().to_path_buf(), _scratch: Some(scratch) };
        let bases = Flyrun::shared().root().join("bases");
        std::fs::create_dir_all(&bases).unwrap();
        std::fs::create_dir_all(fresh.root()).unwrap();
        // What is in there is nobody's; making it takes a boot each time.
        std::os::unix::fs::symlink(bases, fresh.root().join("bases")).unwrap();
        fresh
    }

    /// Where images and machines are.
    pub fn root(&self) -> PathBuf {
        self.directory.join("root")
    }

    /// Where sockets are.
    pub fn run_dir(&self) -> PathBuf {
        self.directory.join("run")
    }

    /// Lets a command that calls flyrun itself use this store.
    pub fn environment(&self, command: &mut Command) {
        command.env("FLYRUN_ROOT", self.root()).env("FLYRUN_RUN", self.run_dir());
    }

    /// `flyrun ARGUMENTS…`
    pub fn command(&self, arguments: &[&str]) -> Invocation<'_> {
        let arguments = arguments.iter().map(|&argument| argument.to_string()).collect();
        Invocation { flyrun: self, arguments, environment: Vec::new(), stdin: None }
    }

    /// `flyrun run --rm FLAGS_AND_IMAGE_AND_COMMAND…`
    pub fn run(&self, arguments: &[&str]) -> Invocation<'_> {
        self.command(&[&["run", "--rm"], arguments].concat())
    }

    /// The files and directories of the store that are not empty directories, for comparing before and after.
    pub fn contents(&self) -> Vec<String> {
        let output = Command::new("find")
            .arg(self.root())
            .args([
                "-not", "-type", "d", "-not", "-path", "*/bases*", "-not", "-name", "*lock*", "-printf",
                "%P %s\n",
            ])
            .output()
            .unwrap();
        let mut lines: Vec<_> = String::from_utf8(output.stdout).unwrap().lines().map(String::from).collect();
        lines.sort();
        lines
    }
}

/// A command line of flyrun, and what it gets.
#[derive(Clone, Debug)]
pub struct Invocation<'a> {
    flyrun: &'a Flyrun,
    arguments: Vec<String>,
    environment: Vec<(OsString, OsString)>,
    stdin: Option<Vec<u8>>,
}

impl Invocation<'_> {
    /// Sets a variable of flyrun's own environment.
    pub fn env(mut self, key: &str, value: impl Into<OsString>) -> Self {
        self.environment.push((key.into(), value.into()));
        self
    }

    /// What flyrun reads from its standard input; without it that is /dev/null.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(bytes.into());
        self
    }

    /// The command, to be started by the test itself.
    pub fn build(&self, wrapper: &[&str]) -> Command {
        let mut words = wrapper.iter().map(OsString::from).collect::<Vec<_>>();
        words.push(program().into());
        let mut command = Command::new(words.remove(0));
        command.args(words).args(&self.arguments);
        self.flyrun.environment(&mut command);
        command.envs(self.environment.iter().cloned());
        command
    }

    /// Runs it to its end.
    pub fn end(self) -> Outcome {
        self.end_under(&[])
    }

    /// Runs it to its end as the last argument of another command.
    pub fn end_under(self, wrapper: &[&str]) -> Outcome {
        let limit = ["timeout", "--foreground", "--kill-after=10", HANG_SECONDS];
        let mut command = self.build(&[&limit, wrapper].concat());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.stdin(if self.stdin.is_some() { Stdio::piped() } else { Stdio::null() });
        let mut child = command.spawn().unwrap();
        let writer = child.stdin.take().zip(self.stdin.clone()).map(|(mut pipe, bytes)| {
            // A process that reads less than it is given is no failure of the test.
            thread::spawn(move || {
                let _ = pipe.write_all(&bytes);
            })
        });
        let output = child.wait_with_output().unwrap();
        if let Some(writer) = writer {
            writer.join().unwrap();
        }
        let code = output.status.code().unwrap_or_else(|| 128 + output.status.signal().unwrap_or(0));
        let told = format!("flyrun {}", self.arguments.join(" "));
        let again = self.with_guest_log();
        Outcome { told, again, code, stdout: output.stdout, stderr: output.stderr }
    }

    /// The same run, with guest-init's steps and the console shown: what a failing test prints.
    fn with_guest_log(&self) -> Option<Command> {
        let after_run = self.arguments.iter().position(|argument| argument == "run")? + 1;
        let mut again = self.clone();
        again.arguments.insert(after_run, "--init-log".to_string());
        let mut command = again.build(&["timeout", "--kill-after=5", "60"]);
        command.stdin(Stdio::null());
        Some(command)
    }
}

/// What became of a run. Its checks panic with all that is known.
#[derive(Debug)]
pub struct Outcome {
    told: String,
    again: Option<Command>,
    /// Exit code, or 128 + the signal that ended flyrun itself.
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl Outcome {
    /// Standard output as text, without the end of its last line.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_string()
    }

    /// Standard error as text.
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Checks the exit code.
    #[track_caller]
    pub fn code(mut self, expected: i32) -> Self {
        if self.code != expected {
            self.fail(&format!("the exit code is {}, not {expected}", self.code));
        }
        self
    }

    /// Checks all of standard output, but for the end of its last line.
    #[track_caller]
    pub fn prints(mut self, expected: &str) -> Self {
        if self.text() != expected {
            self.fail(&format!("standard output is not {expected:?}"));
        }
        self
    }

    /// Checks that standard output holds this.
    #[track_caller]
    pub fn prints_something_with(mut self, expected: &str) -> Self {
        if !self.text().contains(expected) {
            self.fail(&format!("standard output has no {expected:?}"));
        }
        self
    }

    /// Checks that standard error holds this, in whichever case.
    #[track_caller]
    pub fn complains_about(mut self, expected: &str) -> Self {
        if !self.errors().to_lowercase().contains(&expected.to_lowercase()) {
            self.fail(&format!("standard error has no {expected:?}"));
        }
        self
    }

    /// Checks that flyrun failed by its own fault or the image's, said why in a few lines and did not panic.
    #[track_caller]
    pub fn fails_clearly(self) -> Self {
        let mut outcome = self.code(125);
        let errors = outcome.errors();
        let lines = errors.lines().count();
        if errors.contains("panicked") || errors.trim().is_empty() || lines > 8 {
            outcome.fail("standard error is no clear message");
        }
        outcome
    }

    /// Standard output as JSON.
    #[track_caller]
    pub fn json(&mut self) -> serde_json::Value {
        match serde_json::from_slice(&self.stdout) {
            Ok(value) => value,
            Err(error) => self.fail(&format!("standard output is no JSON: {error}")),
        }
    }

    /// Ends the test with everything that is known, and the guest's log of another attempt.
    #[track_caller]
    pub fn fail(&mut self, why: &str) -> ! {
        let log = self.again.as_mut().map(|command| {
            let output = command.output().unwrap();
            let end = String::from_utf8_lossy(&output.stderr).into_owned();
            format!("--- the same again, with --init-log, ended with {}:\n{end}", output.status)
        });
        panic!(
            "{why}\n--- {}\n--- exit code {}\n--- standard output:\n{}\n--- standard error:\n{}\n{}",
            self.told,
            self.code,
            self.text(),
            self.errors(),
            log.unwrap_or_default(),
        );
    }
}
