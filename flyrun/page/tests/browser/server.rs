//! A server with the page and a state that the test changes.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use page::{Answer, Request, State, TICK, answer};

/// The page on a port of loopback, for as long as the test's process lives.
pub struct Server {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    is_cut: Arc<AtomicBool>,
}

impl Server {
    pub fn start(state: State) -> Server {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(state));
        let is_cut = Arc::new(AtomicBool::new(false));
        let (shown, cut) = (state.clone(), is_cut.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (shown, cut) = (shown.clone(), cut.clone());
                std::thread::spawn(move || serve(stream, &move || shown.lock().unwrap().clone(), &cut));
            }
        });
        Server { address, state, is_cut }
    }

    pub fn url(&self) -> String {
        format!("http://{}/_flyrun", self.address)
    }

    /// Ends the streams, and refuses new ones until this is undone.
    pub fn cut(&self, is_cut: bool) {
        self.is_cut.store(is_cut, Ordering::Relaxed);
    }

    pub fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }
}

/// One request. A browser that leaves ends it.
fn serve(mut stream: TcpStream, source: &dyn Fn() -> State, is_cut: &AtomicBool) -> Option<()> {
    let peer = stream.peer_addr().ok()?.ip();
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    let first = lines.next()?.ok()?;
    let mut words = first.split(' ');
    let (method, path) = (words.next()?, words.next()?);
    let mut host = None;
    for line in lines.by_ref().map_while(Result::ok).take_while(|line| !line.is_empty()) {
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("host")
        {
            host = Some(value.trim().to_string());
        }
    }
    let request = Request { method, path, host: host.as_deref(), peer };
    let Some(answer) = answer(&request, &source) else {
        return stream.write_all(b"HTTP/1.1 404 Not Found\r\nconnection: close\r\n\r\n").ok();
    };
    if is_cut.load(Ordering::Relaxed) {
        return stream.write_all(b"HTTP/1.1 503 Gone\r\nconnection: close\r\n\r\n").ok();
    }
    let mut head = format!("HTTP/1.1 {} x\r\nconnection: close\r\n", answer.status());
    for (name, value) in answer.headers() {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    stream.write_all(format!("{head}\r\n").as_bytes()).ok()?;
    match answer {
        Answer::Whole(whole) => stream.write_all(&whole.body).ok(),
        Answer::Events(mut events) => loop {
            if is_cut.load(Ordering::Relaxed) {
                return Some(());
            }
            if let Some(chunk) = events.next(&source, Instant::now()) {
                stream.write_all(chunk.as_bytes()).ok()?;
            }
            std::thread::sleep(TICK);
        },
    }
}
