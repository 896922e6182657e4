//! The web server of a guest: answers each request of a connection with the same few bytes, as long as the client likes.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 12\r\n\r\nHello there\n";

fn main() {
    let listener = TcpListener::bind("[::]:8080").expect("port 8080 is free in a machine of its own");
    for stream in listener.incoming().flatten() {
        std::thread::spawn(move || answer(stream));
    }
}

/// Requests have no body, so that each ends with its first empty line. One may say that it is the last.
fn answer(mut stream: TcpStream) -> Option<()> {
    stream.set_nodelay(true).ok()?;
    let mut request = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let count = stream.read(&mut chunk).ok().filter(|count| *count > 0)?;
        request.extend_from_slice(&chunk[..count]);
        while let Some(end) = request.windows(4).position(|window| window == b"\r\n\r\n") {
            let head: Vec<u8> = request.drain(..end + 4).collect();
            stream.write_all(ANSWER).ok()?;
            if String::from_utf8_lossy(&head).to_ascii_lowercase().contains("\r\nconnection: close\r\n") {
                return None;
            }
        }
        if request.len() > 1 << 16 {
            return None;
        }
    }
}
