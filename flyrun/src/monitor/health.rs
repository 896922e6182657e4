//! Making health checks: one at a time, each in a thread of its own, so that a machine that does not answer keeps
//! nobody waiting.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use protocol::session::{ExecConfig, FromSession, Request, ToSession};

use crate::error::{Context, Error, Result};
use crate::files::{self, Lasting};
use crate::http_status::{MAX_HEAD, status_of};
use crate::machine::Record;
use crate::machine::health::{Check, Health, Healthcheck, HttpTest, KEPT_OUTPUT, Status, Test};
use crate::paths::Paths;
use crate::session;
use crate::vm::{Event, Post, spawn};

/// What is known of a machine's health while it runs.
const FILE: &str = "health.json";

/// The checks of one life of a machine.
#[derive(Debug)]
pub struct Watch {
    target: Target,
    config: Healthcheck,
    health: Health,
    directory: PathBuf,
    post: Post,
    began: Instant,
    /// When the next check begins; none while one is made.
    due: Option<Instant>,
}

/// Where the checks go.
#[derive(Clone, Debug)]
struct Target {
    paths: Paths,
    record: Record,
    address: Option<IpAddr>,
}

/// What the checks of a machine that runs have found out; none if it has no checks.
pub fn read(directory: &Path) -> Option<Health> {
    serde_json::from_slice(&std::fs::read(directory.join(FILE)).ok()?).ok()
}

/// Forgets what was found out in an earlier life.
pub fn forget(directory: &Path) {
    let _ = std::fs::remove_file(directory.join(FILE));
}

impl Watch {
    /// Begins with the machine's process. `address` is the machine's, if it has a network.
    pub fn begin(
        paths: &Paths,
        record: &Record,
        directory: &Path,
        address: Option<Ipv4Addr>,
        post: Post,
    ) -> Option<Watch> {
        let config = record.config.health.clone()?;
        let began = Instant::now();
        let target =
            Target { paths: paths.clone(), record: record.clone(), address: address.map(IpAddr::V4) };
        let due = Some(began + config.pause(Status::Starting, Duration::ZERO));
        let directory = directory.to_path_buf();
        let watch = Watch { target, config, health: Health::default(), directory, post, began, due };
        watch.save();
        Some(watch)
    }

    /// When [`Self::check`] is to be called.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Begins a check if it is time; its result comes as [`Event::Checked`].
    pub fn check(&mut self) {
        if self.due.is_none_or(|due| due > Instant::now()) {
            return;
        }
        let (target, config, post) = (self.target.clone(), self.config.clone(), self.post.clone());
        let begun = spawn("health", move || {
            post.send(Event::Checked(target.check(&config)));
        });
        // Without a thread now, perhaps with one later.
        self.due = begun.is_err().then(|| Instant::now() + self.pause());
    }

    /// Takes the result of a check.
    pub fn learn(&mut self, check: Check) {
        self.health.learn(check, &self.config, self.began.elapsed());
        self.due = Some(Instant::now() + self.pause());
        self.save();
    }

    fn pause(&self) -> Duration {
        self.config.pause(self.health.status, self.began.elapsed())
    }

    /// On a full disk the last state that could be written stays.
    fn save(&self) {
        let written = serde_json::to_vec(&self.health)
            .map_err(io::Error::from)
            .and_then(|text| files::replace(&self.directory, FILE, &text, Lasting::Process));
        if let Err(error) = written {
            eprintln!("flyrun: cannot write {FILE}: {error}");
        }
    }
}

/// What a test has to say.
struct Answer {
    passed: bool,
    code: Option<u16>,
    output: String,
}

impl Target {
    fn check(&self, config: &Healthcheck) -> Check {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let began = Instant::now();
        let deadline = began + config.timeout();
        let result = match &config.test {
            Test::Command(argv) => self.execute(argv, deadline),
            Test::Http(test) => match self.address {
                Some(address) => get(address, test, deadline).context("no answer"),
                None => Err(Error::new("the machine has no network")),
            },
        };
        let late = Instant::now() >= deadline;
        let answer = result.unwrap_or_else(|error| {
            let timeout = format!("the check took longer than {:?}", config.timeout());
            let output = if late { timeout } else { error.to_string() };
            Answer { passed: false, code: None, output }
        });
        Check {
            started_at_ms: since_epoch.as_millis() as u64,
            took_ms: began.elapsed().as_millis() as u64,
            passed: answer.passed && !late,
            code: answer.code,
            output: answer.output,
        }
    }

