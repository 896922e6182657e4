//! Proxies in front of this one: those that are trusted, and whoever says to be one.

use std::sync::{Arc, Mutex};

use crate::fake::{Client, Stage, canned, field, http_app};

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
const SAYS: &str = "GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 6.6.6.6, 192.0.2.1\r\nX-Forwarded-Proto: https\r\n\
                    X-Forwarded-Host: evil\r\nX_Forwarded_For: 6.6.6.6\r\nFly-Client-IP: 6.6.6.6\r\n\
                    Forwarded: for=6.6.6.6\r\nFly-Region: evil\r\n\r\n";

/// An app behind these proxies, what its machine sees, and a connection from 127.0.0.1.
async fn stage(trusts: &str, more: &str) -> (Stage, Arc<Mutex<Vec<u8>>>, Client) {
    let (seen, backend) = canned(OK);
    let stage =
        Stage::new(&http_app(&format!("[flyrun]\ntrusted_proxies = [{trusts}]\n{more}")), backend).await;
    let client = stage.connect(80).await;
    (stage, seen, client)
}

fn text(seen: &Mutex<Vec<u8>>) -> String {
    String::from_utf8(seen.lock().unwrap().clone()).unwrap()
}

#[tokio::test]
async fn what_a_trusted_proxy_says_goes_on_and_what_its_client_says_does_not() {
    let (stage, seen, mut client) = stage("'127.0.0.0/8'", "").await;
    client.send(SAYS).await;
    client.answer().await;
    let seen = text(&seen);
    assert_eq!(field(&seen, "x-forwarded-for"), Some("192.0.2.1, 127.0.0.1"), "{seen}");
    assert_eq!(field(&seen, "fly-client-ip"), Some("192.0.2.1"));
    assert_eq!(
        (
            field(&seen, "x-forwarded-proto"),
            field(&seen, "x-forwarded-port"),
            field(&seen, "x-forwarded-ssl")
        ),
        (Some("https"), Some("443"), Some("on"))
    );
    assert!(
        !seen.contains("6.6.6.6") && !seen.contains("evil") && field(&seen, "forwarded").is_none(),
        "{seen}"
    );
    assert_eq!(stage.line().await["client"], "192.0.2.1");
}

#[tokio::test]
async fn whoever_else_says_to_be_a_proxy_is_a_client() {
    let (stage, seen, mut client) = stage("'127.0.0.2', '10.0.0.0/8'", "").await;
    client.send(SAYS).await;
    client.answer().await;
    let seen = text(&seen);
    assert_eq!(field(&seen, "x-forwarded-for"), Some("127.0.0.1"), "{seen}");
    assert_eq!(
        (field(&seen, "fly-client-ip"), field(&seen, "x-forwarded-proto")),
        (Some("127.0.0.1"), Some("http"))
    );
    assert!(!seen.contains("6.6.6.6") && !seen.contains("192.0.2.1") && !seen.contains("evil"), "{seen}");
    assert_eq!(stage.line().await["client"], "127.0.0.1");
}

#[tokio::test]
async fn https_that_ends_at_a_trusted_proxy_is_not_sent_to_https_again() {
    let (seen, backend) = canned(OK);
    let stage = Stage::new(&http_app(""), backend).await;
    let directory = stage.directory.path();
    let made = rcgen::generate_simple_self_signed(vec!["a".to_string()]).unwrap();
    std::fs::write(directory.join("c"), made.cert.pem()).unwrap();
    std::fs::write(directory.join("k"), made.signing_key.serialize_pem()).unwrap();
    let app = |trusts: &str| {
        let more =
            format!("[flyrun]\ntrusted_proxies = [{trusts}]\ntls = {{ certificate = 'c', key = 'k' }}");
        http_app(&more).replace("internal_port", "force_https = true\ninternal_port")
    };
    stage.serve(&[&app("'127.0.0.1'")]);
    let mut client = stage.connect(80).await;
    client.send(SAYS).await;
    assert!(client.answer().await.0.starts_with("HTTP/1.1 200 "));
    client.send("GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-Proto: http\r\n\r\n").await;
    assert!(client.answer().await.0.starts_with("HTTP/1.1 301 "));
    stage.serve(&[&app("'127.0.0.2'")]);
    client.send(SAYS).await;
    assert!(client.answer().await.0.starts_with("HTTP/1.1 301 "));
    assert_eq!(text(&seen).matches("GET").count(), 1);
}

#[tokio::test]
async fn a_trusted_proxy_tells_the_client_before_anything_else() {
    let (stage, seen, mut client) = stage("'127.0.0.1'", "accept_proxy_protocol = true").await;
    // Whom the header names is no proxy: what it says is not believed.
    client.send(format!("PROXY TCP4 192.0.2.9 192.0.2.2 4711 80\r\n{SAYS}")).await;
    assert!(client.answer().await.0.starts_with("HTTP/1.1 200 "));
    let seen = text(&seen);
    assert_eq!(
        (field(&seen, "x-forwarded-for"), field(&seen, "x-forwarded-proto")),
        (Some("192.0.2.9"), Some("http"))
    );
    assert_eq!(stage.line().await["client"], "192.0.2.9");
    // Without one it is not heard.
    let mut client = stage.connect(80).await;
    client.send(SAYS).await;
    assert_eq!(client.rest().await, "");
    assert!(stage.proxy.metrics().render().contains("flyrun_edge_proxy_protocol_errors_count 1\n"));
}

#[tokio::test]
async fn a_header_from_anybody_else_is_no_request() {
    let (stage, seen, mut client) = stage("'127.0.0.2'", "accept_proxy_protocol = true").await;
    client.send(format!("PROXY TCP4 192.0.2.9 192.0.2.2 4711 80\r\n{SAYS}")).await;
    assert!(client.rest().await.starts_with("HTTP/1.1 400 "));
    assert!(text(&seen).is_empty());
    let mut client = stage.connect(80).await;
    client.send(SAYS).await;
    assert!(client.answer().await.0.starts_with("HTTP/1.1 200 "));
}

#[tokio::test]
async fn a_machine_of_raw_connections_is_told_the_same_client() {
    let (seen, backend) = canned("");
    let text_of = "app = 'shop'\n[build]\nimage = 'i'\n[[services]]\ninternal_port = PORT\n\
        ports = [{ port = 25, handlers = ['proxy_proto'] }]\n\
        [flyrun]\ntrusted_proxies = ['127.0.0.1']\naccept_proxy_protocol = true\n";
    let stage = Stage::new(text_of, backend).await;
    let mut client = stage.connect(25).await;
    client.send("PROXY TCP6 2001:db8::9 2001:db8::2 4711 25\r\nhello\r\n\r\n").await;
    crate::fake::eventually(|| text(&seen).contains("hello").then_some(())).await;
    assert_eq!(text(&seen), "PROXY TCP6 2001:db8::9 2001:db8::2 4711 25\r\nhello\r\n\r\n");
}
