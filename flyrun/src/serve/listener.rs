//! `/metrics` and the web page, on listeners of their own: HTTP as far as Prometheus, curl and browsers need it.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use page::{Answer, Events, PREFIX, TICK, Whole};
use tokio::io::{self, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{MissedTickBehavior, interval, timeout};

/// Bytes of a request's head.
const MAX_HEAD: usize = 8 << 10;
const MAX_HEADERS: usize = 64;
/// How long a request and its answer may take, and each piece of a stream.
const PATIENCE: Duration = Duration::from_secs(10);
/// Clients at a time, without those that have a stream.
const MAX_CLIENTS: usize = 32;
/// Streams of events at a time.
const MAX_STREAMS: usize = 32;

/// Gives all figures.
pub type Metrics = dyn Fn() -> String + Send + Sync;
/// Knows what the page shows.
pub type Source = dyn page::Source + Send + Sync;

/// What a listener has.
#[derive(Clone, Default)]
pub struct Content {
    /// What is at `/metrics`.
    pub metrics: Option<Arc<Metrics>>,
    /// What is at `/metrics/targets`, JSON.
    pub targets: Option<Arc<Metrics>>,
    /// What the page at [`PREFIX`] shows.
    pub page: Option<Arc<Source>>,
}

/// Gives what there is to whoever asks.
pub async fn serve(listener: TcpListener, content: Content) {
    let clients = Arc::new(Semaphore::new(MAX_CLIENTS));
    let streams = Arc::new(Semaphore::new(MAX_STREAMS));
    loop {
        let Ok(client) = clients.clone().acquire_owned().await else { return };
        let Ok((mut stream, peer)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let (content, streams) = (content.clone(), streams.clone());
        tokio::spawn(async move {
            let answered = timeout(PATIENCE, answer(&mut stream, peer.ip(), &content, &streams)).await;
            drop(client);
            if let (Ok(Ok(Some((events, _place)))), Some(source)) = (answered, &content.page) {
                send_events(stream, events, &**source).await;
            }
        });
    }
}

/// What is known of a request.
struct Asked {
    method: String,
    /// Without the query.
    path: String,
    host: Option<String>,
}

/// What is answered.
enum Reply {
    Whole(Plain),
    Events(Events, Headers),
}

struct Plain {
    status: u16,
    headers: Headers,
    body: Vec<u8>,
}

type Headers = Vec<(&'static str, String)>;

/// Answers one request. What follows is a stream of events, if it was for one.
async fn answer(
    stream: &mut TcpStream,
    peer: IpAddr,
    content: &Content,
    streams: &Arc<Semaphore>,
) -> io::Result<Option<(Events, OwnedSemaphorePermit)>> {
    let asked = read_head(stream).await?;
    let is_head = asked.as_ref().is_some_and(|asked| asked.method == "HEAD");
    let reply = asked.map(|asked| content.reply(&asked, peer));
    let plain = match reply.unwrap_or_else(|| Reply::Whole(Plain::text(400, "This is no request.\n"))) {
        Reply::Whole(plain) => plain,
        Reply::Events(events, headers) => match streams.clone().try_acquire_owned() {
            Ok(place) => {
                stream.write_all(head(200, &headers, None).as_bytes()).await?;
                return Ok(Some((events, place)));
            }
            Err(_) => Plain::text(503, "Too many look at this already.\n"),
        },
    };
    stream.write_all(head(plain.status, &plain.headers, Some(plain.body.len())).as_bytes()).await?;
    if !is_head {
        stream.write_all(&plain.body).await?;
    }
    stream.shutdown().await?;
    Ok(None)
}

/// `None` if it is no request.
async fn read_head(stream: &mut TcpStream) -> io::Result<Option<Asked>> {
    let mut bytes = Vec::new();
    loop {
        let mut piece = [0; 1024];
        let count = stream.read(&mut piece).await?;
        bytes.extend(piece.get(..count).unwrap_or_default());
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut request = httparse::Request::new(&mut headers);
        match request.parse(&bytes) {
            Ok(httparse::Status::Complete(_)) => return Ok(asked(&request)),
            Ok(httparse::Status::Partial) if count > 0 && bytes.len() < MAX_HEAD => {}
            _ => return Ok(None),
        }
    }
}

fn asked(request: &httparse::Request<'_, '_>) -> Option<Asked> {
    let mut hosts = request.headers.iter().filter(|header| header.name.eq_ignore_ascii_case("host"));
    let host = hosts.next();
    // RFC 9112, section 3.2.
    if hosts.next().is_some() {
        return None;
    }
    let path = request.path?;
    Some(Asked {
        method: request.method?.to_string(),
        path: path.split_once('?').map_or(path, |(path, _)| path).to_string(),
        host: host.map(|host| String::from_utf8_lossy(host.value).into_owned()),
    })
}

/// Method, path and host of a whole request.
#[cfg(any(test, feature = "fuzzing"))]
pub fn asked_for(head: &[u8]) -> Option<(String, String, Option<String>)> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    request.parse(head).ok().filter(httparse::Status::is_complete)?;
    asked(&request).map(|asked| (asked.method, asked.path, asked.host))
}

impl Content {
    fn reply(&self, asked: &Asked, peer: IpAddr) -> Reply {
        let Asked { method, path, host } = asked;
        if let Some(source) = &self.page {
            let request = page::Request { method, path, host: host.as_deref(), peer };
            if let Some(answer) = page::answer(&request, &**source) {
                return of_page(answer);
            }
        }
        Reply::Whole(match (method.as_str(), path.as_str()) {
            ("GET" | "HEAD", path) => self.beside_the_page(path),
            _ => Plain::text(405, "Ask with GET.\n").with("allow", "GET, HEAD"),
        })
    }

    fn beside_the_page(&self, path: &str) -> Plain {
        if let ("/metrics/targets", Some(targets)) = (path, &self.targets) {
            let content_type = "application/json".to_string();
            return Plain {
                status: 200,
                headers: vec![("content-type", content_type)],
                body: targets().into(),
            };
        }
        match (path, &self.metrics, &self.page) {
            ("/metrics", Some(metrics), _) => {
                let content_type = "text/plain; version=0.0.4; charset=utf-8".to_string();
                Plain { status: 200, headers: vec![("content-type", content_type)], body: metrics().into() }
            }
            ("/", _, Some(_)) => Plain::text(307, "").with("location", &format!("{PREFIX}/")),
            (_, Some(_), Some(_)) => Plain::text(404, &format!("Try {PREFIX}/ or /metrics.\n")),
            (_, None, Some(_)) => Plain::text(404, &format!("It is at {PREFIX}/.\n")),
            (_, _, None) => Plain::text(404, "It is at /metrics.\n"),
        }
    }
}

impl Plain {
    fn text(status: u16, text: &str) -> Plain {
        let content_type = ("content-type", "text/plain; charset=utf-8".to_string());
        Plain { status, headers: vec![content_type], body: text.into() }
    }

    fn with(mut self, name: &'static str, value: &str) -> Plain {
        self.headers.push((name, value.to_string()));
        self
    }
}

fn of_page(answer: Answer) -> Reply {
    let headers = answer.headers();
    match answer {
        Answer::Whole(Whole { status, body, .. }) => Reply::Whole(Plain { status, headers, body }),
        Answer::Events(events) => Reply::Events(events, headers),
    }
}

/// Without a length, the body ends with the connection.
fn head(status: u16, headers: &Headers, length: Option<usize>) -> String {
    let reason = match status {
        200 => "OK",
        307 => "Temporary Redirect",
        308 => "Permanent Redirect",
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        503 => "Service Unavailable",
        _ => "",
    };
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let length = length.map(|length| format!("content-length: {length}\r\n")).unwrap_or_default();
    format!("HTTP/1.1 {status} {reason}\r\n{headers}{length}connection: close\r\n\r\n")
}

/// Until the client goes, or does not take what there is.
async fn send_events(mut stream: TcpStream, events: Events, source: &Source) {
    let (mut reader, mut writer) = stream.split();
    tokio::select! {
        () = until_it_goes(&mut reader) => {}
        () = write_events(&mut writer, events, source) => {}
    }
}

async fn until_it_goes(reader: &mut (impl AsyncRead + Unpin)) {
    // There is nothing more that it could say.
    let _ = reader.read(&mut [0]).await;
}

async fn write_events(writer: &mut (impl AsyncWrite + Unpin), mut events: Events, source: &Source) {
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(piece) = events.next(source, Instant::now()) else { continue };
        if !matches!(timeout(PATIENCE, writer.write_all(piece.as_bytes())).await, Ok(Ok(()))) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Mutex;

    use page::{App, State};

    use super::*;

    /// A listener, and what its page shows.
    async fn listen(has_metrics: bool, has_page: bool) -> (SocketAddr, Arc<Mutex<State>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(State::default()));
        let shown = state.clone();
        let metrics: Arc<Metrics> = Arc::new(|| "flyrun_up 1\n".to_string());
        let page: Arc<Source> = Arc::new(move || shown.lock().unwrap().clone());
        let targets: Arc<Metrics> = Arc::new(|| "[]".to_string());
        let targets = has_metrics.then_some(targets);
        let content =
            Content { metrics: has_metrics.then_some(metrics), targets, page: has_page.then_some(page) };
        tokio::spawn(serve(listener, content));
        (address, state)
    }

    async fn connect(address: SocketAddr, request: &str) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        stream
    }

    /// The head of an answer, and its body.
    async fn ask(address: SocketAddr, request: &str) -> (String, String) {
        let mut answer = String::new();
        connect(address, request).await.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.to_string(), body.to_string())
    }

    async fn get(address: SocketAddr, path: &str) -> (String, String) {
        ask(address, &format!("GET {path} HTTP/1.1\r\nhost: {address}\r\n\r\n")).await
    }

    /// Reads a stream on until this has come.
    async fn read_until(stream: &mut TcpStream, text: &str) -> String {
        let mut read = Vec::new();
        while !String::from_utf8_lossy(&read).contains(text) {
            assert_ne!(stream.read_buf(&mut read).await.unwrap(), 0, "{text} did not come");
        }
        String::from_utf8(read).unwrap()
    }

    fn named(name: &str) -> State {
        State { apps: vec![App { name: name.to_string(), ..App::default() }], ..State::default() }
    }

    const EVENTS: &str = "GET /_flyrun/events HTTP/1.1\r\nhost: localhost\r\n\r\n";

    #[tokio::test]
    async fn metrics_are_at_their_place_and_nothing_else_is() {
        let (address, _) = listen(true, false).await;
        for (request, status, body) in [
            ("GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n", "200", "flyrun_up 1\n"),
            ("GET /metrics?name=up HTTP/1.1\r\nhost: x\r\n\r\n", "200", "flyrun_up 1\n"),
            ("GET /metrics/targets HTTP/1.1\r\nhost: x\r\n\r\n", "200", "[]"),
            ("HEAD /metrics HTTP/1.1\r\nhost: x\r\n\r\n", "200", ""),
            ("GET / HTTP/1.1\r\n\r\n", "404", "It is at /metrics.\n"),
            ("GET /_flyrun/ HTTP/1.1\r\nhost: localhost\r\n\r\n", "404", "It is at /metrics.\n"),
            ("POST /metrics HTTP/1.1\r\n\r\n", "405", "Ask with GET.\n"),
            ("\u{1}\r\n\r\n", "400", "This is no request.\n"),
            ("GET /metrics HTTP/1.1\r\nhost: x\r\nHost: y\r\n\r\n", "400", "This is no request.\n"),
        ] {
            let (head, told) = ask(address, request).await;
            assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{head}");
            assert_eq!(told, body);
        }
    }

    #[tokio::test]
    async fn the_page_is_at_its_place_with_or_without_metrics() {
        for has_metrics in [false, true] {
            let (address, state) = listen(has_metrics, true).await;
            *state.lock().unwrap() = named("web");
            let (head, html) = get(address, "/_flyrun/").await;
            assert!(head.starts_with("HTTP/1.1 200 OK\r\ncontent-type: text/html"), "{head}");
            assert!(head.contains("content-security-policy: default-src 'none'"), "{head}");
            assert!(head.contains(&format!("content-length: {}", html.len())), "{head}");
            assert!(html.contains("page.js"), "{html}");
            let (_, json) = get(address, "/_flyrun/state.json?now").await;
            assert_eq!(serde_json::from_str::<State>(&json).unwrap(), named("web"));
            let (head, _) = get(address, "/").await;
            assert!(head.contains("307 ") && head.contains("location: /_flyrun/\r\n"), "{head}");
            assert!(get(address, "/_flyrun").await.0.contains("308 "));
            for path in ["/other", "/_flyrun/other", "/_flyrunner"] {
                assert!(get(address, path).await.0.starts_with("HTTP/1.1 404 "), "{path}");
            }
            let (head, metrics) = get(address, "/metrics").await;
            assert_eq!((head.contains("200 OK"), metrics == "flyrun_up 1\n"), (has_metrics, has_metrics));
        }
    }

    #[tokio::test]
    async fn the_page_is_not_shown_by_another_name() {
        let (address, _) = listen(true, true).await;
        for host in ["host: evil.example\r\n", "host: 192.0.2.1\r\n", ""] {
            for path in ["/_flyrun/", "/_flyrun/state.json", "/_flyrun/events"] {
                let (head, _) = ask(address, &format!("GET {path} HTTP/1.1\r\n{host}\r\n")).await;
                assert!(head.starts_with("HTTP/1.1 403 "), "{host}{path}: {head}");
            }
        }
    }

    #[tokio::test]
    async fn a_stream_of_events_tells_what_changes() {
        let (address, state) = listen(false, true).await;
        *state.lock().unwrap() = named("before");
        let mut stream = connect(address, EVENTS).await;
        let first = read_until(&mut stream, "}\n\n").await;
        assert!(first.starts_with("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"), "{first}");
        assert!(!first.contains("content-length"), "{first}");
        assert!(first.contains("event: state\ndata: {") && first.contains("before"), "{first}");
        *state.lock().unwrap() = named("after");
        let next = read_until(&mut stream, "}\n\n").await;
        assert!(next.starts_with("event: state\ndata: {") && next.contains("after"), "{next}");
    }

    #[tokio::test]
    async fn streams_are_bounded_and_a_client_that_goes_makes_room() {
        let (address, _) = listen(true, true).await;
        let mut streams = Vec::new();
        for _ in 0..MAX_STREAMS {
            let mut stream = connect(address, EVENTS).await;
            read_until(&mut stream, "event: state").await;
            streams.push(stream);
        }
        let (head, _) = ask(address, EVENTS).await;
        assert!(head.starts_with("HTTP/1.1 503 "), "{head}");
        // They are in nobody else's way.
        assert_eq!(get(address, "/metrics").await.1, "flyrun_up 1\n");
        streams.pop();
        loop {
            let mut stream = connect(address, EVENTS).await;
            if read_until(&mut stream, "\r\n\r\n").await.starts_with("HTTP/1.1 200 ") {
                break;
            }
        }
    }
}
