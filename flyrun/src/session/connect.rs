//! Reaching guest-init: the VMM's vsock socket, and the line that names the port.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use protocol::session::PORT;

use super::Link;
use crate::error::{Context, Error, Result};
use crate::machine::Record;
use crate::paths::{Paths, vsock};

/// Longer than "OK 4294967295\n".
const MAX_ANSWER_BYTES: usize = 20;

/// Opens a session with a running machine. The request follows.
///
/// # Errors
/// The machine has just ended, or does not take sessions yet.
pub fn connect(paths: &Paths, machine: &Record) -> Result<Link> {
    open(paths, machine, None)
}

/// As [`connect`], for one who does not wait for ever.
///
/// # Errors
/// Also when the machine has not answered by then.
pub fn connect_before(paths: &Paths, machine: &Record, deadline: Instant) -> Result<Link> {
    let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    open(paths, machine, Some(left))
}

/// Opens the connection below a session.
///
/// # Errors
/// As [`connect_before`].
pub(super) fn open_before(paths: &Paths, machine: &Record, deadline: Instant) -> Result<UnixStream> {
    let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    open_stream(paths, machine, Some(left))
}

fn open(paths: &Paths, machine: &Record, patience: Option<Duration>) -> Result<Link> {
    open_stream(paths, machine, patience).map(Link::new)
}

fn open_stream(paths: &Paths, machine: &Record, patience: Option<Duration>) -> Result<UnixStream> {
    let path = vsock(&paths.run_dir(&machine.id));
    let stream = UnixStream::connect(&path).map_err(|error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => unreachable(&machine.name),
        _ => Error::caused(format!("cannot reach machine '{}' at {}", machine.name, path.display()), &error),
    })?;
    for set in [UnixStream::set_read_timeout, UnixStream::set_write_timeout] {
        set(&stream, patience).context("cannot limit the time of a connection")?;
    }
    greet(stream, &machine.name, &path)
}

fn greet(mut stream: UnixStream, name: &str, path: &Path) -> Result<UnixStream> {
    let failed = || format!("cannot reach machine '{name}' at {}", path.display());
    stream.write_all(format!("CONNECT {PORT}\n").as_bytes()).context(failed())?;
    let mut line = Vec::new();
    // Byte by byte, as what follows the line belongs to the session.
    while !line.ends_with(b"\n") && line.len() < MAX_ANSWER_BYTES {
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(0) => return Err(unreachable(name)),
            Ok(_) => line.extend(byte),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Err(unreachable(name)),
            Err(error) => return Err(Error::caused(failed(), &error)),
        }
    }
    if line.starts_with(b"OK ") { Ok(stream) } else { Err(unreachable(name)) }
}

fn unreachable(name: &str) -> Error {
    Error::new(format!("machine '{name}' takes no sessions: it is just starting or ending"))
        .advice("Try again in a moment.")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn greeted_by(answer: &'static [u8]) -> Result<UnixStream> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(answer).unwrap();
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        let greeted = greet(ours, "web", Path::new("/run/x"));
        let mut line = [0; 11];
        theirs.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"CONNECT 10\n");
        greeted
    }

    #[test]
    fn what_follows_the_answer_is_left_for_the_session() {
        let mut stream = greeted_by(b"OK 1073741824\nframes").unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "frames");
    }

    #[test]
    fn a_refusal_names_the_machine() {
        for answer in [&b""[..], b"O", b"NO\n", b"OKOKOKOKOKOKOKOKOKOKOKOKOKOK"] {
            assert!(greeted_by(answer).unwrap_err().to_string().contains("'web'"));
        }
    }
}
