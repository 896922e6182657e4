//! Registries that are broken, slow or mean.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "clippy exempts tests, but not their helpers"
)]

use std::{
    fs,
    io::Write,
    net::TcpStream,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use images::{Auth, Digest, Error, Image, NoProgress, PullOptions, Reference, Store, pull};
use serde_json::json;

mod common;
use common::{Log, Server, noise, reply};

/// One repetition; patience enough for a busy machine.
fn patient() -> PullOptions {
    PullOptions {
        plain_http: true,
        stall_timeout: Duration::from_secs(120),
        retries: 1,
        ..PullOptions::default()
    }
}

/// Little patience, for servers that fall silent. Nothing is asserted about how long anything takes.
fn impatient() -> PullOptions {
    PullOptions { stall_timeout: Duration::from_secs(1), ..patient() }
}

fn attempt(name: &str, options: &PullOptions) -> images::Result<Image> {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path());
    let result = pull(&store, &Reference::parse(name).unwrap(), options, &NoProgress);
    if result.is_err() {
        assert!(store.list().unwrap().is_empty(), "nothing half-made is listed");
        for entry in fs::read_dir(directory.path().join("blobs/sha256")).unwrap() {
            let entry = entry.unwrap();
            let got = Digest::of(&fs::read(entry.path()).unwrap()).hex();
            assert_eq!(entry.file_name().to_str().unwrap(), got, "a visible blob is whole");
        }
    }
    result
}

/// What a registry has of an image of one plain layer.
#[derive(Clone)]
struct Served {
    manifest: Vec<u8>,
    config: Vec<u8>,
    layer: Vec<u8>,
}

impl Served {
    fn new() -> Self {
        let layer = noise(1, 3 << 20);
        let config =
            json!({"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": [Digest::of(&layer)]}});
        let config = config.to_string().into_bytes();
        let manifest = json!({"schemaVersion": 2,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": Digest::of(&config), "size": config.len()},
            "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": Digest::of(&layer), "size": layer.len()}]});
        Self { manifest: manifest.to_string().into_bytes(), config, layer }
    }

    fn is_layer(&self, head: &str) -> bool {
        head.contains(&Digest::of(&self.layer).to_string())
    }

    /// Answers as a good registry would, but for ranges.
    fn answer(&self, head: &str, stream: &mut TcpStream) {
        if head.contains("/manifests/") {
            reply(stream, "200 OK", "", &self.manifest);
        } else if self.is_layer(head) {
            reply(stream, "200 OK", "", &self.layer);
        } else {
            reply(stream, "200 OK", "", &self.config);
        }
    }
}

/// A registry that is good except for how it answers requests for the layer.
fn serve_layer(answer: impl Fn(&Served, &str, &mut TcpStream) + Send + Sync + 'static) -> Server {
    let served = Served::new();
    Server::start(move |head, stream| {
        if served.is_layer(head) { answer(&served, head, stream) } else { served.answer(head, stream) }
    })
}

#[test]
fn a_good_one_passes() {
    let server = serve_layer(Served::answer);
    assert_eq!(attempt(&server.name("x"), &patient()).unwrap().layers.len(), 1);
    let automatic = PullOptions { plain_http: false, ..patient() };
    attempt(&server.name("x"), &automatic).expect("loopback without TLS is found out");
}

#[test]
fn silence_ends_in_an_error() {
    let server = Server::start(|_, stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{");
        thread::sleep(Duration::from_secs(3600));
    });
    let error = attempt(&server.name("x"), &impatient()).unwrap_err();
    assert!(matches!(error, Error::Stalled { .. }), "{error}");
    let server = Server::start(|_, _| thread::sleep(Duration::from_secs(3600)));
    let error = attempt(&server.name("x"), &impatient()).unwrap_err();
    assert!(matches!(error, Error::Stalled { .. }), "{error}");
}

