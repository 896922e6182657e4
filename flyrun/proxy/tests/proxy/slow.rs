//! Clients that want to be waited for: each way of being slow has an end, whatever else comes meanwhile.

use std::time::Duration;

use proxy::Options;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::fake::{Client, Stage, canned, eventually, http_app};

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
const GET: &str = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// A second for a head, and one for standing still.
const IMPATIENT: &str = "[http_service.http_options]\nidle_timeout = 1\nheaders_read_timeout = 1\n";

/// A frame (RFC 9113, section 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// The head of a GET, without compression.
fn head() -> Vec<u8> {
    let field = |name: &str, value: &str| {
        [&[0, name.len() as u8], name.as_bytes(), &[value.len() as u8], value.as_bytes()].concat()
    };
    [field(":method", "GET"), field(":scheme", "http"), field(":authority", "a"), field(":path", "/")]
        .concat()
}

/// Sends the start at once and then a piece again and again, however little is read of what comes back, until the connection ends.
async fn drip(mut stream: TcpStream, start: Vec<u8>, piece: Vec<u8>) {
    let dripped = async {
        if stream.write_all(&start).await.is_err() {
            return;
        }
        let mut some = [0; 4096];
        loop {
            match tokio::time::timeout(Duration::from_millis(50), stream.read(&mut some)).await {
                Ok(Ok(0) | Err(_)) => return,
                Ok(Ok(_)) => {}
                Err(_) if stream.write_all(&piece).await.is_err() => return,
                Err(_) => {}
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), dripped).await.expect("it is waited for");
}

#[tokio::test]
async fn a_handshake_of_tls_that_comes_byte_by_byte_is_cut_off() {
    let options = Options { tls_handshake_timeout: Duration::from_secs(1), ..Options::default() };
    let made = rcgen::generate_simple_self_signed(vec!["a".to_string()]).unwrap();
    let tls = "[flyrun]\n[[flyrun.tls]]\ncertificate = 'a.pem'\nkey = 'a.key'\n";
    let (_, backend) = canned(OK);
    let stage = Stage::with(&http_app(""), options, backend).await;
    for (name, text) in [("a.key", made.signing_key.serialize_pem()), ("a.pem", made.cert.pem())] {
        std::fs::write(stage.directory.path().join(name), text).unwrap();
    }
    stage.serve(&[&http_app(tls)]);
    let address = stage.listen(443).await;
    let connect = async || TcpStream::connect(address).await.unwrap();
    // A record of a handshake, of 512 bytes (RFC 8446, section 5.1), nothing at all, and what is no TLS.
    let hello = [&[22, 3, 1, 2, 0], &[1, 0, 1, 252, 3, 3][..]].concat();
    tokio::join!(
        drip(connect().await, hello, vec![0]),
        drip(connect().await, Vec::new(), Vec::new()),
        drip(connect().await, GET.into(), b"x".to_vec()),
    );
    eventually(|| (stage.proxy.connections() == 0).then_some(())).await;
}

#[tokio::test]
async fn http_2_has_no_more_patience_than_http_1() {
    let (seen, backend) = canned(OK);
    let stage = Stage::new(&http_app(IMPATIENT), backend).await;
    let address = stage.listen(80).await;
    let connect = async || TcpStream::connect(address).await.unwrap();
    let settings = || [PREFACE, &frame(4, 0, 0, &[])].concat();
    let half_a_head = [settings(), frame(1, 0, 1, &head()[..10])].concat();
    tokio::join!(
        // The preface does not end; a connection without a request, though it pings, sets and moves windows; a head that does not end.
        drip(connect().await, PREFACE[..20].to_vec(), Vec::new()),
        drip(connect().await, settings(), Vec::new()),
        drip(connect().await, settings(), frame(6, 0, 0, &[0; 8])),
        drip(connect().await, settings(), frame(4, 0, 0, &[])),
        drip(connect().await, settings(), frame(8, 0, 0, &[0, 0, 0, 1])),
        drip(connect().await, half_a_head, frame(9, 0, 1, &[])),
    );
    eventually(|| (stage.proxy.connections() == 0).then_some(())).await;
    assert!(seen.lock().unwrap().is_empty());
}

fn resident_mib() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() / 256
}

#[tokio::test]
async fn a_flood_of_frames_that_ask_for_answers_costs_no_memory_and_ends() {
    let (_, backend) = canned(OK);
    let stage = Stage::new(&http_app(IMPATIENT), backend).await;
    let address = stage.listen(80).await;
    let before = resident_mib();
    // Pings, settings, windows, empty pieces of a body, priorities, frames of no known type: tens of megabytes, and nothing is read.
    let open = [PREFACE, &frame(4, 0, 0, &[]), &frame(1, 4, 1, &head())].concat();
    for piece in [
        frame(6, 0, 0, &[7; 8]),
        frame(4, 0, 0, &[0, 4, 0, 1, 0, 0]),
        frame(8, 0, 0, &[0, 0, 0, 1]),
        frame(0, 0, 1, &[]),
        frame(2, 0, 3, &[0, 0, 0, 0, 1]),
        frame(77, 0, 1, &[0; 16]),
    ] {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(&open).await.unwrap();
        let many = piece.repeat((64 << 10) / piece.len());
        let flood = async {
            for _ in 0..512 {
                if stream.write_all(&many).await.is_err() {
                    return;
                }
            }
        };
        // It takes no more, or has ended, or has seen them all.
        let _ = tokio::time::timeout(Duration::from_millis(700), flood).await;
        let kind = piece[3];
        assert!(resident_mib() < before + 24, "type {kind}: from {before} to {} MiB", resident_mib());
        let mut other = Client(TcpStream::connect(address).await.unwrap());
        other.send(GET).await;
        assert_eq!(other.answer().await.1, "ok", "type {kind}");
        drop(other);
        // Read at last, it comes to an end by itself.
        let rest = async { while !matches!(stream.read(&mut [0; 65536]).await, Ok(0) | Err(_)) {} };
        tokio::time::timeout(Duration::from_secs(30), rest)
            .await
            .unwrap_or_else(|_| panic!("type {kind} lasts"));
    }
    eventually(|| (stage.proxy.connections() == 0).then_some(())).await;
}
