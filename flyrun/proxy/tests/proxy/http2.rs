//! HTTP/2 in, and to machines.

use std::future::poll_fn;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use h2::{Reason, RecvStream};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::fake::{Client, Stage, canned, eventually, field, http_app, length, read_head};

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/// A client with prior knowledge.
async fn connect(stage: &Stage) -> SendRequest<Bytes> {
    let stream = TcpStream::connect(stage.listen(80).await).await.unwrap();
    let (send, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(async move {
        let _ = connection.await;
    });
    send
}

fn get(path: &str) -> Request<()> {
    Request::get(format!("http://shop.example{path}")).body(()).unwrap()
}

async fn read(mut body: RecvStream) -> (Vec<u8>, Option<HeaderMap>) {
    let mut all = Vec::new();
    while let Some(data) = body.data().await {
        let data = data.unwrap();
        body.flow_control().release_capacity(data.len()).unwrap();
        all.extend_from_slice(&data);
    }
    (all, body.trailers().await.unwrap())
}

fn value<'f>(fields: &'f HeaderMap, name: &str) -> &'f str {
    fields[name].to_str().unwrap()
}

async fn ask(send: &SendRequest<Bytes>, request: Request<()>) -> (StatusCode, HeaderMap, String) {
    let mut send = send.clone().ready().await.unwrap();
    let (response, _) = send.send_request(request, true).unwrap();
    let (parts, body) = response.await.unwrap().into_parts();
    (parts.status, parts.headers, String::from_utf8(read(body).await.0).unwrap())
}

#[tokio::test]
async fn a_request_passes_to_a_machine_that_speaks_http_1() {
    let (seen, backend) = canned(OK);
    let stage = Stage::new(&http_app(""), backend).await;
    let send = connect(&stage).await;
    let (status, fields, body) = ask(&send, get("/a?b")).await;
    assert_eq!((status.as_u16(), body.as_str()), (200, "ok"));
    assert_eq!((value(&fields, "via"), value(&fields, "content-length")), ("1.1 flyrun", "2"));
    let seen = String::from_utf8(seen.lock().unwrap().clone()).unwrap();
    assert!(seen.starts_with("GET /a?b HTTP/1.1\r\nhost: shop.example\r\n"), "{seen}");
    assert_eq!(
        (field(&seen, "via"), field(&seen, "x-forwarded-for")),
        (Some("2.0 flyrun"), Some("127.0.0.1"))
    );
    assert_eq!(stage.line().await["protocol"], "HTTP/2");
}

#[tokio::test]
async fn many_requests_share_a_connection_and_do_not_wait_for_each_other() {
    let stage = Stage::new(&http_app(""), |mut stream: TcpStream| async move {
        let head = read_head(&mut stream, &mut Vec::new()).await.unwrap();
        if head.starts_with("GET /slow") {
            let _ = stream.read(&mut [0]).await;
        }
        let _ = stream.write_all(OK.as_bytes()).await;
    })
    .await;
    let send = connect(&stage).await;
    let (slow, _) = send.clone().ready().await.unwrap().send_request(get("/slow"), true).unwrap();
    let all: Vec<_> = (0..50)
        .map(|_| {
            let send = send.clone();
            tokio::spawn(async move { ask(&send, get("/")).await.2 })
        })
        .collect();
    for one in all {
        assert_eq!(one.await.unwrap(), "ok");
    }
    assert_eq!(stage.first().leases.load(SeqCst), 1);
    // A client that resets its stream frees the machine.
    drop(slow);
    let machine = stage.first();
    eventually(|| (machine.leases.load(SeqCst) == 0).then_some(())).await;
}