#[test]
fn a_layer_that_stalls_is_continued_from_there() {
    let requests = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&requests);
    let server = serve_layer(move |served, head, stream| {
        let range =
            head.lines().find_map(|line| line.to_lowercase().strip_prefix("range: bytes=").map(String::from));
        seen.lock().unwrap().push(range.clone());
        let start: usize = range.map_or(0, |range| range.trim_end_matches('-').parse().unwrap());
        let rest = &served.layer[start..];
        let status = if start == 0 { "200 OK" } else { "206 Partial Content" };
        let length = served.layer.len();
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\nContent-Range: bytes {start}-{}/{length}\r\nConnection: close\r\n\r\n",
            rest.len(),
            length - 1
        );
        let _ = stream
            .write_all(head.as_bytes())
            .and_then(|()| stream.write_all(&rest[..rest.len().min(1 << 20)]));
        if rest.len() > 1 << 20 {
            thread::sleep(Duration::from_secs(3600));
        }
    });
    let image = attempt(&server.name("x"), &PullOptions { retries: 50, ..impatient() });
    let requests = requests.lock().unwrap().clone();
    image.unwrap_or_else(|error| panic!("{error}: {requests:?}"));
    assert!(requests[0].is_none() && requests.iter().flatten().count() >= 2, "{requests:?}");
}

#[test]
fn lies_about_lengths_are_caught() {
    // Announces more than the manifest does.
    let server =
        serve_layer(|served, _, stream| reply(stream, "200 OK", "", &[&served.layer[..], b"x"].concat()));
    assert!(matches!(attempt(&server.name("x"), &patient()), Err(Error::SizeMismatch { .. })));
    // Announces nothing and sends for ever.
    let server = serve_layer(|_, _, stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n");
        while stream.write_all(&[7; 65536]).is_ok() {}
    });
    assert!(matches!(attempt(&server.name("x"), &patient()), Err(Error::SizeMismatch { .. })));
    // Announces the right length and sends less.
    let server = serve_layer(|served, _, stream| {
        let head =
            format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", served.layer.len());
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&served.layer[..1000]));
    });
    let error = attempt(&server.name("x"), &patient()).unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    // Answers a range with another one.
    let server = serve_layer(|served, head, stream| {
        if head.to_lowercase().contains("range:") {
            reply(stream, "206 Partial Content", "Content-Range: bytes 0-9/10\r\n", &served.layer[..10]);
        } else {
            let head = format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                served.layer.len()
            );
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&served.layer[..1000]));
        }
    });
    let error = attempt(&server.name("x"), &patient()).unwrap_err();
    assert!(matches!(error, Error::Protocol { .. }), "{error}");
}

#[test]
fn wrong_bytes_are_caught_by_their_digest() {
    let server = serve_layer(|served, _, stream| {
        let mut layer = served.layer.clone();
        layer[1_000_000] ^= 1;
        reply(stream, "200 OK", "", &layer);
    });
    assert!(matches!(attempt(&server.name("x"), &patient()), Err(Error::DigestMismatch { .. })));
    let served = Served::new();
    let server = Server::start(move |_, stream| reply(stream, "200 OK", "", &served.manifest));
    let error = attempt(&server.name("x"), &patient()).unwrap_err().to_string();
    assert!(error.contains("the configuration of"), "{error}");
    let by_digest = format!("{}@{}", server.name("x"), Digest::of(b"another"));
    let error = attempt(&by_digest, &patient()).unwrap_err().to_string();
    assert!(
        error.contains("the manifest of") && error.contains(&Digest::of(b"another").to_string()),
        "{error}"
    );
}

#[test]
fn huge_and_senseless_documents_are_refused() {
    let server = Server::start(|_, stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n");
        while stream.write_all(&[b' '; 65536]).is_ok() {}
    });
    assert!(matches!(attempt(&server.name("x"), &patient()), Err(Error::TooLarge { .. })));
    let server = Server::start(|_, stream| {
        reply(stream, "200 OK", "", b"<html>welcome to the hotel's network</html>")
    });
    assert!(matches!(attempt(&server.name("x"), &patient()), Err(Error::Malformed { .. })));
    let server = Server::start(|_, stream| {
        let _ = stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n");
    });
    assert!(matches!(attempt(&server.name("x"), &patient()), Err(Error::Unreachable { .. })));
    let deep = "[".repeat(100_000);
    let server = Server::start(move |_, stream| reply(stream, "200 OK", "", deep.as_bytes()));
    assert!(matches!(attempt(&server.name("x"), &patient()), Err(Error::Malformed { .. })));
}