    fn execute(&self, argv: &[String], deadline: Instant) -> Result<Answer> {
        let link = session::connect_before(&self.paths, &self.record, deadline)?;
        let command = ExecConfig { argv: argv.to_vec(), ..ExecConfig::default() };
        link.request(&Request::Exec(Box::new(command)))?;
        let mut frames = link.frames();
        let mut output = Vec::new();
        loop {
            match frames.next_before(deadline) {
                Ok(Some(FromSession::Stdout(bytes) | FromSession::Stderr(bytes))) => {
                    let room = KEPT_OUTPUT.saturating_sub(output.len());
                    output.extend(bytes.iter().take(room));
                }
                Ok(Some(FromSession::Exited(status))) => {
                    let output = String::from_utf8_lossy(&output).into_owned();
                    let code = status.code();
                    return Ok(Answer { passed: code == 0, code: Some(code.into()), output });
                }
                Ok(Some(FromSession::Failed { kind, message })) => {
                    return Err(session::failure(kind, message));
                }
                Ok(Some(_)) => {}
                Ok(None) => return Err(Error::new("the machine ended")),
                Err(error) => {
                    let _ = link.send(&ToSession::Signal { signal: crate::interrupt::SIGKILL });
                    return Err(Error::caused("the check did not end", &error));
                }
            }
        }
    }
}

/// The status of what a GET is answered with.
fn get(address: IpAddr, test: &HttpTest, deadline: Instant) -> io::Result<Answer> {
    let address = SocketAddr::new(address, test.port);
    let mut stream = TcpStream::connect_timeout(&address, left(deadline)?)?;
    stream.set_write_timeout(Some(left(deadline)?))?;
    let HttpTest { port, path } = test;
    let host = address.ip();
    let version = env!("CARGO_PKG_VERSION");
    // In one piece: a server that reads once must have all of it.
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUser-Agent: flyrun/{version}\r\nAccept: */*\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes())?;
    let mut head = Vec::new();
    let mut chunk = [0; 2048];
    while head.len() < MAX_HEAD {
        stream.set_read_timeout(Some(left(deadline)?))?;
        let count = stream.read(&mut chunk)?;
        head.extend(chunk.iter().take(count));
        if let Some(status) = status_of(&head)? {
            let output = format!("HTTP status {status}");
            return Ok(Answer { passed: (200..300).contains(&status), code: Some(status), output });
        }
        if count == 0 {
            break;
        }
    }
    Err(io::Error::other("what came is no HTTP answer"))
}

fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn asked(answer: &'static [u8]) -> io::Result<Answer> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let serving = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let count = stream.read(&mut request).unwrap();
            let _ = stream.write_all(answer);
            String::from_utf8_lossy(&request[..count]).into_owned()
        });
        let test = HttpTest { port, path: "/up".into() };
        let answer = get("127.0.0.1".parse().unwrap(), &test, Instant::now() + Duration::from_secs(60));
        assert!(serving.join().unwrap().starts_with("GET /up HTTP/1.1\r\n"));
        answer
    }

    #[test]
    fn only_success_passes() {
        assert!(asked(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap().passed);
        for answer in [&b"HTTP/1.0 301 Moved\r\nLocation: /\r\n\r\n"[..], b"HTTP/1.1 500 Oh\r\n\r\nbody"] {
            assert!(!asked(answer).unwrap().passed);
        }
    }

    #[test]
    fn what_is_no_answer_fails() {
        for answer in [&b""[..], b"HTTP/1.1 200 OK\r\nHalf", b"SSH-2.0-x\r\n", b"HTTP/9 zzz\r\n\r\n"] {
            assert!(asked(answer).is_err(), "{answer:?}");
        }
    }

    #[test]
    fn an_endless_head_is_given_up() {
        static ENDLESS: [u8; MAX_HEAD * 2] = {
            let mut bytes = [b'x'; MAX_HEAD * 2];
            let start = b"HTTP/1.1 200 OK\r\nA: ";
            let mut at = 0;
            while at < start.len() {
                bytes[at] = start[at];
                at += 1;
            }
            bytes
        };
        assert!(asked(&ENDLESS).is_err());
    }

    #[test]
    fn time_that_is_over_is_no_time() {
        let test = HttpTest { port: 1, path: "/".into() };
        let error = get("127.0.0.1".parse().unwrap(), &test, Instant::now()).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