#[tokio::test]
async fn where_connections_are_counted_requests_of_one_share_a_lease() {
    let text = http_app("").replace("'requests'", "'connections'");
    let stage = Stage::new(&text, |mut stream: TcpStream| async move {
        read_head(&mut stream, &mut Vec::new()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        stream.write_all(OK.as_bytes()).await.unwrap();
    })
    .await;
    let send = connect(&stage).await;
    let first = ask(&send, get("/"));
    let others = async {
        eventually(|| (stage.first().leases.load(SeqCst) == 1).then_some(())).await;
        tokio::join!(ask(&send, get("/")), ask(&send, get("/")))
    };
    tokio::join!(first, others);
    assert_eq!(stage.first().most_leases.load(SeqCst), 1);
    assert_eq!(stage.fake.wants.lock().unwrap().len(), 1);
    // Idle, the connection keeps no machine awake.
    let machine = stage.first();
    eventually(|| (machine.leases.load(SeqCst) == 0).then_some(())).await;
}

#[tokio::test]
async fn bodies_stream_both_ways_at_once() {
    let stage = Stage::new(&http_app(""), |mut stream: TcpStream| async move {
        // Echoes the chunks as they come.
        read_head(&mut stream, &mut Vec::new()).await.unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await.unwrap();
        let mut some = [0; 65536];
        while let Ok(count @ 1..) = stream.read(&mut some).await {
            stream.write_all(&some[..count]).await.unwrap();
            if some[..count].ends_with(b"0\r\n\r\n") {
                break;
            }
        }
    })
    .await;
    let send = connect(&stage).await;
    let request = Request::post("http://a/").body(()).unwrap();
    let (response, mut body) = send.clone().ready().await.unwrap().send_request(request, false).unwrap();
    let mut answer = response.await.unwrap().into_body();
    for n in 0..100_u32 {
        let data = n.to_be_bytes().repeat(10);
        body.send_data(data.clone().into(), false).unwrap();
        let mut got = Vec::new();
        while got.len() < data.len() {
            let piece = answer.data().await.unwrap().unwrap();
            answer.flow_control().release_capacity(piece.len()).unwrap();
            got.extend_from_slice(&piece);
        }
        assert_eq!(got, data);
    }
    body.send_data(Bytes::new(), true).unwrap();
    assert_eq!(read(answer).await, (Vec::new(), None));
}

/// A machine that speaks HTTP/2 without TLS, and answers each request as told.
async fn machine<F, A>(stream: TcpStream, answer: F)
where
    F: Fn(Request<RecvStream>, h2::server::SendResponse<Bytes>) -> A + Clone + Send + 'static,
    A: std::future::Future<Output = ()> + Send + 'static,
{
    let mut connection = h2::server::handshake(stream).await.unwrap();
    while let Some(Ok((request, respond))) = connection.accept().await {
        tokio::spawn(answer(request, respond));
    }
}

fn h2_app() -> String {
    http_app("[http_service.http_options]\nh2_backend = true\n")
}

#[tokio::test]
async fn grpc_passes_with_its_trailers() {
    let stage = Stage::new(&h2_app(), |stream| {
        machine(stream, |request, mut respond| async move {
            assert_eq!(request.headers()["te"], "trailers");
            assert_eq!(request.uri().path(), "/pkg.Service/Method");
            assert_eq!(request.headers()["content-type"], "application/grpc");
            if request.headers().contains_key("x-fail") {
                // An answer of nothing but trailers, which are its head.
                let response =
                    Response::builder().header("content-type", "application/grpc").header("grpc-status", "5");
                respond.send_response(response.body(()).unwrap(), true).unwrap();
                return;
            }
            let (body, _) = read(request.into_body()).await;
            let response = Response::builder().header("content-type", "application/grpc").body(()).unwrap();
            let mut send = respond.send_response(response, false).unwrap();
            send.send_data(body.into(), false).unwrap();
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", "0".parse().unwrap());
            trailers.insert("grpc-message", "fine".parse().unwrap());
            send.send_trailers(trailers).unwrap();
        })
    })
    .await;
    let send = connect(&stage).await;
    let request = |extra: &'static str| {
        Request::post("http://a/pkg.Service/Method")
            .header("te", "trailers")
            .header("content-type", "application/grpc")
            .header(extra, "1")
            .body(())
            .unwrap()
    };
    for _ in 0..3 {
        let (response, mut body) =
            send.clone().ready().await.unwrap().send_request(request("x"), false).unwrap();
        body.send_data(Bytes::from_static(b"\0\0\0\0\x01a"), true).unwrap();
        let (body, trailers) = read(response.await.unwrap().into_body()).await;
        let trailers = trailers.unwrap();
        assert_eq!(body, b"\0\0\0\0\x01a");
        assert_eq!((value(&trailers, "grpc-status"), value(&trailers, "grpc-message")), ("0", "fine"));
    }
    let (response, _) = send.clone().ready().await.unwrap().send_request(request("x-fail"), true).unwrap();
    let response = response.await.unwrap();
    assert_eq!((value(response.headers(), "grpc-status"), response.body().is_end_stream()), ("5", true));
    // HTTP/1.1 clients meet such machines too.
    let mut client = stage.connect(80).await;
    client
        .send("POST /pkg.Service/Method HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nContent-Type: application/grpc\r\nContent-Length: 1\r\nConnection: close\r\n\r\na")
        .await;
    let all = client.rest().await;
    assert!(all.ends_with("\r\n\r\n1\r\na\r\n0\r\ngrpc-status: 0\r\ngrpc-message: fine\r\n\r\n"), "{all}");
}

