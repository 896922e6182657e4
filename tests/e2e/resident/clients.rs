//! Clients of the guest's nginx that keep their connections. A connection may be broken by a suspend; none may hang.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle, sleep};
use std::time::{Duration, Instant};

/// Who waits so long for an answer hangs, whatever the machine is busy with.
pub const HANGS: Duration = Duration::from_secs(300);
const COUNT: usize = 3;
const PAUSE: Duration = Duration::from_millis(50);
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: resident\r\n\r\n";

/// Several clients, each a thread.
pub struct Clients {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    address: Mutex<String>,
    is_ending: AtomicBool,
    answered: [AtomicU64; COUNT],
    broken: AtomicU64,
    hung: Mutex<Vec<String>>,
}

impl Clients {
    /// Begins to ask the nginx at this address.
    pub fn start(address: String) -> Clients {
        let shared = Arc::new(Shared {
            address: Mutex::new(address),
            is_ending: AtomicBool::new(false),
            answered: Default::default(),
            broken: AtomicU64::new(0),
            hung: Mutex::new(Vec::new()),
        });
        let client = |number| {
            let shared = shared.clone();
            thread::spawn(move || shared.run(number))
        };
        let threads = (0..COUNT).map(client).collect();
        Clients { shared, threads }
    }

    /// New connections go to this address.
    pub fn move_to(&self, address: String) {
        *self.shared.address.lock().unwrap() = address;
    }

    /// Waits until each client has been answered again.
    pub fn wait_for_answers(&self) {
        let counts = || self.shared.answered.each_ref().map(|count| count.load(Ordering::Relaxed));
        let (before, began) = (counts(), Instant::now());
        while counts().iter().zip(&before).any(|(now, before)| now == before) {
            assert!(
                began.elapsed() < 2 * HANGS,
                "a client is not answered any more: {:?}",
                self.shared.hung()
            );
            sleep(PAUSE);
        }
        assert!(self.shared.hung().is_empty(), "{:?}", self.shared.hung());
    }

    /// Ends all clients, and says how they fared.
    pub fn end(self) -> String {
        self.shared.is_ending.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert!(self.shared.hung().is_empty(), "{:?}", self.shared.hung());
        let answered: u64 = self.shared.answered.iter().map(|count| count.load(Ordering::Relaxed)).sum();
        let broken = self.shared.broken.load(Ordering::Relaxed);
        format!("nginx has answered {answered} requests; {broken} connections were broken, none hung")
    }
}

impl Shared {
    fn hung(&self) -> Vec<String> {
        self.hung.lock().unwrap().clone()
    }

    fn run(&self, number: usize) {
        while !self.is_ending.load(Ordering::Relaxed) {
            let address = self.address.lock().unwrap().clone();
            let result = self.stay_connected(number, &address);
            self.broken.fetch_add(1, Ordering::Relaxed);
            if let Err(error) = result
                && matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
                && *self.address.lock().unwrap() == address
            {
                self.hung.lock().unwrap().push(format!("client {number} of {address}: {error}"));
            }
            sleep(PAUSE);
        }
    }

    fn stay_connected(&self, number: usize, address: &str) -> io::Result<()> {
        let stream = TcpStream::connect((address, 80))?;
        stream.set_read_timeout(Some(HANGS))?;
        let mut stream = BufReader::new(stream);
        while !self.is_ending.load(Ordering::Relaxed) {
            stream.get_mut().write_all(REQUEST)?;
            read_answer(&mut stream)?;
            self.answered[number].fetch_add(1, Ordering::Relaxed);
            sleep(PAUSE);
        }
        Ok(())
    }
}

/// A whole response; one that ends early or is none is an error.
fn read_answer(stream: &mut BufReader<TcpStream>) -> io::Result<()> {
    let mut length = None;
    let mut line = String::new();
    loop {
        line.clear();
        if stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().ok();
        }
        if line == "\r\n" {
            break;
        }
    }
    let mut body = vec![0; length.unwrap_or(0)];
    stream.read_exact(&mut body)?;
    assert_eq!(String::from_utf8_lossy(&body), "alive\n", "nginx answers something else");
    Ok(())
}