#[test]
fn redirects_are_followed_a_few_times() {
    let server =
        Server::start(|_, stream| reply(stream, "307 Temporary Redirect", "Location: /again\r\n", b""));
    let error = attempt(&server.name("x"), &patient()).unwrap_err().to_string();
    assert!(error.contains("redirects more than 5 times"), "{error}");
    let server = Server::start(|_, stream| {
        reply(stream, "307 Temporary Redirect", "Location: file:///etc/passwd\r\n", b"")
    });
    let error = attempt(&server.name("x"), &patient()).unwrap_err().to_string();
    assert!(error.contains("not secure"), "{error}");
}

#[test]
fn nobody_is_asked_whom_a_registry_must_not_reach() {
    for to in [
        "169.254.169.254/latest/meta-data",
        "[fe80::1]/",
        "[::ffff:169.254.169.254]/",
        "2852039166/",
        "100.100.100.200/",
    ] {
        let location = format!("Location: http://{to}\r\n");
        let server = Server::start(move |_, stream| reply(stream, "307 Temporary Redirect", &location, b""));
        let error = attempt(&server.name("x"), &patient()).unwrap_err();
        assert!(matches!(error, Error::Inward { .. }), "{to}: {error}");
    }
    // Nor for a token, and the word for it says what to do.
    let server = Server::start(|head, stream| {
        challenged(head, stream, "Bearer realm=\"http://169.254.169.254/token\"");
    });
    let error = attempt(&server.name("x"), &patient()).unwrap_err().to_string();
    assert!(
        error.contains("is an address of the link")
            && error.contains("FLYRUN_PULL_REDIRECTS=169.254.169.254"),
        "{error}"
    );
}

#[test]
fn whom_the_user_allows_is_asked() {
    // Nobody can be connected to there; what counts is that it was tried.
    let server = Server::start(|_, stream| {
        reply(stream, "307 Temporary Redirect", "Location: http://224.0.0.1:9/\r\n", b"")
    });
    let options = PullOptions {
        inward_hosts: vec!["224.0.0.1".into()],
        connect_timeout: Duration::from_millis(200),
        retries: 0,
        ..patient()
    };
    let error = attempt(&server.name("x"), &options).unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
}

#[test]
fn a_drip_is_not_waited_for() {
    let drip = |stream: &mut TcpStream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n");
        while stream.write_all(b" ").is_ok() {
            thread::sleep(Duration::from_millis(20));
        }
    };
    let options = PullOptions { retries: 0, ..impatient() };
    let server = Server::start(move |_, stream| drip(stream));
    let error = attempt(&server.name("x"), &options).unwrap_err();
    assert!(matches!(error, Error::TooSlow { .. }), "{error}");
    let server = serve_layer(move |_, _, stream| drip(stream));
    let error = attempt(&server.name("x"), &options).unwrap_err();
    assert!(matches!(error, Error::SizeMismatch { .. } | Error::TooSlow { .. }), "{error}");
    // A head that does not end.
    let server = Server::start(|_, stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nX: ");
        while stream.write_all(b"x").is_ok() {
            thread::sleep(Duration::from_millis(20));
        }
    });
    let error = attempt(&server.name("x"), &options).unwrap_err();
    assert!(matches!(error, Error::Stalled { .. }), "{error}");
}

/// Answers 401 with this challenge to requests without credentials.
fn challenged(head: &str, stream: &mut TcpStream, challenge: &str) -> bool {
    let anonymous = !head.to_lowercase().contains("authorization:");
    if anonymous {
        reply(stream, "401 Unauthorized", &format!("WWW-Authenticate: {challenge}\r\n"), b"");
    }
    anonymous
}