#[tokio::test]
async fn one_connection_of_http_2_serves_a_life_and_ends_with_it() {
    let connections = Arc::new(Mutex::new(0));
    let count = connections.clone();
    let stage = Stage::new(&h2_app(), move |stream| {
        *count.lock().unwrap() += 1;
        machine(stream, |request, mut respond| async move {
            let mut send = respond.send_response(Response::new(()), false).unwrap();
            if request.uri().path() == "/wait" {
                let _ = poll_fn(|cx| send.poll_reset(cx)).await;
            }
            let _ = send.send_data(Bytes::from_static(b"ok"), true);
        })
    })
    .await;
    let mut client = stage.connect(80).await;
    for _ in 0..3 {
        client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        let all = client.exactly(10).await;
        assert!(all.starts_with(b"HTTP/1.1 2"));
        tokio::time::sleep(Duration::from_millis(20)).await;
        let _ = client.0.try_read(&mut [0; 4096]);
    }
    assert_eq!(*connections.lock().unwrap(), 1);
    client.send("GET /wait HTTP/1.1\r\nHost: a\r\n\r\n").await;
    read_head(&mut client.0, &mut Vec::new()).await.unwrap();
    stage.first().next_life();
    // What was under way is cut, visibly.
    assert!(!client.rest().await.contains("0\r\n\r\n"));
    let mut client = stage.connect(80).await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await;
    assert!(client.rest().await.ends_with("2\r\nok\r\n0\r\n\r\n"));
    assert_eq!(*connections.lock().unwrap(), 2);
}

