//! The questions to a machine that tell whether it can be given requests.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use app::config::model::{Asks, Check, Method};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::http_status::{MAX_HEAD, status_of};

/// The first pause between two questions to a machine that is coming up; each further one is a fifth as long again, so that one which
/// has come up waits for a sixth of the time that this took at most.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
/// The longest one, as long as the check's grace period lasts; and afterwards.
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
const LATE_PAUSE: Duration = Duration::from_secs(1);
const NO_HTTP: &str = "the answer is no HTTP";

/// A check of a service, or a named one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    pub port: u16,
    pub check: Check,
}

impl Probe {
    /// Asks once.
    ///
    /// # Errors
    /// What was wrong with the answer, in a few words.
    pub async fn ask(&self, address: IpAddr) -> Result<(), String> {
        self.connect(address).await.map(drop)
    }

    /// Asks once. The connection, if that it was made is all that was asked.
    async fn connect(&self, address: IpAddr) -> Result<Option<TcpStream>, String> {
        let told = || format!("port {}", self.port);
        match timeout(self.check.timeout, self.ask_patiently(address)).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(why)) => Err(format!("{}: {why}", told())),
            Err(_) => Err(format!("{}: no answer within {:?}", told(), self.check.timeout)),
        }
    }

    async fn ask_patiently(&self, address: IpAddr) -> Result<Option<TcpStream>, String> {
        let told = |error: std::io::Error| error.to_string();
        let mut stream = TcpStream::connect(SocketAddr::new(address, self.port)).await.map_err(told)?;
        let Asks::Http { method, path, headers } = &self.check.asks else { return Ok(Some(stream)) };
        let mut head = format!("{} {path} HTTP/1.1\r\n", word(*method));
        if !headers.contains_key("host") {
            head.push_str(&format!("host: {}\r\n", SocketAddr::new(address, self.port)));
        }
        if !headers.contains_key("user-agent") {
            head.push_str("user-agent: flyrun-check\r\n");
        }
        for (name, value) in headers.iter().filter(|(name, _)| *name != "connection") {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if matches!(method, Method::Post | Method::Put) {
            head.push_str("content-length: 0\r\n");
        }
        head.push_str("connection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).await.map_err(told)?;
        match status(&mut stream).await? {
            200..300 => Ok(None),
            status => Err(format!("{path} is answered with status {status}")),
        }
    }

    /// Asks until the answer is good. The last bad one is handed to `tell`. Gives the connection, if it has carried nothing.
    pub async fn wait(&self, address: IpAddr, tell: &(dyn Fn(String) + Sync)) -> Option<TcpStream> {
        let begun = Instant::now();
        let mut pause = FIRST_PAUSE;
        loop {
            match self.connect(address).await {
                Ok(stream) => return stream,
                Err(why) => tell(why),
            }
            sleep(pause).await;
            let longest = if begun.elapsed() < self.check.grace_period {
                LONGEST_PAUSE
            } else {
                self.check.interval.min(LATE_PAUSE).max(LONGEST_PAUSE)
            };
            pause = (pause * 6 / 5).min(longest);
        }
    }
}

/// Asks one after another until all answers are good. Gives the last one's connection, if it has carried nothing.
pub async fn pass(probes: &[Probe], address: IpAddr, tell: &(dyn Fn(String) + Sync)) -> Option<TcpStream> {
    let mut connected = None;
    for probe in probes {
        // Each is closed before the next is made: the machine may serve one after another.
        drop(connected.take());
        connected = probe.wait(address, tell).await;
    }
    connected
}

fn word(method: Method) -> &'static str {
    match method {
        Method::Get => "GET",
        Method::Head => "HEAD",
        Method::Options => "OPTIONS",
        Method::Post => "POST",
        Method::Put => "PUT",
    }
}

async fn status(stream: &mut TcpStream) -> Result<u16, String> {
    let mut head = Vec::new();
    let mut piece = [0; 2048];
    while head.len() < MAX_HEAD {
        let count = stream.read(&mut piece).await.map_err(|error| error.to_string())?;
        head.extend(piece.get(..count).unwrap_or_default());
        if let Some(status) = status_of(&head).map_err(|_| NO_HTTP)? {
            return Ok(status);
        }
        if count == 0 {
            return Err("the connection ends before there is an answer".to_string());
        }
    }
    Err(NO_HTTP.to_string())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use app::config::model::Service;
    use tokio::net::TcpListener;

    use super::*;

    const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    fn http(port: u16) -> Probe {
        let asks = Asks::Http { method: Method::Get, path: "/up".into(), headers: Default::default() };
        Probe { port, check: Check { asks, ..Service::default_check() } }
    }

    async fn answering(answer: &'static [u8]) -> (Probe, tokio::task::JoinHandle<String>) {
        let listener = TcpListener::bind((HERE, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let served = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 1000];
            let count = stream.read(&mut request).await.unwrap();
            stream.write_all(answer).await.unwrap();
            String::from_utf8_lossy(&request[..count]).into_owned()
        });
        (http(port), served)
    }

    #[tokio::test]
    async fn an_answer_of_2xx_is_good_and_all_others_are_told() {
        for (answer, expected) in [
            (&b"HTTP/1.1 204 No Content\r\n\r\n"[..], None),
            (b"HTTP/1.0 200\r\n\r\n", None),
            (b"HTTP/1.1 302 Found\r\nlocation: /\r\n\r\n", Some("status 302")),
            (b"HTTP/1.1 500 x\r\n\r\n", Some("status 500")),
            (b"SSH-2.0-x\r\n", Some("no HTTP")),
            (b"HTTP/1.1 200 OK\r\n", Some("ends before")),
        ] {
            let (probe, served) = answering(answer).await;
            let told = probe.ask(HERE).await;
            let request = served.await.unwrap();
            assert!(request.starts_with("GET /up HTTP/1.1\r\nhost: 127.0.0.1:"), "{request}");
            match expected {
                None => assert_eq!(told, Ok(())),
                Some(expected) => assert!(told.clone().unwrap_err().contains(expected), "{told:?}"),
            }
        }
    }

    async fn serve_one_after_another(listener: &TcpListener) {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            if stream.read(&mut [0; 1000]).await.unwrap() > 0 {
                stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
            }
        }
    }

    #[tokio::test]
    async fn a_machine_that_serves_one_connection_after_another_passes_several_checks() {
        let listener = TcpListener::bind((HERE, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let tcp = Probe { port, check: Service::default_check() };
        for (probes, is_left) in [([tcp.clone(), http(port)], false), ([http(port), tcp], true)] {
            let tell = |why: String| -> () { panic!("{why}") };
            let connected = tokio::select! {
                connected = pass(&probes, HERE, &tell) => connected,
                () = serve_one_after_another(&listener) => unreachable!(),
            };
            assert_eq!(connected.is_some(), is_left);
        }
    }

    #[tokio::test]
    async fn a_port_that_comes_up_is_noticed() {
        let free = TcpListener::bind((HERE, 0)).await.unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let probe = Probe { port, check: Service::default_check() };
        assert!(probe.ask(HERE).await.unwrap_err().starts_with(&format!("port {port}: ")));
        let told = std::sync::Mutex::new(0);
        let tell = |_| *told.lock().unwrap() += 1;
        let waits = probe.wait(HERE, &tell);
        let opens = async {
            sleep(Duration::from_millis(20)).await;
            TcpListener::bind((HERE, port)).await.unwrap()
        };
        let (stream, _listener) = tokio::join!(waits, opens);
        assert!(stream.is_some(), "nothing was said on it");
        assert!(*told.lock().unwrap() > 0);
    }
}
