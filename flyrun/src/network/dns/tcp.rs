//! Questions by TCP (RFC 7766): what is too long for UDP.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::{STACK_BYTES, Sources};

/// Connections at a time, of all machines of this process, and questions in each.
const MAX_CONNECTIONS: usize = 8;
const MAX_QUESTIONS: usize = 100;
const PATIENCE: Duration = Duration::from_secs(5);

static CONNECTIONS: AtomicUsize = AtomicUsize::new(0);

/// Counts one connection for as long as it is there.
struct Place;

impl Place {
    fn take() -> Option<Place> {
        let taken = CONNECTIONS.fetch_add(1, Ordering::AcqRel);
        let place = Place;
        (taken < MAX_CONNECTIONS).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        CONNECTIONS.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Serves a connection on a thread of its own, unless there are too many.
pub(super) fn serve(stream: TcpStream, sources: Sources) {
    let Some(place) = Place::take() else { return };
    let thread = std::thread::Builder::new().name("names-tcp".into()).stack_size(STACK_BYTES);
    let _ = thread.spawn(move || {
        let _place = place;
        let _ended = converse(stream, &sources);
    });
}

fn converse(mut stream: TcpStream, sources: &Sources) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    for _ in 0..MAX_QUESTIONS {
        let question = read_message(&mut stream)?;
        let answer = match sources.own_answer(&question) {
            Some(answer) => answer,
            None => ask(&question, sources)?,
        };
        write_message(&mut stream, &answer)?;
    }
    Ok(())
}

fn ask(question: &[u8], sources: &Sources) -> io::Result<Vec<u8>> {
    let mut last = io::ErrorKind::NotFound.into();
    for server in sources.servers() {
        let attempt = TcpStream::connect_timeout(&server, PATIENCE).and_then(|mut stream| {
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            write_message(&mut stream, question)?;
            read_message(&mut stream)
        });
        match attempt {
            Ok(answer) => return Ok(answer),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Two bytes of length, then so many.
pub fn read_message(stream: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut message = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut message)?;
    Ok(message)
}

fn write_message(stream: &mut impl Write, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), message].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_comes_back_as_it_was() {
        let mut bytes = Vec::new();
        write_message(&mut bytes, b"question").unwrap();
        assert_eq!(read_message(&mut bytes.as_slice()).unwrap(), b"question");
        assert!(read_message(&mut bytes.get(..5).unwrap_or_default()).is_err());
    }
}
