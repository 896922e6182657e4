//! Machines that are asleep, gone, broken, silent, or want another to answer.

use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proxy::{Failure, Steer};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::fake::{Client, Stage, canned, eventually, field, http_app, read_head};

const GET: &str = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/// Reads one head, answers with these bytes, and ends.
async fn once(mut stream: TcpStream, answer: &'static str) {
    if read_head(&mut stream, &mut Vec::new()).await.is_some() {
        stream.write_all(answer.as_bytes()).await.unwrap();
    }
}

/// A machine that answers, and counts connections.
async fn counting() -> (Stage, Arc<Mutex<i32>>) {
    let connections = Arc::new(Mutex::new(0));
    let count = connections.clone();
    let (_, backend) = canned(OK);
    let stage = Stage::new(&http_app(""), move |stream| {
        *count.lock().unwrap() += 1;
        backend(stream)
    })
    .await;
    (stage, connections)
}

#[tokio::test]
async fn each_request_has_a_lease_of_its_own_that_ends_with_it() {
    let (_, backend) = canned(OK);
    let stage = Stage::new(&http_app(""), backend).await;
    let mut client = stage.connect(80).await;
    for _ in 0..3 {
        client.send(GET).await;
        client.answer().await;
    }
    let machine = stage.first();
    eventually(|| (machine.leases.load(SeqCst) == 0).then_some(())).await;
    assert_eq!(machine.most_leases.load(SeqCst), 1);
    let wants = stage.fake.wants.lock().unwrap();
    assert_eq!(wants.len(), 3);
    assert!(wants.iter().all(|want| &*want.app == "shop" && want.service == 0 && want.steer.is_none()));
}

#[tokio::test]
async fn a_connection_to_a_machine_is_kept_and_ends_with_its_life() {
    let (stage, connections) = counting().await;
    let mut client = stage.connect(80).await;
    for _ in 0..5 {
        client.send(GET).await;
        client.answer().await;
    }
    assert_eq!(*connections.lock().unwrap(), 1);
    stage.first().next_life();
    client.send(GET).await;
    assert_eq!(client.answer().await.1, "ok");
    assert_eq!(*connections.lock().unwrap(), 2);
}

#[tokio::test]
async fn the_connection_that_a_check_has_made_is_the_first_requests() {
    let (stage, connections) = counting().await;
    let machine = stage.first();
    machine.opened.put(TcpStream::connect((machine.address, stage.internal_port)).await.unwrap());
    eventually(|| (*connections.lock().unwrap() == 1).then_some(())).await;
    for life in 1..=2 {
        let mut client = stage.connect(80).await;
        client.send(GET).await;
        assert_eq!(client.answer().await.1, "ok");
        assert_eq!(*connections.lock().unwrap(), life);
        machine.next_life();
    }
}

#[tokio::test]
async fn a_body_without_a_length_that_the_end_of_a_life_cuts_off_is_not_taken_for_whole() {
    for head in ["HTTP/1.1 200 OK\r\n\r\nhalf", "HTTP/1.0 200 OK\r\n\r\nhalf"] {
        let stage = Stage::new(&http_app(""), move |mut stream| async move {
            read_head(&mut stream, &mut Vec::new()).await;
            stream.write_all(head.as_bytes()).await.unwrap();
            std::future::pending().await
        })
        .await;
        let mut client = stage.connect(80).await;
        client.send(GET).await;
        let mut pending = Vec::new();
        let answer = read_head(&mut client.0, &mut pending).await.unwrap();
        assert_eq!(field(&answer, "transfer-encoding"), Some("chunked"));
        stage.first().next_life();
        let body = String::from_utf8_lossy(&pending).into_owned() + &client.rest().await;
        assert_eq!(body, "4\r\nhalf\r\n", "and no last chunk");
        assert_eq!(stage.line().await["error"], "The machine broke off: closed too early.");
    }
}