#[tokio::test]
async fn a_websocket_over_http_2_reaches_a_machine_that_speaks_http_1() {
    let stage = Stage::new(&http_app(""), |mut stream: TcpStream| async move {
        let head = read_head(&mut stream, &mut Vec::new()).await.unwrap();
        assert!(head.starts_with("GET /ws HTTP/1.1\r\n"), "{head}");
        assert_eq!((field(&head, "upgrade"), field(&head, "sec-websocket-version")), (Some("websocket"), Some("13")));
        assert_eq!(field(&head, "sec-websocket-key"), Some("dGhlIHNhbXBsZSBub25jZQ=="));
        let accept = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                      Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nSec-WebSocket-Protocol: chat\r\n\r\n";
        stream.write_all(accept.as_bytes()).await.unwrap();
        let mut some = [0; 4096];
        while let Ok(count @ 1..) = stream.read(&mut some).await {
            stream.write_all(&some[..count]).await.unwrap();
        }
    })
    .await;
    let send = connect(&stage).await;
    // The client waits for the setting that allows it.
    let mut send = send.ready().await.unwrap();
    for _ in 0..200 {
        if send.is_extended_connect_protocol_enabled() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut request = Request::builder()
        .method(Method::CONNECT)
        .uri("http://a/ws")
        .header("sec-websocket-version", "13")
        .body(())
        .unwrap();
    request.extensions_mut().insert(h2::ext::Protocol::from_static("websocket"));
    let (response, mut up) = send.send_request(request, false).unwrap();
    let response = response.await.unwrap();
    assert_eq!(
        (response.status().as_u16(), value(response.headers(), "sec-websocket-protocol")),
        (200, "chat")
    );
    assert!(!response.headers().contains_key("sec-websocket-accept"));
    let mut down = response.into_body();
    for n in 0..10_u8 {
        up.send_data(vec![n; 100].into(), false).unwrap();
        let data = down.data().await.unwrap().unwrap();
        assert_eq!(data, vec![n; 100]);
        down.flow_control().release_capacity(data.len()).unwrap();
    }
    up.send_data(Bytes::new(), true).unwrap();
    assert_eq!(read(down).await, (Vec::new(), None));
}

#[tokio::test]
async fn a_machine_that_breaks_off_resets_the_stream_alone() {
    let stage = Stage::new(&http_app(""), |mut stream: TcpStream| async move {
        let head = read_head(&mut stream, &mut Vec::new()).await.unwrap();
        let answer = if head.starts_with("GET /half") {
            "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"
        } else {
            OK
        };
        stream.write_all(answer.as_bytes()).await.unwrap();
    })
    .await;
    let send = connect(&stage).await;
    let (response, _) = send.clone().ready().await.unwrap().send_request(get("/half"), true).unwrap();
    // What was still on its way may be lost with the rest, but never passes for the whole.
    let error = match response.await {
        Err(error) => error,
        Ok(response) => {
            let mut body = response.into_body();
            loop {
                match body.data().await {
                    Some(Ok(data)) => assert_eq!(data, "half"),
                    Some(Err(error)) => break error,
                    None => panic!("half an answer passes for a whole one"),
                }
            }
        }
    };
    assert_eq!(error.reason(), Some(Reason::INTERNAL_ERROR));
    assert_eq!(ask(&send, get("/")).await.2, "ok");
}

#[tokio::test]
async fn a_drain_says_goaway_and_waits_for_streams() {
    let stage = Stage::new(&http_app(""), |mut stream: TcpStream| async move {
        read_head(&mut stream, &mut Vec::new()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        stream.write_all(OK.as_bytes()).await.unwrap();
    })
    .await;
    let stream = TcpStream::connect(stage.listen(80).await).await.unwrap();
    let (send, connection) = h2::client::handshake::<_>(stream).await.unwrap();
    let connection = tokio::spawn(connection);
    let asked = ask(&send, get("/"));
    let drain = async {
        eventually(|| (stage.first().leases.load(SeqCst) == 1).then_some(())).await;
        stage.drain().await
    };
    let (answer, drained) = tokio::join!(asked, drain);
    assert_eq!((answer.2.as_str(), drained.cut), ("ok", 0));
    drop(send);
    assert!(connection.await.unwrap().is_ok());
}

/// A frame (RFC 9113, section 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// A field without compression (RFC 7541, section 6.2.2).
fn literal(name: &str, value: &str) -> Vec<u8> {
    [&[0, name.len() as u8], name.as_bytes(), &[value.len() as u8], value.as_bytes()].concat()
}

fn fields(list: &[(&str, &str)]) -> Vec<u8> {
    list.iter().flat_map(|(name, value)| literal(name, value)).collect()
}

/// How a client that wrote these frames is answered: the types of frames, with the error code of RST_STREAM and GOAWAY,
/// until the connection ends or nothing comes.
async fn answers(stage: &Stage, frames: &[Vec<u8>]) -> Vec<(u8, u32)> {
    let mut client = Client(TcpStream::connect(stage.listen(80).await).await.unwrap());
    client.send([PREFACE, &frame(4, 0, 0, &[]), &frames.concat()].concat()).await;
    let (mut seen, mut header) = (Vec::new(), [0; 9]);
    while let Ok(Ok(_)) =
        tokio::time::timeout(Duration::from_millis(500), client.0.read_exact(&mut header)).await
    {
        let mut payload = vec![0; u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize];
        client.0.read_exact(&mut payload).await.unwrap();
        let code = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
        match header[3] {
            RST_STREAM => seen.push((RST_STREAM, code(0))),
            GOAWAY => seen.push((GOAWAY, code(4))),
            kind => seen.push((kind, 0)),
        }
        if seen.iter().any(|(kind, _)| [HEADERS, RST_STREAM, GOAWAY].contains(kind)) {
            break;
        }
    }
    seen
}

#[tokio::test]
async fn what_is_malformed_is_refused_and_no_machine_sees_it() {
    let (seen, backend) = canned(OK);
    let stage = Stage::new(&http_app(""), backend).await;
    let good = [(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "/")];
    let with = |more: &[(&'static str, &'static str)]| [&good[..], more].concat();
    let without = |name: &str| good.iter().copied().filter(|(key, _)| *key != name).collect::<Vec<_>>();
    let cases: Vec<(&str, Vec<(&str, &str)>)> = vec![
        ("connection", with(&[("connection", "close")])),
        ("transfer-encoding", with(&[("transfer-encoding", "chunked")])),
        ("keep-alive", with(&[("keep-alive", "1")])),
        ("proxy-connection", with(&[("proxy-connection", "1")])),
        ("upgrade", with(&[("upgrade", "h2c")])),
        ("te", with(&[("te", "gzip")])),
        ("capitals", with(&[("Abc", "1")])),
        ("a colon in a name", with(&[("a:b", "1")])),
        ("a line end in a value", with(&[("a", "b\r\nc: d")])),
        ("a NUL in a value", with(&[("a", "b\0c")])),
        ("an unknown pseudo-header", with(&[(":other", "1")])),
        ("a late pseudo-header", [("a", "b")].into_iter().chain(good).collect()),
        ("two paths", with(&[(":path", "/2")])),
        ("a status", with(&[(":status", "200")])),
        ("no method", without(":method")),
        ("no path", without(":path")),
        ("no scheme", without(":scheme")),
        ("no authority", without(":authority")),
        ("an empty path", [&without(":path")[..], &[(":path", "")]].concat()),
        ("a path without slash", [&without(":path")[..], &[(":path", "a")]].concat()),
        ("a path with a space", [&without(":path")[..], &[(":path", "/a b")]].concat()),
        ("an authority with userinfo", [&without(":authority")[..], &[(":authority", "x@a")]].concat()),
        ("a host that differs", with(&[("host", "b")])),
        ("two lengths", with(&[("content-length", "0"), ("content-length", "1")])),
        ("a length that is none", with(&[("content-length", "+1")])),
        ("a length without body", with(&[("content-length", "5")])),
    ];
    let mut wrong = Vec::new();
    for (name, list) in cases {
        let got = answers(&stage, &[frame(HEADERS, END_STREAM | END_HEADERS, 1, &fields(&list))]).await;
        let log = stage.told.lines.lock().unwrap().pop();
        let is_refused = got.iter().any(|(kind, _)| [RST_STREAM, GOAWAY].contains(kind))
            || log.as_ref().is_some_and(|line| line.contains("\"status\":400"));
        if !is_refused || !seen.lock().unwrap().is_empty() {
            let seen = String::from_utf8(std::mem::take(&mut seen.lock().unwrap())).unwrap();
            wrong.push(format!("{name}: {got:?} {log:?} {seen}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // A body that is longer than it says never becomes a whole request.
    let long = fields(&[
        (":method", "POST"),
        (":scheme", "http"),
        (":authority", "a"),
        (":path", "/"),
        ("content-length", "2"),
    ]);
    let got =
        answers(&stage, &[frame(HEADERS, END_HEADERS, 1, &long), frame(0, END_STREAM, 1, b"hello")]).await;
    assert!(got.contains(&(RST_STREAM, 1)) || got.contains(&(GOAWAY, 1)), "{got:?}");
    assert!(!String::from_utf8_lossy(&seen.lock().unwrap()).contains("hello"));
}

#[tokio::test]
async fn floods_end_the_connection() {
    let (_, backend) = canned(OK);
    let stage = Stage::new(&http_app(""), backend).await;
    let (_open, gate) = tokio::sync::watch::channel(false);
    *stage.fake.gate.lock().unwrap() = Some(gate);
    let head = fields(&[(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "/")]);
    // Requests that are reset at once (CVE-2023-44487).
    let resets: Vec<_> = (0..2000)
        .flat_map(|n| {
            let stream = 2 * n + 1;
            [
                frame(HEADERS, END_STREAM | END_HEADERS, stream, &head),
                frame(RST_STREAM, 0, stream, &[0, 0, 0, 8]),
            ]
        })
        .collect();
    let got = answers(&stage, &resets).await;
    assert!(got.iter().any(|(kind, _)| *kind == GOAWAY) || got.is_empty(), "{got:?}");
    eventually(|| (stage.fake.waiting.load(SeqCst) == 0).then_some(())).await;
    // A head that never ends (CVE-2024-27316).
    let endless: Vec<_> = std::iter::once(frame(HEADERS, 0, 1, &head))
        .chain(
            (0..5000).map(|_| frame(9, 0, 1, &fields(&[("a", "0123456789012345678901234567890123456789")]))),
        )
        .collect();
    let got = answers(&stage, &endless).await;
    assert!(got.iter().any(|(kind, _)| *kind == GOAWAY || *kind == RST_STREAM) || got.is_empty(), "{got:?}");
    assert_eq!(stage.fake.waiting.load(SeqCst), 0);
}

#[tokio::test]
async fn a_large_body_passes_in_constant_memory() {
    const LARGE: usize = 100 << 20;
    let stage = Stage::new(&http_app(""), |mut stream: TcpStream| async move {
        let mut pending = Vec::new();
        let head = read_head(&mut stream, &mut pending).await.unwrap();
        let mut left = length(&head) - pending.len();
        let mut some = vec![0; 256 << 10];
        while left > 0 {
            left -= stream.read(&mut some).await.unwrap();
        }
        stream.write_all(OK.as_bytes()).await.unwrap();
    })
    .await;
    let send = connect(&stage).await;
    let request = Request::post("http://a/").header("content-length", LARGE).body(()).unwrap();
    let (response, mut body) = send.clone().ready().await.unwrap().send_request(request, false).unwrap();
    let mut left = LARGE;
    while left > 0 {
        body.reserve_capacity(left.min(64 << 10));
        let capacity = poll_fn(|cx| body.poll_capacity(cx)).await.unwrap().unwrap();
        let count = capacity.min(left);
        left -= count;
        body.send_data(vec![0; count].into(), left == 0).unwrap();
    }
    let (body, _) = read(response.await.unwrap().into_body()).await;
    assert_eq!(body, b"ok");
    assert_eq!(stage.line().await["received"], LARGE);
}
