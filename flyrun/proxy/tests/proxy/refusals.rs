//! What two recipients could read as two different messages (RFC 9112, sections 2 to 7 and 11.2): refused, closed, and no
//! byte of it goes to a machine.

use tokio::net::TcpStream;

use crate::fake::{Client, Stage, canned, field, http_app};

const GET: &str = "GET / HTTP/1.1\r\nHost: a\r\n";
const POST: &str = "POST / HTTP/1.1\r\nHost: a\r\n";

/// Name, bytes after which the client waits, and the status.
fn refused() -> Vec<(&'static str, Vec<u8>, u16)> {
    let case = |name, bytes: String, status| (name, bytes.into_bytes(), status);
    let get = |fields: &str| format!("{GET}{fields}\r\n");
    let post = |rest: &str| format!("{POST}{rest}");
    let chunked = |body: &str| format!("{POST}Transfer-Encoding: chunked\r\n\r\n{body}");
    vec![
        // Section 6: lengths.
        case(
            "length and chunked",
            post("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
            400,
        ),
        case(
            "chunked and length",
            post("Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"),
            400,
        ),
        case("two lengths that differ", post("Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello"), 400),
        case("two lengths that agree", post("Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello"), 400),
        case("a list of lengths", post("Content-Length: 5, 5\r\n\r\nhello"), 400),
        case("a signed length", post("Content-Length: +5\r\n\r\nhello"), 400),
        case("a negative length", post("Content-Length: -5\r\n\r\nhello"), 400),
        case("a hexadecimal length", post("Content-Length: 0x5\r\n\r\nhello"), 400),
        case("an empty length", post("Content-Length:\r\n\r\nhello"), 400),
        case("a length with a space inside", post("Content-Length: 1 0\r\n\r\nhello"), 400),
        case("a length beyond 64 bits", post("Content-Length: 18446744073709551616\r\n\r\nhello"), 400),
        case("chunked twice in one field", post("Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n"), 400),
        case(
            "chunked twice",
            post("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
            400,
        ),
        case("chunked not last", post("Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n"), 400),
        case("another coding first", post("Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"), 501),
        case("an unknown coding", post("Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"), 400),
        case("identity", post("Transfer-Encoding: identity\r\n\r\n"), 400),
        case("a coding in quotes", post("Transfer-Encoding: \"chunked\"\r\n\r\n0\r\n\r\n"), 400),
        case(
            "a coding with a control character",
            post("Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n"),
            400,
        ),
        case(
            "chunked in HTTP/1.0",
            "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".into(),
            400,
        ),
        // Section 7.1: chunks. The head is good, so that these are found out while the body is on its way.
        case("a chunk size that is no number", chunked("g\r\n"), 400),
        case("an empty chunk size", chunked("\r\nhello\r\n0\r\n\r\n"), 400),
        case("a chunk size with 0x", chunked("0x5\r\nhello\r\n0\r\n\r\n"), 400),
        case("a signed chunk size", chunked("+5\r\nhello\r\n0\r\n\r\n"), 400),
        case("a chunk size beyond 64 bits", chunked("10000000000000000\r\nhello"), 400),
        case("a chunk size that ends with a bare LF", chunked("5\nhello\r\n0\r\n\r\n"), 400),
        case("an extension with a bare CR", chunked("5;a\rb\r\nhello\r\n0\r\n\r\n"), 400),
        case("an extension without end", chunked(&format!("5;{}", "a".repeat(2000))), 400),
        case("a trailer with a bare LF", chunked("0\r\nA: b\n\r\n"), 400),
        case("a trailer that is folded", chunked("0\r\nA: b\r\n c\r\n\r\n"), 400),
        case("a trailer without end", chunked(&format!("0\r\nA: {}", "b".repeat(20_000))), 400),
        // Section 5: fields.
        case("a space before the colon", get("A : b\r\n"), 400),
        case("a space before the colon of a length", post("Content-Length : 5\r\n\r\nhello"), 400),
        case("a folded field", get("A: b\r\n c\r\n"), 400),
        case("a folded coding", post("Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n"), 400),
        case("a space before the first field", "GET / HTTP/1.1\r\n Host: a\r\n\r\n".into(), 400),
        case("a field without colon", get("Abc\r\n"), 400),
        case("a field without name", get(": b\r\n"), 400),
        case("a name that is no token", get("A(b): c\r\n"), 400),
        case("a NUL in a value", get("A: b\0c\r\n"), 400),
        case("a NUL in a name", get("A\0: c\r\n"), 400),
        case("a bare CR in a value", get("A: b\rc\r\n"), 400),
        case("a DEL in a value", get("A: b\x7fc\r\n"), 400),
        // Section 2.2: line ends.
        case("lines that end with a bare LF", "GET / HTTP/1.1\nHost: a\n\n".into(), 400),
        case("one line that ends with a bare LF", "GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n".into(), 400),
        case("an empty line that is a bare LF", "GET / HTTP/1.1\r\nHost: a\r\n\n".into(), 400),
        case("lines that end with CR CR LF", "GET / HTTP/1.1\r\r\nHost: a\r\r\n\r\r\n".into(), 400),
        case("many empty lines", "\r\n".repeat(100), 400),
        // Section 3: the request line and Host.
        case("no Host", "GET / HTTP/1.1\r\n\r\n".into(), 400),
        case("two Hosts", get("Host: b\r\n"), 400),
        case("two Hosts that agree", get("Host: a\r\n"), 400),
        case("an empty Host", "GET / HTTP/1.1\r\nHost:\r\n\r\n".into(), 400),
        case("a Host with userinfo", "GET / HTTP/1.1\r\nHost: a@b\r\n\r\n".into(), 400),
        case("a Host with a path", "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n".into(), 400),
        case("a Host with a list", "GET / HTTP/1.1\r\nHost: a, b:x\r\n\r\n".into(), 400),
        case("a Host with a port that is none", "GET / HTTP/1.1\r\nHost: a:8x\r\n\r\n".into(), 400),
        case("a good target beside a bad Host", "GET http://a/ HTTP/1.1\r\nHost: a b\r\n\r\n".into(), 400),
        case("a target without Host", "GET http://a/ HTTP/1.1\r\n\r\n".into(), 400),
        case("a target with a space", "GET /a b HTTP/1.1\r\nHost: a\r\n\r\n".into(), 400),
        case("a target with a fragment", "GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n".into(), 400),
        case("a target with a NUL", "GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n".into(), 400),
        case("a target that is no path", "GET a HTTP/1.1\r\nHost: a\r\n\r\n".into(), 400),
        case("a target with userinfo", "GET http://x@a/ HTTP/1.1\r\nHost: a\r\n\r\n".into(), 400),
        case("an asterisk to GET", "GET * HTTP/1.1\r\nHost: a\r\n\r\n".into(), 400),
        case("another scheme", "GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n".into(), 400),
        case("a method that is no token", "G@T / HTTP/1.1\r\nHost: a\r\n\r\n".into(), 400),
        case("HTTP/0.9", "GET /\r\n\r\n".into(), 400),
        case("HTTP/1.2", "GET / HTTP/1.2\r\nHost: a\r\n\r\n".into(), 505),
        case("HTTP/2 without preface", "GET / HTTP/2.0\r\nHost: a\r\n\r\n".into(), 505),
        case("another protocol", "SSH-2.0-OpenSSH_9.2\r\n\r\n".into(), 400),
        case("TLS", "\x16\x03\x01\x02\0\x01\0\n\r\n\r\n".into(), 400),
        // Limits.
        case("a header without end", format!("{GET}A: {}", "b".repeat(70_000)), 431),
        case("a long header", get(&format!("A: {}\r\n", "b".repeat(70_000))), 431),
        case("a long target", format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "a".repeat(70_000)), 431),
        case("many fields", get(&"A: b\r\n".repeat(200)), 431),
        ("bytes that are not ASCII in the target", b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(), 400),
    ]
}

#[tokio::test]
async fn what_is_ambiguous_is_refused_and_no_machine_sees_it() {
    let (seen, backend) = canned("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    let stage = Stage::new(&http_app(""), backend).await;
    let address = stage.listen(80).await;
    let mut wrong = Vec::new();
    for (name, bytes, status) in refused() {
        let mut client = Client(TcpStream::connect(address).await.unwrap());
        client.send(&bytes).await;
        // The one that follows must not be answered either, whatever the first was taken for.
        let _ = tokio::io::AsyncWriteExt::write_all(&mut client.0, b"GET /next HTTP/1.1\r\nHost: a\r\n\r\n")
            .await;
        let all = client.rest().await;
        let is_refused = all.starts_with(&format!("HTTP/1.1 {status} ")) && !all.contains("\r\nHTTP/1.1 ");
        let is_closed = field(&all, "connection") == Some("close");
        let seen = String::from_utf8(std::mem::take(&mut seen.lock().unwrap())).unwrap();
        let is_chunk = name.contains("chunk size") || name.contains("extension") || name.contains("trailer");
        // A body that turns out bad breaks off towards the machine, which has no whole request.
        let is_unseen = seen.is_empty() || is_chunk && !seen.contains("0\r\n\r\n") && !seen.contains("/next");
        if !(is_refused && is_closed && is_unseen) {
            wrong.push(format!("{name}: {all:?}, and the machine saw {seen:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Name, bytes, and how the machine sees them from the first line on, without the fields of the proxy.
fn accepted() -> Vec<(&'static str, String, &'static str, &'static str)> {
    let chunked = |body: &str| format!("{POST}Transfer-Encoding: Chunked\r\n\r\n{body}");
    vec![
        ("an empty line before", format!("\r\n{GET}\r\n"), "GET / HTTP/1.1", ""),
        (
            "absolute-form",
            "GET http://B:8/x?y HTTP/1.1\r\nHost: a\r\n\r\n".into(),
            "GET /x?y HTTP/1.1\r\nhost: B:8",
            "",
        ),
        (
            "absolute-form without path",
            "GET http://b?y HTTP/1.1\r\nHost: a\r\n\r\n".into(),
            "GET /?y HTTP/1.1",
            "",
        ),
        ("an asterisk", "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n".into(), "OPTIONS * HTTP/1.1", ""),
        ("HTTP/1.0", "GET / HTTP/1.0\r\n\r\n".into(), "GET / HTTP/1.1", ""),
        (
            "an IPv6 host",
            "GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n".into(),
            "GET / HTTP/1.1\r\nhost: [::1]:80",
            "",
        ),
        (
            "a body of no bytes",
            format!("{POST}Content-Length: 0\r\n\r\n"),
            "POST / HTTP/1.1",
            "content-length: 0",
        ),
        ("a body", format!("{POST}Content-Length: 5\r\n\r\nhello"), "POST / HTTP/1.1", "\r\n\r\nhello"),
        ("an unusual method", "BREW / HTTP/1.1\r\nHost: a\r\n\r\n".into(), "BREW / HTTP/1.1", ""),
        (
            "chunks",
            chunked("5;a=\"b\"\r\nhello\r\n0\r\n\r\n"),
            "POST / HTTP/1.1",
            "transfer-encoding: chunked",
        ),
    ]
}

#[tokio::test]
async fn what_is_unusual_and_clear_passes() {
    let (seen, backend) = canned("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    let stage = Stage::new(&http_app(""), backend).await;
    let address = stage.listen(80).await;
    for (name, bytes, begins, has) in accepted() {
        let mut client = Client(TcpStream::connect(address).await.unwrap());
        client.send(&bytes).await;
        let (head, _) = client.answer().await;
        assert!(head.starts_with("HTTP/1.1 200 "), "{name}: {head}");
        let seen = String::from_utf8(std::mem::take(&mut seen.lock().unwrap())).unwrap();
        assert!(seen.starts_with(begins) && seen.contains(has), "{name}: {seen}");
    }
}

#[tokio::test]
async fn requests_in_one_write_are_answered_one_after_another() {
    let (seen, backend) = canned("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx");
    let stage = Stage::new(&http_app(""), backend).await;
    let mut client = stage.connect(80).await;
    let one = format!("{POST}Content-Length: 5\r\n\r\nhello");
    client.send(format!("{one}{one}{GET}Connection: close\r\n\r\n")).await;
    let all = client.rest().await;
    assert_eq!(all.matches("HTTP/1.1 200 OK").count(), 3, "{all}");
    assert_eq!(String::from_utf8_lossy(&seen.lock().unwrap()).matches("hello").count(), 2);
}

#[tokio::test]
async fn a_body_that_nobody_wanted_does_not_end_the_connection() {
    let (_, backend) = canned("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx");
    let stage = Stage::new(&http_app("[flyrun]\nhostnames = ['a']"), backend).await;
    let address = stage.listen(80).await;
    for (more, body, goes_on) in [
        ("Content-Length: 5\r\n", "hello", true),
        ("Transfer-Encoding: chunked\r\n", "5\r\nhello\r\n0\r\nA: b\r\n\r\n", true),
        // It may have been left away, for all that is known.
        ("Content-Length: 5\r\nExpect: 100-continue\r\n", "hello", false),
        ("Transfer-Encoding: chunked\r\n", "5\r\nhello?", false),
    ] {
        let mut client = Client(TcpStream::connect(address).await.unwrap());
        client.send(format!("POST / HTTP/1.1\r\nHost: nobody\r\n{more}\r\n")).await;
        assert!(client.answer().await.0.starts_with("HTTP/1.1 404 "), "{more}");
        client.send(format!("{body}{GET}Connection: close\r\n\r\n")).await;
        let next = client.rest().await;
        assert_eq!(next.starts_with("HTTP/1.1 200 "), goes_on, "{more}{body}: {next}");
        assert!(goes_on || next.is_empty(), "{more}{body}: {next}");
    }
}
