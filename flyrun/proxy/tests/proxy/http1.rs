//! HTTP/1.1 in and out.

use crate::fake::{Stage, canned, field, http_app};

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
