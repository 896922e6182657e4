//! A client of HTTP/1.1 that takes nothing on trust: an answer is whole, or it is none.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// After so long a request hangs, whatever the machine is busy with.
const HANG: Duration = Duration::from_secs(300);

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// The head, in lower case.
    pub head: String,
    /// The body.
    pub body: Vec<u8>,
}

/// Why there is none.
#[derive(Debug)]
pub enum Fault {
    /// Nothing of an answer came.
    Unanswered(io::Error),
    /// It broke off, or is no HTTP.
    Broken(String),
}

/// A connection.
#[derive(Debug)]
pub struct Client {
    /// When it was made.
    pub since: Instant,
    stream: TcpStream,
    ahead: Vec<u8>,
}

impl Answer {
    /// The body as text, without the end of its last line.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).trim_end().to_string()
    }

    /// A field of the head, by its name in lower case.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
    }
}

/// A request without a body.
pub fn get(host: &str, path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n").into_bytes()
}

/// A request with one.
pub fn post(host: &str, path: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

impl Client {
    /// To this host.
    ///
    /// # Errors
    /// The system's.
    pub fn connect(port: u16) -> io::Result<Client> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(HANG))?;
        stream.set_write_timeout(Some(HANG))?;
        Ok(Client { since: Instant::now(), stream, ahead: Vec::new() })
    }

    /// Sends bytes.
    ///
    /// # Errors
    /// The system's.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// A request and its answer.
    ///
    /// # Errors
    /// There is none.
    pub fn ask(&mut self, request: &[u8]) -> Result<Answer, Fault> {
        let sent = self.send(request);
        match (sent, self.answer()) {
            (Err(error), Err(Fault::Unanswered(_))) => Err(Fault::Unanswered(error)),
            (_, answer) => answer,
        }
    }

    /// The next answer.
    ///
    /// # Errors
    /// There is none, or it is not whole.
    pub fn answer(&mut self) -> Result<Answer, Fault> {
        let end = loop {
            if let Some(at) = self.ahead.windows(4).position(|four| four == b"\r\n\r\n") {
                break at + 4;
            }
            match self.more() {
                Ok(0) if self.ahead.is_empty() => {
                    return Err(Fault::Unanswered(io::ErrorKind::UnexpectedEof.into()));
                }
                Ok(0) => return Err(broken("the head breaks off", &self.ahead)),
                Ok(_) => {}
                Err(error) if self.ahead.is_empty() => return Err(Fault::Unanswered(error)),
                Err(error) => return Err(broken(&error.to_string(), &self.ahead)),
            }
        };
        let head = String::from_utf8_lossy(&self.take(end)).to_ascii_lowercase();
        let status = head.get(9..12).and_then(|digits| digits.parse().ok());
        let Some(status) = status.filter(|_| head.starts_with("http/1.1 ")) else {
            return Err(broken("this is no answer", head.as_bytes()));
        };
        let mut answer = Answer { status, head, body: Vec::new() };
        answer.body = match (answer.field("content-length"), answer.field("transfer-encoding")) {
            (Some(length), None) => {
                let length =
                    length.parse().map_err(|_| broken("the length is none", answer.head.as_bytes()))?;
                self.exactly(length)?
            }
            (None, Some("chunked")) => self.chunks()?,
            _ => return Err(broken("it has no length", answer.head.as_bytes())),
        };
        Ok(answer)
    }

    fn chunks(&mut self) -> Result<Vec<u8>, Fault> {
        let mut body = Vec::new();
        loop {
            let line = self.line()?;
            let length = usize::from_str_radix(line.trim(), 16);
            let length = length.map_err(|_| broken("a chunk has no length", line.as_bytes()))?;
            body.extend(self.exactly(length)?);
            if self.line()? != "\r\n" {
                return Err(broken("a chunk does not end", &body));
            }
            if length == 0 {
                return Ok(body);
            }
        }
    }

    fn line(&mut self) -> Result<String, Fault> {
        loop {
            if let Some(at) = self.ahead.windows(2).position(|two| two == b"\r\n") {
                return Ok(String::from_utf8_lossy(&self.take(at + 2)).into_owned());
            }
            self.must_have_more()?;
        }
    }

    fn exactly(&mut self, length: usize) -> Result<Vec<u8>, Fault> {
        while self.ahead.len() < length {
            self.must_have_more()?;
        }
        Ok(self.take(length))
    }

    fn must_have_more(&mut self) -> Result<(), Fault> {
        match self.more() {
            Ok(0) => Err(broken("the body breaks off", &self.ahead)),
            Ok(_) => Ok(()),
            Err(error) => Err(broken(&error.to_string(), &self.ahead)),
        }
    }

    fn more(&mut self) -> io::Result<usize> {
        let mut piece = [0; 16 << 10];
        let count = self.stream.read(&mut piece)?;
        self.ahead.extend(&piece[..count]);
        Ok(count)
    }

    fn take(&mut self, count: usize) -> Vec<u8> {
        self.ahead.drain(..count).collect()
    }
}

fn broken(why: &str, bytes: &[u8]) -> Fault {
    let shown = String::from_utf8_lossy(bytes.get(..200).unwrap_or(bytes)).into_owned();
    Fault::Broken(format!("{why}: {shown:?}"))
}

/// How many zeros a GET brings, without keeping them.
pub fn download(port: u16, host: &str, path: &str) -> usize {
    let mut client = Client::connect(port).unwrap();
    client.send(&get(host, path)).unwrap();
    while !client.ahead.windows(4).any(|four| four == b"\r\n\r\n") {
        assert_ne!(client.more().unwrap(), 0, "there is no answer");
    }
    let end = client.ahead.windows(4).position(|four| four == b"\r\n\r\n").unwrap() + 4;
    let head = String::from_utf8(client.take(end)).unwrap().to_ascii_lowercase();
    let answer = Answer { status: 0, head, body: Vec::new() };
    let length: usize = answer.field("content-length").expect(&answer.head).parse().unwrap();
    let (mut received, mut piece) = (client.ahead.len(), vec![0; 256 << 10]);
    while received < length {
        let count = client.stream.read(&mut piece).unwrap();
        assert!(count > 0 && piece[..count].iter().all(|byte| *byte == 0), "after {received} bytes");
        received += count;
    }
    received
}

/// Sends so many zeros.
pub fn upload(port: u16, host: &str, path: &str, bytes: usize) -> Answer {
    let mut client = Client::connect(port).unwrap();
    let head = format!("POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {bytes}\r\n\r\n");
    client.send(head.as_bytes()).unwrap();
    let piece = vec![0; 256 << 10];
    let mut left = bytes;
    while left > 0 {
        let count = left.min(piece.len());
        client.send(&piece[..count]).unwrap();
        left -= count;
    }
    client.answer().unwrap()
}
