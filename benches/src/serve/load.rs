//! A client that takes the time of each of its requests.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use crate::run::milliseconds;

/// The host that is asked for.
pub const HOST: &str = "hello.test";
/// Longer than any machine needs to start, in virtual time.
const PATIENCE: Duration = Duration::from_secs(60);
/// More than any head of an answer here has.
const MAX_HEAD: usize = 16 << 10;
const HEAD_END: &[u8] = b"\r\n\r\n";

/// Requests that come before those that count: all caches are warm then.
const BEFORE: usize = 30;

/// Milliseconds of each of so many requests, one after another over one connection, to the last byte of their answers.
pub fn warm(address: SocketAddr, requests: usize) -> Result<Vec<f64>> {
    let mut stream = connect(address)?;
    let request = format!("GET / HTTP/1.1\r\nhost: {HOST}\r\n\r\n");
    let mut times = Vec::with_capacity(requests);
    for number in 0..BEFORE + requests {
        let began = Instant::now();
        stream.write_all(request.as_bytes())?;
        read_answer(&mut stream).with_context(|| format!("request {number}"))?;
        if number >= BEFORE {
            times.push(milliseconds(began.elapsed()));
        }
    }
    Ok(times)
}

/// Milliseconds from the wish to connect to the first byte of the answer.
pub fn first_byte(address: SocketAddr) -> Result<f64> {
    let began = Instant::now();
    let mut stream = connect(address)?;
    stream.write_all(format!("GET / HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\n\r\n").as_bytes())?;
    let mut first = [0];
    stream.read_exact(&mut first).context("there was no answer")?;
    let time = milliseconds(began.elapsed());
    let mut answer = first.to_vec();
    stream.read_to_end(&mut answer)?;
    ensure!(is_good(&answer), "the answer is {:?}", String::from_utf8_lossy(&answer));
    Ok(time)
}

fn connect(address: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(address).with_context(|| format!("cannot connect to {address}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// One answer, of which the length is told.
fn read_answer(stream: &mut impl Read) -> Result<()> {
    let mut answer = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let head = answer.windows(HEAD_END.len()).position(|window| window == HEAD_END);
        if let Some(head) = head {
            ensure!(is_good(&answer), "the answer is {:?}", String::from_utf8_lossy(&answer));
            let body = answer.len() - head - HEAD_END.len();
            let length = content_length(answer.get(..head).unwrap_or_default())?;
            ensure!(body <= length, "there are {body} bytes of an answer of {length}");
            if body == length {
                return Ok(());
            }
        } else if answer.len() > MAX_HEAD {
            bail!("the head of the answer does not end");
        }
        let count = stream.read(&mut chunk)?;
        ensure!(count > 0, "the connection ended within an answer");
        answer.extend_from_slice(chunk.get(..count).unwrap_or_default());
    }
}

fn is_good(answer: &[u8]) -> bool {
    answer.starts_with(b"HTTP/1.1 200 ")
}

fn content_length(head: &[u8]) -> Result<usize> {
    let head = String::from_utf8_lossy(head).to_ascii_lowercase();
    let value = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    value.context("the answer does not tell its length")?.trim().parse().context("its length is no number")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_ends_where_its_head_says() {
        let text = |length: usize| format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\nhello");
        read_answer(&mut text(5).as_bytes()).unwrap();
        for bad in [text(4), text(6), text(5).replace("200", "502"), text(5).replace("Content-Length", "x")] {
            assert!(read_answer(&mut bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