#[test]
fn credentials_stay_with_the_registry_when_it_redirects() {
    let served = Served::new();
    let heads = Arc::new(Mutex::new(String::new()));
    let (storage_heads, layer) = (Arc::clone(&heads), served.layer.clone());
    let storage = Server::start(move |head, stream| {
        storage_heads.lock().unwrap().push_str(head);
        reply(stream, "200 OK", "", &layer);
    });
    let location = format!("Location: http://127.0.0.1:{}/signed?key=secret\r\n", storage.port);
    let server = Server::start(move |head, stream| {
        if challenged(head, stream, "Basic realm=\"x\"") {
        } else if served.is_layer(head) {
            reply(stream, "307 Temporary Redirect", &location, b"");
        } else {
            served.answer(head, stream);
        }
    });
    let auth = Auth::Basic { username: "alice".into(), password: "secret".into() };
    attempt(&server.name("x"), &PullOptions { auth, ..patient() }).unwrap();
    let heads = heads.lock().unwrap().to_lowercase();
    assert!(heads.starts_with("get /signed?key=secret"), "{heads}");
    assert!(!heads.contains("authorization"), "{heads}");
}

#[test]
fn a_token_is_fetched_and_renewed_when_it_has_expired() {
    let served = Served::new();
    let tokens = Arc::new(AtomicUsize::new(0));
    let given = Arc::clone(&tokens);
    let realm = Server::start(move |head, stream| {
        let number = given.fetch_add(1, Ordering::Relaxed);
        let right = head.contains("service=test") && head.contains("scope=repository%3Aa%2Fx%3Apull");
        let right = right && head.to_lowercase().contains("authorization: basic ywxpy2u6c2vjcmv0");
        let status = if right { "200 OK" } else { "403 Forbidden" };
        reply(stream, status, "", format!(r#"{{"token":"token{number}"}}"#).as_bytes());
    });
    let challenge = format!(r#"Bearer realm="http://127.0.0.1:{}/token",service="test""#, realm.port);
    let server = Server::start(move |head, stream| {
        if challenged(head, stream, &challenge) {
        } else if served.is_layer(head) && head.contains("token0") {
            reply(stream, "401 Unauthorized", &format!("WWW-Authenticate: {challenge}\r\n"), b"");
        } else {
            served.answer(head, stream);
        }
    });
    let auth = Auth::Basic { username: "alice".into(), password: "secret".into() };
    attempt(&server.name("a/x"), &PullOptions { auth, ..patient() }).unwrap();
    assert_eq!(tokens.load(Ordering::Relaxed), 2);
}

#[test]
fn passing_errors_are_tried_again_and_lasting_ones_are_told() {
    let served = Served::new();
    let count = AtomicUsize::new(0);
    let server = Server::start(move |head, stream| match count.fetch_add(1, Ordering::Relaxed) {
        0 => reply(stream, "503 Service Unavailable", "Retry-After: 0\r\n", b""),
        1 => reply(stream, "429 Too Many Requests", "Retry-After: 0\r\n", b""),
        2 => {}
        _ => served.answer(head, stream),
    });
    let directory = tempfile::tempdir().unwrap();
    let log = Log::default();
    let options = PullOptions { retries: 3, ..patient() };
    let name = Reference::parse(&server.name("x")).unwrap();
    pull(&Store::open(directory.path()), &name, &options, &log).unwrap();
    assert_eq!(log.count("Retrying"), 3, "{:?}", log.lines());

    let body =
        br#"{"errors":[{"code":"TOOMANYREQUESTS","message":"You have reached your pull rate limit."}]}"#;
    let server =
        Server::start(move |_, stream| reply(stream, "429 Too Many Requests", "Retry-After: 0\r\n", body));
    let error = attempt(&server.name("x"), &patient()).unwrap_err().to_string();
    assert!(error.ends_with("answered 429: You have reached your pull rate limit."), "{error}");
}

#[test]
fn a_registry_that_is_not_there_is_named() {
    let port = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    let options = PullOptions { retries: 0, ..patient() };
    let error = attempt(&format!("127.0.0.1:{port}/x"), &options).unwrap_err().to_string();
    assert!(error.contains(&format!("127.0.0.1:{port}")) && error.contains("refused"), "{error}");
}
