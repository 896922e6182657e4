//! HTTP/1.1 in and out.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use proxy::Options;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::fake::{Client, Stage, canned, eventually, field, http_app, length, read_head};

const GET: &str = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

#[tokio::test]
async fn a_request_and_its_answer_pass_with_the_fields_of_a_proxy() {
    let (seen, backend) = canned("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-A: b\r\n\r\nhello");
    let stage = Stage::new(&http_app(""), backend).await;
    let mut client = stage.connect(80).await;
    client.send("GET /a?b=c HTTP/1.1\r\nHost: Shop.example:80\r\nAccept: */*\r\n\r\n").await;
    let (head, body) = client.answer().await;
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert_eq!((body.as_str(), field(&head, "x-a")), ("hello", Some("b")));
    assert_eq!(field(&head, "via"), Some("1.1 flyrun"));
    assert_eq!(field(&head, "server"), Some("flyrun"));
    let seen = String::from_utf8(seen.lock().unwrap().clone()).unwrap();
    assert!(seen.starts_with("GET /a?b=c HTTP/1.1\r\n"), "{seen}");
    for (name, value) in [
        ("host", "Shop.example:80"),
        ("accept", "*/*"),
        ("x-forwarded-for", "127.0.0.1"),
        ("x-forwarded-proto", "http"),
        ("x-forwarded-port", "80"),
        ("x-forwarded-ssl", "off"),
        ("fly-client-ip", "127.0.0.1"),
        ("fly-forwarded-port", "80"),
        ("fly-region", "local"),
        ("via", "1.1 flyrun"),
    ] {
        assert_eq!(field(&seen, name), Some(value), "{name} in {seen}");
    }
    assert_eq!(field(&seen, "fly-request-id"), field(&head, "fly-request-id"));
    let line = stage.line().await;
    assert_eq!((&line["app"], &line["status"], &line["path"]), (&"shop".into(), &200.into(), &"/a".into()));
    assert_eq!((&line["instance"], &line["sent"]), (&"m1".into(), &5.into()));
    // The same connection carries the next one, on both sides.
    client.send("GET /2 HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert_eq!(client.answer().await.1, "hello");
}

#[tokio::test]
async fn what_clients_say_in_the_name_of_proxies_is_taken_away() {
    let (seen, backend) = canned(OK);
    let stage = Stage::new(&http_app(""), backend).await;
    let mut client = stage.connect(80).await;
    client
        .send(
            "GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Host: evil\r\nX_Forwarded_For: 1.2.3.4\r\n\
             Forwarded: for=1.2.3.4\r\nFly-Client-IP: 1.2.3.4\r\nfly_client_ip: 1.2.3.4\r\nFly-Anything: x\r\n\
             X-Forwarded-Proto: https\r\nVia: 1.0 before\r\nFlyer: yes\r\nX-Forward: yes\r\n\r\n",
        )
        .await;
    client.answer().await;
    let seen = String::from_utf8(seen.lock().unwrap().clone()).unwrap();
    assert!(!seen.contains("1.2.3.4") && !seen.contains("evil") && !seen.contains("anything"), "{seen}");
    assert_eq!(field(&seen, "x-forwarded-for"), Some("127.0.0.1"));
    assert_eq!(field(&seen, "x-forwarded-proto"), Some("http"));
    assert_eq!((field(&seen, "flyer"), field(&seen, "x-forward")), (Some("yes"), Some("yes")));
    assert!(seen.contains("via: 1.0 before\r\n") && seen.contains("via: 1.1 flyrun\r\n"), "{seen}");
}

#[tokio::test]
async fn what_is_for_one_connection_stays_on_it() {
    let (seen, backend) = canned(
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nKeep-Alive: timeout=5\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\n\
         Upgrade: h2c\r\nX-End: 1\r\n\r\nok",
    );
    let stage = Stage::new(&http_app(""), backend).await;
    let mut client = stage.connect(80).await;
    client
        .send(
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: X-Secret, Upgrade, HTTP2-Settings, fly-client-ip\r\nX-Secret: 1\r\n\
             Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\nKeep-Alive: 5\r\nProxy-Connection: x\r\nTE: gzip, trailers;q=0.5\r\n\
             X-End: 1\r\n\r\n",
        )
        .await;
    let (head, _) = client.answer().await;
    let seen = String::from_utf8(seen.lock().unwrap().clone()).unwrap();
    for name in ["x-secret", "upgrade", "http2-settings", "keep-alive", "proxy-connection"] {
        assert_eq!(field(&seen, name), None, "{seen}");
    }
    assert_eq!((field(&seen, "te"), field(&seen, "connection")), (Some("trailers"), Some("te")), "{seen}");
    assert_eq!((field(&seen, "x-end"), field(&seen, "fly-client-ip")), (Some("1"), Some("127.0.0.1")));
    for name in ["x-hop", "keep-alive", "connection", "upgrade"] {
        assert_eq!(field(&head, name), None, "{head}");
    }
    assert_eq!(field(&head, "x-end"), Some("1"));
}

#[tokio::test]
async fn an_apps_rules_change_answers_and_pristine_ones_have_nothing_of_the_proxy() {
    let (_, backend) =
        canned("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nServer: nginx\r\nX-Old: 1\r\nX-Gone: 1\r\n\r\nok");
    let rules =
        "[http_service.http_options.response.headers]\nX-Old = ['2', '3']\nX-Gone = false\nX-New = 'n'\n";
    let stage = Stage::new(&http_app(rules), backend).await;
    let mut client = stage.connect(80).await;
    client.send(GET).await;
    let (head, _) = client.answer().await;
    assert!(head.contains("x-old: 2\r\nx-old: 3\r\n") && !head.contains("x-old: 1"), "{head}");
    assert_eq!((field(&head, "x-gone"), field(&head, "x-new")), (None, Some("n")));
    assert_eq!(field(&head, "server"), Some("nginx"));
    stage.serve(&[&http_app("[http_service.http_options.response]\npristine = true\n")]);
    client.send(GET).await;
    let (head, _) = client.answer().await;
    assert_eq!(
        head,
        "HTTP/1.1 200 OK\r\nserver: nginx\r\nx-old: 1\r\nx-gone: 1\r\ncontent-length: 2\r\n\r\n"
    );
}

#[tokio::test]
async fn answers_without_body_have_none() {
    for (method, answer, expected) in [
        ("HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", Some("1000")),
        ("HEAD", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", None),
        ("GET", "HTTP/1.1 304 Not Modified\r\nContent-Length: 1000\r\n\r\n", Some("1000")),
        ("GET", "HTTP/1.1 204 No Content\r\n\r\n", None),
        ("GET", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", Some("0")),
    ] {
        let (_, backend) = canned(answer);
        let stage = Stage::new(&http_app(""), backend).await;
        let mut client = stage.connect(80).await;
        for _ in 0..2 {
            client.send(format!("{method} / HTTP/1.1\r\nHost: a\r\n\r\n")).await;
            let head = read_head(&mut client.0, &mut Vec::new()).await.unwrap();
            assert_eq!(field(&head, "content-length"), expected, "{method} {answer}: {head}");
            assert_eq!(field(&head, "transfer-encoding"), None);
        }
    }
}

#[tokio::test]
async fn http_1_0_clients_get_no_chunks() {
    let (_, backend) = canned("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n");
    let stage = Stage::new(&http_app(""), backend).await;
    let mut client = stage.connect(80).await;
    client.send("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").await;
    let all = client.rest().await;
    assert!(all.contains("connection: close\r\n") && all.ends_with("\r\n\r\nabc"), "{all}");
    let (_, backend) = canned(OK);
    let stage = Stage::new(&http_app(""), backend).await;
    let mut client = stage.connect(80).await;
    for _ in 0..2 {
        client.send("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").await;
        assert_eq!(field(&client.answer().await.0, "connection"), Some("keep-alive"));
    }
    client.send("GET / HTTP/1.0\r\n\r\n").await;
    assert!(client.rest().await.ends_with("ok"));
}

#[tokio::test]
async fn a_body_that_ends_with_the_connection_gets_chunks() {
    let stage = Stage::new(&http_app(""), |mut stream: TcpStream| async move {
        read_head(&mut stream, &mut Vec::new()).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\nabc").await.unwrap();
    })
    .await;
    let mut client = stage.connect(80).await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await;
    assert!(
        client
            .rest()
            .await
            .ends_with("transfer-encoding: chunked\r\nconnection: close\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
    );
}

#[tokio::test]
async fn trailers_pass_both_ways_without_what_they_must_not_have() {
    let (seen, backend) = canned(
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: Grpc-Status\r\n\r\n3\r\nabc\r\n0\r\nGrpc-Status: 0\r\n\
         Content-Length: 9\r\nConnection: x\r\n\r\n",
    );
    let stage = Stage::new(&http_app(""), backend).await;
    let mut client = stage.connect(80).await;
    client
        .send("POST / HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Sum: 1\r\nHost: b\r\n\r\n")
        .await;
    let all = client.rest().await;
    assert!(all.ends_with("3\r\nabc\r\n0\r\ngrpc-status: 0\r\n\r\n"), "{all}");
    assert_eq!(field(&all, "trailer"), Some("Grpc-Status"));
    let _ = seen;
}

#[tokio::test]
async fn early_answers_pass_and_continue_comes_from_the_machine() {
    let stage = Stage::new(&http_app(""), |mut stream: TcpStream| async move {
        let mut pending = Vec::new();
        let head = read_head(&mut stream, &mut pending).await.unwrap();
        assert_eq!(field(&head, "expect"), Some("100-continue"));
        assert!(pending.is_empty());
        stream.write_all(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n").await.unwrap();
        stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.unwrap();
        let mut body = vec![0; length(&head)];
        stream.read_exact(&mut body).await.unwrap();
        stream.write_all(OK.as_bytes()).await.unwrap();
    })
    .await;
    let mut client = stage.connect(80).await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n").await;
    let expected = "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n";
    assert_eq!(String::from_utf8(client.exactly(expected.len()).await).unwrap(), expected);
    client.send("hello").await;
    assert_eq!(client.answer().await.1, "ok");
}

#[tokio::test]
async fn a_refused_expectation_costs_no_body() {
    let stage = Stage::new(&http_app(""), |mut stream: TcpStream| async move {
        read_head(&mut stream, &mut Vec::new()).await;
        stream.write_all(b"HTTP/1.1 417 Expectation Failed\r\nContent-Length: 0\r\n\r\n").await.unwrap();
        let _ = stream.read(&mut [0]).await;
    })
    .await;
    let mut client = stage.connect(80).await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n").await;
    assert!(client.rest().await.starts_with("HTTP/1.1 417 "));
}

#[tokio::test]
async fn server_sent_events_arrive_one_by_one() {
    let (next, wanted) = tokio::sync::mpsc::channel::<()>(1);
    let wanted = Arc::new(tokio::sync::Mutex::new(wanted));
    let stage = Stage::new(&http_app(""), move |mut stream: TcpStream| {
        let wanted = wanted.clone();
        async move {
            read_head(&mut stream, &mut Vec::new()).await;
            stream
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
                .await
                .unwrap();
            while wanted.lock().await.recv().await.is_some() {
                stream.write_all(b"9\r\ndata: x\n\n\r\n").await.unwrap();
            }
        }
    })
    .await;
    let mut client = stage.connect(80).await;
    client.send(GET).await;
    // The head comes before any event does.
    assert!(read_head(&mut client.0, &mut Vec::new()).await.unwrap().contains("text/event-stream"));
    for _ in 0..10 {
        next.send(()).await.unwrap();
        assert_eq!(client.exactly(14).await, b"9\r\ndata: x\n\n\r\n");
    }
    assert_eq!(stage.first().leases.load(SeqCst), 1);
    // Nobody listens any more: the machine is free.
    drop(client);
    let machine = stage.first();
    eventually(|| (machine.leases.load(SeqCst) == 0).then_some(())).await;
}

#[tokio::test]
async fn a_websocket_echoes_until_either_side_closes() {
    let stage = Stage::new(&http_app(""), |mut stream: TcpStream| async move {
        let head = read_head(&mut stream, &mut Vec::new()).await.unwrap();
        assert_eq!((field(&head, "connection"), field(&head, "upgrade")), (Some("upgrade"), Some("websocket")));
        assert_eq!(field(&head, "sec-websocket-key"), Some("x"));
        let answer = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: y\r\n\r\n";
        stream.write_all(answer.as_bytes()).await.unwrap();
        let mut some = [0; 4096];
        while let Ok(count @ 1..) = stream.read(&mut some).await {
            stream.write_all(&some[..count]).await.unwrap();
        }
    })
    .await;
    let mut client = stage.connect(80).await;
    // The first frame comes with the request, as impatient clients have it.
    client
        .send("GET /ws HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\nfirst")
        .await;
    let mut pending = Vec::new();
    let head = read_head(&mut client.0, &mut pending).await.unwrap();
    assert!(head.starts_with("HTTP/1.1 101 Switching Protocols\r\n"), "{head}");
    assert_eq!((field(&head, "connection"), field(&head, "upgrade")), (Some("upgrade"), Some("websocket")));
    assert_eq!(field(&head, "sec-websocket-accept"), Some("y"));
    let first = client.exactly(5 - pending.len()).await;
    assert_eq!([pending, first].concat(), b"first");
    let large = vec![7; 1 << 20];
    let (mut read, mut write) = client.0.into_split();
    let send = tokio::spawn(async move {
        write.write_all(&large).await.unwrap();
        write
    });
    let mut back = vec![0; 1 << 20];
    read.read_exact(&mut back).await.unwrap();
    assert!(back.iter().all(|byte| *byte == 7));
    let machine = stage.first();
    assert_eq!(machine.leases.load(SeqCst), 1);
    drop(send.await.unwrap());
    assert_eq!(read.read(&mut [0]).await.unwrap(), 0);
    eventually(|| (machine.leases.load(SeqCst) == 0).then_some(())).await;
    assert_eq!(stage.line().await["status"], 101);
}

#[tokio::test]
async fn connect_opens_a_tunnel_if_the_machine_agrees() {
    let stage = Stage::new(&http_app(""), |mut stream: TcpStream| async move {
        let head = read_head(&mut stream, &mut Vec::new()).await.unwrap();
        assert!(head.starts_with("CONNECT db:5432 HTTP/1.1\r\nhost: db:5432\r\n"), "{head}");
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\nready").await.unwrap();
        let mut some = [0; 3];
        stream.read_exact(&mut some).await.unwrap();
        stream.write_all(&some).await.unwrap();
    })
    .await;
    let mut client = stage.connect(80).await;
    client.send("CONNECT db:5432 HTTP/1.1\r\nHost: db:5432\r\n\r\nabc").await;
    let all = client.rest().await;
    assert!(all.starts_with("HTTP/1.1 200 OK\r\n") && all.ends_with("\r\n\r\nreadyabc"), "{all}");
    assert_eq!(field(&all, "content-length"), None);
}

/// The resident memory of this process in MiB.
fn resident_mib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() / 1024
}

const LARGE: usize = 300 << 20;

#[tokio::test]
async fn a_large_body_passes_up_and_down_in_constant_memory() {
    let stage = Stage::new(&http_app(""), |mut stream: TcpStream| async move {
        let mut pending = Vec::new();
        let head = read_head(&mut stream, &mut pending).await.unwrap();
        let mut left = length(&head) - pending.len();
        let mut some = vec![0; 256 << 10];
        while left > 0 {
            left -= stream.read(&mut some).await.unwrap();
        }
        stream
            .write_all(format!("HTTP/1.1 200 OK\r\nContent-Length: {LARGE}\r\n\r\n").as_bytes())
            .await
            .unwrap();
        for _ in 0..LARGE / some.len() {
            stream.write_all(&some).await.unwrap();
        }
    })
    .await;
    let client = stage.connect(80).await;
    let (mut read, mut write) = client.0.into_split();
    let before = resident_mib();
    let send = tokio::spawn(async move {
        write
            .write_all(format!("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: {LARGE}\r\n\r\n").as_bytes())
            .await
            .unwrap();
        let some = vec![1; 256 << 10];
        for _ in 0..LARGE / some.len() {
            write.write_all(&some).await.unwrap();
        }
        write
    });
    let (mut got, mut most, mut some) = (0, 0, vec![0; 256 << 10]);
    let mut is_slow = true;
    while got < LARGE {
        let count = read.read(&mut some).await.unwrap();
        assert!(count > 0);
        got += count;
        most = most.max(resident_mib());
        // What the client does not take yet is not taken from the machine.
        if std::mem::take(&mut is_slow) {
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }
    send.await.unwrap();
    assert!(most < before + 24, "from {before} to {most} MiB");
    let line = stage.line().await;
    assert_eq!((&line["received"], &line["sent"]), (&LARGE.into(), &LARGE.into()));
}

#[tokio::test]
async fn slow_clients_are_cut_off() {
    let options = "[http_service.http_options]\nidle_timeout = 1\nheaders_read_timeout = 1\n";
    let (seen, backend) = canned(OK);
    let stage = Stage::new(&http_app(options), backend).await;
    let address = stage.listen(80).await;
    let connect = async || Client(TcpStream::connect(address).await.unwrap());
    // Nothing at all; nothing after an answer; a header that does not end, byte by byte; a body that does not come.
    let (mut silent, mut idle, mut slow, mut owing) =
        (connect().await, connect().await, connect().await, connect().await);
    idle.send(GET).await;
    idle.answer().await;
    slow.send("GET / HTTP/1.1\r\n").await;
    owing.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhalf").await;
    let drip = async {
        loop {
            if slow.0.write_all(b"a").await.is_err() {
                return;
            }
            let mut some = [0; 4096];
            match tokio::time::timeout(Duration::from_millis(50), slow.0.read(&mut some)).await {
                Err(_) => {}
                Ok(read) => {
                    assert!(String::from_utf8_lossy(&some[..read.unwrap()]).starts_with("HTTP/1.1 408 "));
                    return;
                }
            }
        }
    };
    let (silent, idle, owing, ()) = tokio::join!(silent.rest(), idle.rest(), owing.rest(), drip);
    assert_eq!((silent.as_str(), idle.as_str()), ("", ""));
    assert!(owing.starts_with("HTTP/1.1 408 "), "{owing}");
    assert_eq!(String::from_utf8_lossy(&seen.lock().unwrap()).matches("GET").count(), 1);
    assert!(stage.fake.failures.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_client_that_does_not_read_is_cut_off() {
    let stage = Stage::new(
        &http_app("[http_service.http_options]\nidle_timeout = 1\n"),
        |mut stream: TcpStream| async move {
            read_head(&mut stream, &mut Vec::new()).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n").await;
            while stream.write_all(&[0; 65536]).await.is_ok() {}
        },
    )
    .await;
    let mut client = stage.connect(80).await;
    client.send(GET).await;
    assert!(stage.line().await["error"].as_str().unwrap().starts_with("The client neither read"));
    assert_eq!(stage.first().leases.load(SeqCst), 0);
    assert!(stage.fake.failures.lock().unwrap().is_empty());
}

#[tokio::test]
async fn connections_are_limited_in_all_and_for_each_client() {
    for options in [
        Options { max_connections: 2, ..Options::default() },
        Options { max_connections_per_client: Some(2), ..Options::default() },
    ] {
        let (_, backend) = canned(OK);
        let stage = Stage::with(&http_app(""), options, backend).await;
        let address = stage.listen(80).await;
        let connect = async || Client(TcpStream::connect(address).await.unwrap());
        let (mut one, two, mut three) = (connect().await, connect().await, connect().await);
        assert_eq!(three.rest().await, "");
        one.send(GET).await;
        assert_eq!(one.answer().await.1, "ok");
        drop(two);
        eventually(|| (stage.proxy.connections() == 1).then_some(())).await;
        let mut four = connect().await;
        four.send(GET).await;
        assert_eq!(four.answer().await.1, "ok");
        assert!(stage.proxy.metrics().render().contains("flyrun_edge_connections_refused_count 1\n"));
    }
}

#[tokio::test]
async fn hosts_find_their_app_and_others_are_not_found() {
    let (_, backend) = canned(OK);
    let stage = Stage::new(&http_app(""), backend).await;
    for app in ["exact", "below", "any"] {
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{app}", app.len()).leak();
        stage.machine(app, app, canned(answer).1).await;
    }
    let named = |app: &str, name: &str| {
        http_app(&format!("[flyrun]\nhostnames = ['{name}']\n")).replace("'shop'", &format!("'{app}'"))
    };
    let texts = [named("exact", "a.example.com"), named("below", "*.example.com"), named("any", "*")];
    stage.serve(&[&texts[0], &texts[1], &texts[2]]);
    let mut client = stage.connect(80).await;
    for (host, app) in [
        ("a.example.com", "exact"),
        ("A.Example.COM:8080", "exact"),
        ("a.example.com.", "exact"),
        ("b.example.com", "below"),
        ("x.a.example.com", "below"),
        ("example.com", "any"),
        ("127.0.0.1", "any"),
    ] {
        client.send(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")).await;
        assert_eq!(client.answer().await.1, app, "{host}");
    }
    stage.serve(&[&texts[0], &texts[1]]);
    client.send("GET / HTTP/1.1\r\nHost: other.org\r\n\r\n").await;
    let (head, body) = client.answer().await;
    assert!(head.starts_with("HTTP/1.1 404 ") && body.contains("'other.org'"), "{head}{body}");
}

#[tokio::test]
async fn metrics_count_requests_by_app_and_status() {
    let (_, backend) = canned(OK);
    let stage = Stage::new(&http_app(""), backend).await;
    let mut client = stage.connect(80).await;
    client.send(GET).await;
    client.answer().await;
    stage.line().await;
    let page = stage.proxy.metrics().render();
    for line in [
        "fly_edge_http_responses_count{app=\"shop\",region=\"local\",status=\"200\"} 1",
        "fly_app_http_responses_count{app=\"shop\",region=\"local\",status=\"200\"} 1",
        "fly_edge_http_response_time_seconds_count{app=\"shop\",region=\"local\"} 1",
        "fly_edge_data_out{app=\"shop\",region=\"local\"} 2",
        "flyrun_edge_connections 1",
    ] {
        assert!(page.contains(&format!("{line}\n")), "{line} in {page}");
    }
}

#[tokio::test]
async fn half_an_answer_that_ends_with_the_connection_is_a_reset() {
    let stage = Stage::new(&http_app(""), |mut stream: TcpStream| async move {
        read_head(&mut stream, &mut Vec::new()).await;
        stream
            .write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
            .await
            .unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
    })
    .await;
    let mut client = stage.connect(80).await;
    client.send("GET / HTTP/1.0\r\n\r\n").await;
    let mut all = Vec::new();
    let error = client.0.read_to_end(&mut all).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert!(all.ends_with(b"half"));
}

#[tokio::test]
async fn a_machine_is_told_a_host_and_a_client_the_date_even_if_nobody_said_so() {
    let (seen, backend) = canned(OK);
    let stage = Stage::new(&http_app(""), backend).await;
    let mut client = stage.connect(80).await;
    client.send("GET / HTTP/1.0\r\n\r\n").await;
    let all = client.rest().await;
    assert!(field(&all, "date").unwrap().ends_with(" GMT"), "{all}");
    assert_eq!(field(&String::from_utf8_lossy(&seen.lock().unwrap()), "host"), Some("shop"));
}
