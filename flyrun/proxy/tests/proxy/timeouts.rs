//! Limits of a whole request, whatever moves meanwhile.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::sleep;

use crate::fake::{Stage, canned, field, http_app, read_head};

const GET: &str = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
/// A client or a machine that is never still for as long as `idle_timeout` has it.
const DRIP: Duration = Duration::from_millis(20);

fn app(limits: &str) -> String {
    http_app(&format!("[flyrun]\n{limits}\n"))
}

/// Answers with this head, and then with a byte now and then.
async fn drip(mut stream: TcpStream, head: &'static str) {
    read_head(&mut stream, &mut Vec::new()).await;
    let _ = stream.write_all(head.as_bytes()).await;
    while stream.write_all(b"1\r\nx\r\n").await.is_ok() {
        sleep(DRIP).await;
    }
}

#[tokio::test]
async fn a_machine_that_does_not_answer_in_time_is_a_504_and_has_not_failed() {
    let stage = Stage::new(&app("total_timeout = '200ms'"), |mut stream: TcpStream| async move {
        read_head(&mut stream, &mut Vec::new()).await;
        while stream.write_all(b"HTTP/1.1 102 Processing\r\n\r\n").await.is_ok() {
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    let mut client = stage.connect(80).await;
    client.send(GET).await;
    let told = client.rest().await;
    let (_, last) = told.split_once("HTTP/1.1 504 ").unwrap_or_else(|| panic!("{told}"));
    assert!(last.contains("The request took longer than this app has for one"), "{last}");
    assert_eq!(field(last, "connection"), Some("close"));
    assert!(stage.fake.failures.lock().unwrap().is_empty());
    assert_eq!(stage.line().await["status"], 504);
}

#[tokio::test]
async fn waiting_for_a_machine_counts() {
    let (seen, backend) = canned(OK);
    let stage = Stage::new(&app("total_timeout = '100ms'"), backend).await;
    let (_open, gate) = watch::channel(false);
    *stage.fake.gate.lock().unwrap() = Some(gate);
    let mut client = stage.connect(80).await;
    client.send(GET).await;
    assert!(client.rest().await.starts_with("HTTP/1.1 504 "));
    assert!(seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn an_answer_that_does_not_end_in_time_breaks_off() {
    let stage = Stage::new(&app("total_timeout = '1s'"), |stream| {
        drip(stream, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    })
    .await;
    let mut client = stage.connect(80).await;
    client.send(GET).await;
    let told = client.rest().await;
    assert!(told.starts_with("HTTP/1.1 200 ") && !told.ends_with("0\r\n\r\n"), "{told}");
    let line = stage.line().await;
    assert!(line["error"].as_str().unwrap().contains("total_timeout"), "{line}");
    assert!(stage.fake.failures.lock().unwrap().is_empty());
}

#[tokio::test]
async fn the_next_request_has_the_whole_time_again() {
    let stage = Stage::new(&app("total_timeout = '2s'"), |mut stream: TcpStream| async move {
        let mut pending = Vec::new();
        while read_head(&mut stream, &mut pending).await.is_some() {
            sleep(Duration::from_millis(600)).await;
            let _ = stream.write_all(OK.as_bytes()).await;
        }
    })
    .await;
    let mut client = stage.connect(80).await;
    for _ in 0..4 {
        client.send(GET).await;
        let (head, _) = client.answer().await;
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    }
}

#[tokio::test]
async fn events_and_tunnels_last_as_long_as_they_like() {
    let stage = Stage::new(&app("total_timeout = '1s'"), |stream| {
        drip(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n",
        )
    })
    .await;
    let mut client = stage.connect(80).await;
    client.send(GET).await;
    client.exactly(1000).await;
    let stage = Stage::new(&app("total_timeout = '1s'"), |stream| {
        drip(stream, "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: drip\r\n\r\n")
    })
    .await;
    let mut client = stage.connect(80).await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: drip\r\n\r\n").await;
    client.exactly(1000).await;
}

#[tokio::test]
async fn a_body_that_comes_too_slowly_is_a_408_however_steadily_it_comes() {
    let stage = Stage::new(&app("body_timeout = '200ms'"), |mut stream: TcpStream| async move {
        let _ = stream.read_to_end(&mut Vec::new()).await;
    })
    .await;
    let mut client = stage.connect(80).await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n").await;
    let told = loop {
        // Whether it is still taken says nothing.
        let _ = client.0.write_all(b"x").await;
        let mut some = [0; 4096];
        if let Ok(count) = tokio::time::timeout(DRIP, client.0.read(&mut some)).await {
            break String::from_utf8_lossy(&some[..count.unwrap()]).into_owned();
        }
    };
    assert!(told.starts_with("HTTP/1.1 408 "), "{told}");
    assert!(stage.fake.failures.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_body_in_time_leaves_the_answer_its_own() {
    let stage = Stage::new(&app("body_timeout = '1s'"), |mut stream: TcpStream| async move {
        read_head(&mut stream, &mut Vec::new()).await;
        sleep(Duration::from_millis(1500)).await;
        let _ = stream.write_all(OK.as_bytes()).await;
    })
    .await;
    let mut client = stage.connect(80).await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi").await;
    assert_eq!(client.answer().await.1, "ok");
}
