//! TLS: certificates from files, chosen by name, renewed while clients come.

use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::fake::{Stage, canned, eventually, http_app};

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/// Writes `<stem>.pem` and `<stem>.key` for these names.
fn certificate(directory: &Path, stem: &str, names: &[&str]) -> CertificateDer<'static> {
    let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
    let made = rcgen::generate_simple_self_signed(names).unwrap();
    // As renewals do it: the new file takes the old one's place.
    for (name, text) in [("key", made.signing_key.serialize_pem()), ("pem", made.cert.pem())] {
        std::fs::write(directory.join("new"), text).unwrap();
        std::fs::rename(directory.join("new"), directory.join(format!("{stem}.{name}"))).unwrap();
    }
    made.cert.der().clone()
}

/// What a client sees that trusts these and speaks these protocols.
async fn connect(
    stage: &Stage,
    trusted: &[CertificateDer<'static>],
    name: &str,
    alpn: &[&str],
    versions: &[&'static rustls::SupportedProtocolVersion],
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    for one in trusted {
        roots.add(one.clone()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    let stream = TcpStream::connect(stage.listen(443).await).await?;
    let name = ServerName::try_from(name.to_string()).unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

async fn get(mut stream: TlsStream<TcpStream>, host: &str) -> String {
    stream
        .write_all(format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").as_bytes())
        .await
        .unwrap();
    let mut all = String::new();
    stream.read_to_string(&mut all).await.unwrap();
    all
}

fn app(name: &str, hostname: &str, certificates: &[&str], more: &str) -> String {
    let certificates: String = certificates
        .iter()
        .map(|stem| format!("[[flyrun.tls]]\ncertificate = '{stem}.pem'\nkey = '{stem}.key'\n"))
        .collect();
    http_app(&format!("{more}[flyrun]\nhostnames = ['{hostname}']\n{certificates}"))
        .replace("'shop'", &format!("'{name}'"))
}

#[tokio::test]
async fn names_choose_certificates_and_apps() {
    let (seen, backend) = canned(OK);
    let stage = Stage::new(&http_app(""), backend).await;
    stage.machine("second", "s1", canned("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecond").1).await;
    let at = stage.directory.path();
    let a = certificate(at, "a", &["a.example.com"]);
    let b = certificate(at, "b", &["b.example.com"]);
    let c = certificate(at, "c", &["c.example.org"]);
    stage.serve(&[
        &app("shop", "*.example.com", &["a", "b"], ""),
        &app("second", "c.example.org", &["c"], ""),
    ]);
    let all = [a.clone(), b.clone(), c.clone()];
    for (name, shown, body) in
        [("a.example.com", &a, "ok"), ("b.example.com", &b, "ok"), ("c.example.org", &c, "second")]
    {
        let stream = connect(&stage, &all, name, &[], rustls::ALL_VERSIONS).await.unwrap();
        assert_eq!(stream.get_ref().1.peer_certificates().unwrap()[0], *shown);
        assert!(get(stream, name).await.ends_with(body), "{name}");
    }
    let seen = String::from_utf8(seen.lock().unwrap().clone()).unwrap();
    assert!(
        seen.contains("x-forwarded-proto: https\r\nx-forwarded-port: 443\r\nx-forwarded-ssl: on\r\n"),
        "{seen}"
    );
    // Nobody has this name; and a connection is for the app whose name it was made for.
    assert!(connect(&stage, &all, "d.example.net", &[], rustls::ALL_VERSIONS).await.is_err());
    let stream = connect(&stage, &all, "a.example.com", &[], rustls::ALL_VERSIONS).await.unwrap();
    assert!(get(stream, "c.example.org").await.starts_with("HTTP/1.1 421 "));
}

#[tokio::test]
async fn protocols_and_versions_are_those_of_the_app() {
    let (_, backend) = canned(OK);
    let stage = Stage::new(&http_app(""), backend).await;
    let trusted = [certificate(stage.directory.path(), "a", &["a.example.com"])];
    stage.serve(&[&app("shop", "*", &["a"], "")]);
    let name = "a.example.com";
    let stream = connect(&stage, &trusted, name, &["h2", "http/1.1"], rustls::ALL_VERSIONS).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let stream = connect(&stage, &trusted, name, &["http/1.1"], &[&rustls::version::TLS12]).await.unwrap();
    assert!(get(stream, name).await.ends_with("ok"));
    let options = "[http_service.tls_options]\nalpn = ['http/1.1']\nversions = ['TLSv1.3']\n";
    stage.serve(&[&app("shop", "*", &["a"], options)]);
    assert!(connect(&stage, &trusted, name, &[], &[&rustls::version::TLS12]).await.is_err());
    let stream = connect(&stage, &trusted, name, &["h2", "http/1.1"], rustls::ALL_VERSIONS).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
}

#[tokio::test]
async fn a_renewed_certificate_is_shown_and_a_broken_one_changes_nothing() {
    let (_, backend) = canned(OK);
    let options =
        proxy::Options { certificate_interval: std::time::Duration::from_millis(20), ..Default::default() };
    let stage = Stage::with(&http_app(""), options, backend).await;
    let at = stage.directory.path();
    let old = certificate(at, "a", &["a.example.com"]);
    stage.serve(&[&app("shop", "*", &["a"], "")]);
    let shown = async |trusted: &CertificateDer<'static>| {
        let trusted = [trusted.clone()];
        connect(&stage, &trusted, "a.example.com", &[], rustls::ALL_VERSIONS).await.is_ok()
    };
    assert!(shown(&old).await);
    std::fs::write(at.join("a.pem"), "not a certificate").unwrap();
    let trouble = eventually(|| stage.told.troubles.lock().unwrap().first().cloned()).await;
    assert!(trouble.contains("a.pem is not used: the file has no certificate in PEM."), "{trouble}");
    assert!(trouble.ends_with("The one that was read before is shown on."), "{trouble}");
    assert!(shown(&old).await);
    let new = certificate(at, "a", &["a.example.com"]);
    for attempt in 0.. {
        if shown(&new).await {
            break;
        }
        assert!(attempt < 500, "the new certificate is not shown");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    // A key that is another's.
    certificate(at, "b", &["b.example.com"]);
    std::fs::copy(at.join("b.key"), at.join("a.key")).unwrap();
    eventually(|| (stage.told.troubles.lock().unwrap().len() > 1).then_some(())).await;
    assert!(shown(&new).await);
}

#[tokio::test]
async fn what_is_wrong_with_certificates_is_told_and_other_apps_go_on() {
    let (_, backend) = canned(OK);
    let stage = Stage::new(&http_app(""), backend).await;
    let at = stage.directory.path();
    let good = certificate(at, "good", &["good.example.com"]);
    let texts =
        [app("shop", "good.example.com", &["good"], ""), app("second", "bad.example.com", &["missing"], "")];
    let sites: Vec<_> = texts.iter().map(|text| crate::fake::site(text, 1, at.to_path_buf())).collect();
    let problems = stage.proxy.serve(&sites);
    assert_eq!(problems.len(), 1);
    assert!(problems[0].contains("missing.pem is not used"), "{problems:?}");
    let trusted = [good];
    assert!(connect(&stage, &trusted, "good.example.com", &[], rustls::ALL_VERSIONS).await.is_ok());
    assert!(connect(&stage, &trusted, "bad.example.com", &[], rustls::ALL_VERSIONS).await.is_err());
    // When it is there, it is shown.
    let bad = certificate(at, "missing", &["bad.example.com"]);
    assert_eq!(stage.proxy.refresh_certificates(), Vec::<String>::new());
    assert!(connect(&stage, &[bad], "bad.example.com", &[], rustls::ALL_VERSIONS).await.is_ok());
}

#[tokio::test]
async fn raw_connections_find_their_app_by_name() {
    let raw = |name: &str, hostname: &str| {
        format!(
            "app = '{name}'\n[build]\nimage = 'i'\n[[services]]\ninternal_port = PORT\n[[services.ports]]\nport = 443\n\
             handlers = ['tls']\n[flyrun]\nhostnames = ['{hostname}']\n[[flyrun.tls]]\ncertificate = 'a.pem'\nkey = 'a.key'\n"
        )
    };
    let greet = |text: &'static str| {
        move |mut stream: TcpStream| async move {
            let mut some = [0; 5];
            stream.read_exact(&mut some).await.unwrap();
            stream.write_all(text.as_bytes()).await.unwrap();
            stream.write_all(&some).await.unwrap();
        }
    };
    let stage = Stage::new(&http_app(""), greet("one ")).await;
    stage.machine("second", "s1", greet("two ")).await;
    let trusted = [certificate(stage.directory.path(), "a", &["one.example.com", "two.example.com"])];
    stage.serve(&[&raw("shop", "one.example.com"), &raw("second", "two.example.com")]);
    for (name, expected) in [("one.example.com", "one hello"), ("two.example.com", "two hello")] {
        let mut stream = connect(&stage, &trusted, name, &[], rustls::ALL_VERSIONS).await.unwrap();
        stream.write_all(b"hello").await.unwrap();
        let mut all = String::new();
        stream.read_to_string(&mut all).await.unwrap();
        assert_eq!(all, expected);
    }
}

#[tokio::test]
async fn http_is_sent_to_https_where_that_is_forced() {
    let (seen, backend) = canned(OK);
    let stage = Stage::new(&http_app(""), backend).await;
    certificate(stage.directory.path(), "a", &["a.example.com"]);
    let text = app("shop", "*", &["a"], "").replace("internal_port", "force_https = true\ninternal_port");
    stage.serve(&[&text]);
    let mut client = stage.connect(80).await;
    client.send("GET /a?b HTTP/1.1\r\nHost: Shop.example:80\r\n\r\n").await;
    let (head, _) = client.answer().await;
    assert!(head.starts_with("HTTP/1.1 301 Moved Permanently\r\n"), "{head}");
    assert_eq!(crate::fake::field(&head, "location"), Some("https://Shop.example/a?b"));
    assert!(seen.lock().unwrap().is_empty());
    // HTTP on the port of TLS is no handshake.
    let mut client = stage.connect(443).await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    client.rest().await;
    let metrics = stage.proxy.metrics();
    eventually(|| metrics.render().contains("fly_edge_tls_handshake_errors 1\n").then_some(())).await;
}

#[tokio::test]
async fn a_document_for_an_authority_is_shown_over_plain_http_as_long_as_it_is_held() {
    let (seen, backend) = canned(OK);
    let stage = Stage::new(&http_app(""), backend).await;
    let trusted = [certificate(stage.directory.path(), "a", &["a.example.com"])];
    let forced = app("shop", "*", &["a"], "").replace("internal_port", "force_https = true\ninternal_port");
    stage.serve(&[&forced]);
    let proof = stage.proxy.challenges().show_document("token", "token.key");
    let mut client = stage.connect(80).await;
    let asks = "GET /.well-known/acme-challenge/token HTTP/1.1\r\nHost: a.example.com\r\n\r\n";
    client.send(asks).await;
    let (head, body) = client.answer().await;
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert_eq!(body, "token.key");
    assert_eq!(stage.line().await["error"], serde_json::Value::Null);
    // Only this, only by a safe method, and only there.
    for other in [asks.replace("token HTTP", "tokens HTTP"), asks.replace("GET", "POST")] {
        client.send(other).await;
        assert!(client.answer().await.0.starts_with("HTTP/1.1 301 "));
    }
    let mut tls = connect(&stage, &trusted, "a.example.com", &[], rustls::ALL_VERSIONS).await.unwrap();
    tls.write_all(asks.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n").as_bytes()).await.unwrap();
    let mut all = String::new();
    tls.read_to_string(&mut all).await.unwrap();
    assert!(all.ends_with("ok"), "the app has documents of its own: {all}");
    drop(proof);
    client.send(asks).await;
    assert!(client.answer().await.0.starts_with("HTTP/1.1 301 "));
    assert_eq!(String::from_utf8_lossy(&seen.lock().unwrap()).matches("GET").count(), 1);
}

#[tokio::test]
async fn a_certificate_for_an_authority_is_shown_to_no_one_else() {
    let (_, backend) = canned(OK);
    let stage = Stage::new(&http_app(""), backend).await;
    let shown = certificate(stage.directory.path(), "a", &["a.example.com"]);
    stage.serve(&[&app("shop", "*", &["a"], "")]);
    let made = rcgen::generate_simple_self_signed(vec!["a.example.com".to_string()]).unwrap();
    let proven = made.cert.der().clone();
    let key = made.signing_key.serialize_der();
    let challenges = stage.proxy.challenges();
    assert!(challenges.show_certificate("a.example.com", proven.to_vec(), b"no key".to_vec()).is_err());
    let proof = challenges.show_certificate("A.example.com", proven.to_vec(), key).unwrap();
    let both = [shown.clone(), proven.clone()];
    let ask = async |protocols: &[&str]| {
        connect(&stage, &both, "a.example.com", protocols, rustls::ALL_VERSIONS).await
    };
    let mut seen = ask(&["acme-tls/1"]).await.unwrap();
    assert_eq!(seen.get_ref().1.peer_certificates().unwrap()[0], proven);
    assert_eq!(seen.get_ref().1.alpn_protocol(), Some(&b"acme-tls/1"[..]));
    assert_eq!(seen.read(&mut [0]).await.unwrap(), 0, "nobody serves there");
    for protocols in [&[][..], &["http/1.1"], &["http/1.1", "acme-tls/1"]] {
        let client = ask(protocols).await.unwrap();
        assert_eq!(client.get_ref().1.peer_certificates().unwrap()[0], shown);
        assert!(get(client, "a.example.com").await.ends_with("ok"));
    }
    drop(proof);
    assert!(ask(&["acme-tls/1"]).await.is_err());
}

#[tokio::test]
async fn figures_tell_how_long_certificates_hold() {
    let (_, backend) = canned(OK);
    let stage = Stage::new(&http_app(""), backend).await;
    certificate(stage.directory.path(), "a", &["a.example.com"]);
    stage.serve(&[&app("shop", "*", &["a"], "")]);
    let line = |figures: &str| {
        let name = format!(
            "flyrun_certificate_expiry_seconds{{file=\"{}\"}} ",
            stage.directory.path().join("a.pem").display()
        );
        figures.lines().find_map(|line| line.strip_prefix(&name)?.parse::<i64>().ok())
    };
    assert!(line(&stage.proxy.figures()).is_some_and(|left| left > 0));
    stage.serve(&[&http_app("")]);
    assert_eq!(line(&stage.proxy.figures()), None);
}