#[tokio::test]
async fn what_is_under_way_in_a_life_that_ends_is_asked_again_in_the_next() {
    let stage = Stage::new(&http_app(""), {
        let first = Arc::new(Mutex::new(true));
        move |mut stream| {
            let first = first.clone();
            async move {
                read_head(&mut stream, &mut Vec::new()).await;
                if std::mem::take(&mut *first.lock().unwrap()) {
                    // Says nothing, until the proxy closes.
                    let _ = stream.read(&mut [0]).await;
                } else {
                    stream.write_all(OK.as_bytes()).await.unwrap();
                }
            }
        }
    })
    .await;
    let mut client = stage.connect(80).await;
    client.send(GET).await;
    let machine = stage.first();
    eventually(|| (machine.leases.load(SeqCst) == 1).then_some(())).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    machine.next_life();
    assert_eq!(client.answer().await.1, "ok");
    // It is no fault of the machine's.
    assert!(stage.fake.failures.lock().unwrap().is_empty());
    assert!(stage.fake.wants.lock().unwrap()[1].not.is_empty());
}

#[tokio::test]
async fn a_post_in_a_life_that_ends_is_not_sent_twice() {
    let stage = Stage::new(&http_app(""), |mut stream: TcpStream| async move {
        let _ = stream.read_to_end(&mut Vec::new()).await;
    })
    .await;
    let mut client = stage.connect(80).await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi").await;
    let machine = stage.first();
    eventually(|| (machine.leases.load(SeqCst) == 1).then_some(())).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    machine.next_life();
    let (head, body) = client.answer().await;
    assert!(head.starts_with("HTTP/1.1 502 "), "{head}");
    assert!(body.starts_with("The machine went away before it answered. (id "), "{body}");
    assert!(body.contains(field(&head, "fly-request-id").unwrap()), "{body}");
    assert_eq!(stage.fake.wants.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_machine_that_does_not_accept_is_passed_over() {
    let stage = Stage::new(&http_app(""), |_| async {}).await;
    // Nobody listens there.
    let none = stage.machine("shop", "m2", |_| async {}).await;
    drop(none);
    let text = http_app("").replace("PORT", "1");
    stage.serve(&[&text]);
    let mut client = stage.connect(80).await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi").await;
    let (head, body) = client.answer().await;
    assert!(head.starts_with("HTTP/1.1 502 "), "{head}");
    assert_eq!(field(&head, "retry-after"), Some("2"));
    assert!(body.starts_with("The app does not accept connections. (id "), "{body}");
    let failures = stage.fake.failures.lock().unwrap().clone();
    assert_eq!(failures, [("m1".to_string(), Failure::Connect), ("m2".to_string(), Failure::Connect)]);
    let line = stage.line().await;
    assert_eq!((&line["status"], &line["attempts"]), (&502.into(), &2.into()));
}

#[tokio::test]
async fn a_safe_request_that_broke_goes_to_another_machine_and_no_other_does() {
    let stage = Stage::new(&http_app(""), |stream| once(stream, "")).await;
    let (seen, backend) = canned(OK);
    stage.machine("shop", "m2", backend).await;
    let mut client = stage.connect(80).await;
    client.send(GET).await;
    assert_eq!(client.answer().await.1, "ok");
    assert_eq!(*stage.fake.failures.lock().unwrap(), [("m1".to_string(), Failure::Broken)]);
    seen.lock().unwrap().clear();
    client.send("DELETE / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert!(client.answer().await.0.starts_with("HTTP/1.1 502 "));
    assert!(seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_connection_that_was_closed_while_it_was_idle_costs_no_request() {
    // Each connection carries one request and is then closed without notice.
    let stage = Stage::new(&http_app(""), |stream| once(stream, OK)).await;
    let mut client = stage.connect(80).await;
    for _ in 0..20 {
        client.send(GET).await;
        assert_eq!(client.answer().await.1, "ok");
    }
    assert!(stage.fake.failures.lock().unwrap().is_empty());
}

#[tokio::test]
async fn an_answer_that_is_no_http_is_a_502() {
    for answer in [
        "SSH-2.0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        "HTTP/1.1 200 OK\nContent-Length: 0\n\n",
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        "HTTP/1.1 200 OK\r\nA: \0\r\n\r\n",
    ] {
        let stage = Stage::new(&http_app(""), move |stream| once(stream, answer)).await;
        let mut client = stage.connect(80).await;
        client.send("POST / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        let (head, _) = client.answer().await;
        assert!(head.starts_with("HTTP/1.1 502 "), "{answer}: {head}");
        // The client did nothing wrong, and may go on.
        assert_eq!(field(&head, "connection"), None, "{answer}: {head}");
    }
}

#[tokio::test]
async fn an_answer_that_breaks_off_breaks_off_for_the_client() {
    for answer in [
        "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\nx\r\n",
    ] {
        let stage = Stage::new(&http_app(""), move |stream| once(stream, answer)).await;
        let mut client = stage.connect(80).await;
        client.send(GET).await;
        let all = client.rest().await;
        assert!(all.contains("half") && !all.contains("\r\n0\r\n"), "{all}");
        assert_eq!(*stage.fake.failures.lock().unwrap(), [("m1".to_string(), Failure::Broken)]);
        assert!(stage.line().await["error"].as_str().unwrap().starts_with("The machine broke off"));
    }
}

#[tokio::test]
async fn silence_is_a_504_after_the_idle_timeout() {
    let options = "[http_service.http_options]\nidle_timeout = 1\n";
    let stage = Stage::new(&http_app(options), |mut stream: TcpStream| async move {
        let _ = stream.read_to_end(&mut Vec::new()).await;
    })
    .await;
    let mut client = stage.connect(80).await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    let (head, body) = client.answer().await;
    assert!(head.starts_with("HTTP/1.1 504 ") && field(&head, "retry-after").is_some(), "{head}");
    assert!(body.starts_with("The app took longer"), "{body}");
    assert_eq!(*stage.fake.failures.lock().unwrap(), [("m1".to_string(), Failure::TimedOut)]);
}

#[tokio::test]
async fn no_machine_is_a_503_that_says_when_to_ask_again() {
    let (_, backend) = canned(OK);
    let stage = Stage::new(&http_app(""), backend).await;
    stage.serve(&[&http_app("").replace("'shop'", "'empty'")]);
    let mut client = stage.connect(80).await;
    client.send(GET).await;
    let (head, body) = client.answer().await;
    assert!(head.starts_with("HTTP/1.1 503 "), "{head}");
    assert_eq!(field(&head, "retry-after"), Some("2"));
    assert!(body.starts_with("no machine can be had. (id "), "{body}");
    assert_eq!(field(&head, "content-type"), Some("text/plain; charset=utf-8"));
    // The other id is what the log has.
    assert!(stage.line().await["error"].as_str().unwrap().contains("(id log-1)"));
}

#[tokio::test]
async fn a_client_that_leaves_while_a_machine_starts_waits_no_more() {
    let (seen, backend) = canned(OK);
    let stage = Stage::new(&http_app(""), backend).await;
    let (open, gate) = watch::channel(false);
    *stage.fake.gate.lock().unwrap() = Some(gate);
    let (mut stays, mut leaves) = (stage.connect(80).await, stage.connect(80).await);
    stays.send(GET).await;
    leaves.send(GET).await;
    let waiting = stage.fake.waiting.clone();
    eventually(|| (waiting.load(SeqCst) == 2).then_some(())).await;
    drop(leaves);
    eventually(|| (waiting.load(SeqCst) == 1).then_some(())).await;
    open.send_replace(true);
    assert_eq!(stays.answer().await.1, "ok");
    assert_eq!(String::from_utf8_lossy(&seen.lock().unwrap()).matches("GET").count(), 1);
    assert_eq!(stage.line().await["status"], 499);
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_request_at_the_machine() {
    let ended = Arc::new(Mutex::new(false));
    let log = ended.clone();
    let stage = Stage::new(&http_app(""), move |mut stream: TcpStream| {
        let log = log.clone();
        async move {
            let _ = stream.read_to_end(&mut Vec::new()).await;
            *log.lock().unwrap() = true;
        }
    })
    .await;
    let mut client = stage.connect(80).await;
    client.send(GET).await;
    let machine = stage.first();
    eventually(|| (machine.leases.load(SeqCst) == 1).then_some(())).await;
    drop(client);
    eventually(|| ended.lock().unwrap().then_some(())).await;
    eventually(|| (machine.leases.load(SeqCst) == 0).then_some(())).await;
}

#[tokio::test]
async fn clients_may_name_a_machine() {
    let (_, backend) = canned(OK);
    let stage = Stage::new(&http_app(""), backend).await;
    let (_, other) = canned("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nm2");
    stage.machine("shop", "m2", other).await;
    let mut client = stage.connect(80).await;
    for (field, body) in [
        ("fly-force-instance-id: m2", "m2"),
        ("Fly-Prefer-Instance-Id: m2", "m2"),
        ("fly-prefer-instance-id: gone", "ok"),
    ] {
        client.send(format!("GET / HTTP/1.1\r\nHost: a\r\n{field}\r\n\r\n")).await;
        assert_eq!(client.answer().await.1, body, "{field}");
    }
    client.send("GET / HTTP/1.1\r\nHost: a\r\nfly-force-instance-id: gone\r\n\r\n").await;
    assert!(client.answer().await.0.starts_with("HTTP/1.1 404 "));
    assert_eq!(stage.fake.wants.lock().unwrap()[3].steer, Some(Steer::Force("gone".into())));
}

/// A stage whose first machine replays every request.
async fn replaying(asks: &'static str) -> (Stage, Arc<Mutex<Vec<u8>>>) {
    let answer: &'static str =
        format!("HTTP/1.1 200 OK\r\nFly-Replay: {asks}\r\nContent-Length: 0\r\n\r\n").leak();
    let (_, backend) = canned(answer);
    let stage = Stage::new(&http_app(""), backend).await;
    let (seen, other) = canned("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nother");
    stage.machine("shop", "m2", other).await;
    (stage, seen)
}

#[tokio::test]
async fn a_replayed_request_reaches_the_other_machine_whole() {
    let (stage, seen) = replaying("instance=m2;state=a b").await;
    let mut client = stage.connect(80).await;
    let body = "x".repeat(300_000);
    client.send(format!("POST /p HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{body}", body.len())).await;
    let (head, answer) = client.answer().await;
    assert_eq!((answer.as_str(), field(&head, "fly-replay")), ("other", None));
    let seen = String::from_utf8(seen.lock().unwrap().clone()).unwrap();
    let (head, sent) = seen.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("POST /p HTTP/1.1"), "{head}");
    let source = field(head, "fly-replay-src").unwrap();
    assert!(source.starts_with("instance=m1;region=local;t=") && source.ends_with(";state=a b"), "{source}");
    assert!(sent == body, "{} bytes", sent.len());
    // What clients say of replays is not believed.
    client.send("GET / HTTP/1.1\r\nHost: a\r\nfly-replay-src: instance=x\r\n\r\n").await;
    client.answer().await;
    assert_eq!(stage.line().await["attempts"], 2);
}

#[tokio::test]
async fn a_replay_elsewhere_leaves_out_who_asks() {
    let (stage, _) = replaying("elsewhere=true").await;
    let mut client = stage.connect(80).await;
    client.send(GET).await;
    assert_eq!(client.answer().await.1, "other");
}

#[tokio::test]
async fn replays_end() {
    let (stage, _) = replaying("instance=m1").await;
    let mut client = stage.connect(80).await;
    client.send(GET).await;
    let (head, body) = client.answer().await;
    assert!(head.starts_with("HTTP/1.1 502 ") && body.contains("more than 10 times"), "{body}");
    assert_eq!(stage.fake.wants.lock().unwrap().len(), 11);
}

#[tokio::test]
async fn a_body_that_is_too_large_to_keep_is_not_replayed() {
    let (stage, seen) = replaying("instance=m2").await;
    let mut client = stage.connect(80).await;
    let body = "x".repeat(2 << 20);
    client.send(format!("POST /p HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{body}", body.len())).await;
    let (head, why) = client.answer().await;
    assert!(head.starts_with("HTTP/1.1 502 ") && why.contains("1 MiB"), "{why}");
    assert!(seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_replay_may_name_another_app() {
    let (stage, _) = replaying("app=second").await;
    let (seen, second) = canned("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecond");
    stage.machine("second", "s1", second).await;
    let named = |app: &str| {
        http_app(&format!("[flyrun]\nhostnames = ['{app}.example']\n")).replace("'shop'", &format!("'{app}'"))
    };
    let options = "[http_service.http_options.response]\npristine = true\n[flyrun]";
    stage.serve(&[&named("shop"), &named("second").replace("[flyrun]", options)]);
    let mut client = stage.connect(80).await;
    client.send("GET / HTTP/1.1\r\nHost: shop.example\r\n\r\n").await;
    let (head, body) = client.answer().await;
    // With the options of the app that answers.
    assert_eq!((body.as_str(), field(&head, "via")), ("second", None));
    assert!(String::from_utf8_lossy(&seen.lock().unwrap()).contains("fly-replay-src: instance=m1;"));
    stage.serve(&[&named("shop")]);
    client.send("GET / HTTP/1.1\r\nHost: shop.example\r\n\r\n").await;
    assert!(client.answer().await.1.contains("an app that is not here"));
}

#[tokio::test]
async fn a_machine_may_answer_before_it_has_the_whole_request() {
    let stage = Stage::new(&http_app(""), |mut stream: TcpStream| async move {
        read_head(&mut stream, &mut Vec::new()).await;
        stream.write_all(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nno!").await.unwrap();
        // Closed with the request's body unread, as servers do.
    })
    .await;
    let mut client = stage.connect(80).await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\nfirst").await;
    let all = client.rest().await;
    assert!(all.starts_with("HTTP/1.1 413 ") && all.ends_with("no!"), "{all}");
}

#[tokio::test]
async fn ports_and_listeners_come_and_go_while_requests_are_under_way() {
    let stage = Stage::new(&http_app(""), |mut stream: TcpStream| async move {
        read_head(&mut stream, &mut Vec::new()).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        stream.write_all(OK.as_bytes()).await.unwrap();
    })
    .await;
    let address = stage.listen(80).await;
    let mut client = Client(TcpStream::connect(address).await.unwrap());
    client.send(GET).await;
    eventually(|| (!stage.fake.wants.lock().unwrap().is_empty()).then_some(())).await;
    stage.proxy.close(address);
    stage.proxy.serve(&[]);
    assert_eq!(client.answer().await.1, "ok");
    client.send(GET).await;
    assert!(client.answer().await.0.starts_with("HTTP/1.1 404 "));
    // The address is free.
    eventually(|| std::net::TcpListener::bind(address).ok()).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let other = listener.local_addr().unwrap();
    stage.proxy.listen(80, listener).unwrap();
    stage.serve(&[&http_app("")]);
    let mut client = Client(TcpStream::connect(other).await.unwrap());
    client.send(GET).await;
    assert_eq!(client.answer().await.1, "ok");
}

#[tokio::test]
async fn a_drain_ends_idle_connections_and_waits_for_requests() {
    let (open, gate) = watch::channel(false);
    let (_, backend) = canned(OK);
    let stage = Stage::new(&http_app(""), backend).await;
    let (mut busy, mut idle, mut new) =
        (stage.connect(80).await, stage.connect(80).await, stage.connect(80).await);
    idle.send(GET).await;
    idle.answer().await;
    *stage.fake.gate.lock().unwrap() = Some(gate);
    busy.send(GET).await;
    eventually(|| (stage.fake.waiting.load(SeqCst) == 1).then_some(())).await;
    let drain = stage.drain();
    let rest = async {
        assert_eq!(idle.rest().await, "");
        assert_eq!(new.rest().await, "");
        open.send_replace(true);
        busy.rest().await
    };
    let (drained, rest) = tokio::join!(drain, rest);
    assert!(rest.contains("connection: close\r\n") && rest.ends_with("ok"), "{rest}");
    assert_eq!((drained.cut, stage.proxy.connections()), (0, 0));
}

#[tokio::test]
async fn a_drain_cuts_what_does_not_end() {
    let (_open, gate) = watch::channel(false);
    let (_, backend) = canned(OK);
    let stage = Stage::new(&http_app(""), backend).await;
    *stage.fake.gate.lock().unwrap() = Some(gate);
    let mut client = stage.connect(80).await;
    client.send(GET).await;
    eventually(|| (stage.fake.waiting.load(SeqCst) == 1).then_some(())).await;
    let drained = stage.proxy.drain(Duration::from_millis(50)).await;
    assert_eq!((drained.cut, stage.proxy.connections()), (1, 0));
    assert_eq!(client.rest().await, "");
}
