//! Machines that are listeners of this test, and clients that write bytes.

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proxy::{
    Drained, Failure, Lease, Log, Machines, Opened, Options, Proxy, Record, Refusal, Site, Steer, Want,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Machines by app.
#[derive(Default)]
pub struct Fake {
    machines: Mutex<Vec<(String, Arc<Machine>)>>,
    pub wants: Mutex<Vec<Want>>,
    pub failures: Mutex<Vec<(String, Failure)>>,
    /// Leases wait until this is true, if it is there.
    pub gate: Mutex<Option<watch::Receiver<bool>>>,
    pub waiting: Arc<AtomicUsize>,
}

pub struct Machine {
    pub id: Arc<str>,
    pub address: IpAddr,
    pub opened: Arc<Opened>,
    life: Mutex<(u64, watch::Sender<bool>)>,
    pub leases: Arc<AtomicUsize>,
    pub most_leases: AtomicUsize,
}

impl Machine {
    /// This life is over, and the next begins.
    pub fn next_life(&self) {
        let mut life = self.life.lock().unwrap();
        life.1.send_replace(true);
        *life = (life.0 + 1, watch::channel(false).0);
    }
}

struct Count(Arc<AtomicUsize>);

impl Count {
    fn new(of: &Arc<AtomicUsize>) -> Count {
        of.fetch_add(1, SeqCst);
        Count(of.clone())
    }
}

impl Drop for Count {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

impl Fake {
    pub fn add(&self, app: &str, id: &str, address: IpAddr) -> Arc<Machine> {
        let machine = Arc::new(Machine {
            id: id.into(),
            address,
            opened: Arc::default(),
            life: Mutex::new((1, watch::channel(false).0)),
            leases: Arc::default(),
            most_leases: AtomicUsize::new(0),
        });
        self.machines.lock().unwrap().push((app.into(), machine.clone()));
        machine
    }
}

impl Machines for Fake {
    async fn lease(&self, want: Want) -> Result<Lease, Refusal> {
        self.wants.lock().unwrap().push(want.clone());
        let gate = self.gate.lock().unwrap().clone();
        if let Some(mut gate) = gate {
            let _waits = Count::new(&self.waiting);
            gate.wait_for(|open| *open).await.unwrap();
        }
        let machines: Vec<_> = {
            let machines = self.machines.lock().unwrap();
            machines.iter().filter(|(app, _)| *app == *want.app).map(|(_, machine)| machine.clone()).collect()
        };
        let named = |id: &String| machines.iter().find(|machine| *machine.id == **id);
        let any = || machines.iter().find(|machine| !want.not.contains(&machine.id));
        let machine = match &want.steer {
            Some(Steer::Force(id)) => named(id),
            Some(Steer::Prefer(id)) => named(id).or_else(any),
            None => any(),
        };
        let refusal = |not_found, why: &str| Refusal {
            not_found,
            why: why.into(),
            id: "log-1".into(),
            retry_after: Duration::from_millis(1500),
        };
        let Some(machine) = machine else {
            return Err(match &want.steer {
                Some(Steer::Force(_)) => refusal(true, "no such machine"),
                _ => refusal(false, "no machine can be had"),
            });
        };
        let life = machine.life.lock().unwrap();
        let count = Count::new(&machine.leases);
        machine.most_leases.fetch_max(machine.leases.load(SeqCst), SeqCst);
        Ok(Lease {
            instance: machine.id.clone(),
            life: life.0,
            address: machine.address,
            opened: machine.opened.clone(),
            over: life.1.subscribe(),
            held: Box::new(count),
        })
    }

    fn failed(&self, lease: &Lease, failure: Failure) {
        self.failures.lock().unwrap().push((lease.instance.to_string(), failure));
    }
}

/// What the log was told.
#[derive(Default)]
pub struct Told {
    pub lines: Mutex<Vec<String>>,
    pub troubles: Mutex<Vec<String>>,
}

impl Log for Told {
    fn access(&self, record: &Record<'_>) {
        let mut line = String::new();
        record.write_json(&mut line);
        self.lines.lock().unwrap().push(line);
    }

    fn trouble(&self, what: &str) {
        self.troubles.lock().unwrap().push(what.into());
    }
}

/// A proxy with one app, `shop`, and what it stands on.
pub struct Stage {
    pub fake: Arc<Fake>,
    pub told: Arc<Told>,
    pub proxy: Proxy<Fake>,
    /// Of the backend of a machine; others have the same port at other addresses.
    pub internal_port: u16,
    pub directory: tempfile::TempDir,
}

/// An address of the loopback network that no other test uses. Port numbers are shared by the machines of an app.
pub fn address() -> IpAddr {
    static NEXT: AtomicU8 = AtomicU8::new(2);
    static BLOCK: AtomicU8 = AtomicU8::new(1);
    let last = NEXT.fetch_add(1, SeqCst);
    if last == 250 {
        BLOCK.fetch_add(1, SeqCst);
    }
    // Tests are processes of their own under nextest.
    let process = std::process::id().to_le_bytes();
    IpAddr::V4(Ipv4Addr::new(127, process[0] | 1, process[1].wrapping_add(BLOCK.load(SeqCst)), last.max(2)))
}

/// Reads a fly.toml; PORT is replaced by the machines' port.
pub fn site(text: &str, internal_port: u16, directory: PathBuf) -> Site {
    let text = text.replace("PORT", &internal_port.to_string());
    let file = app::config::read("test.toml", text.as_bytes()).unwrap_or_else(|refused| panic!("{refused}"));
    Site { app: Arc::new(file.app), directory }
}

/// An app over HTTP with requests counted, and more lines at the end.
pub fn http_app(more: &str) -> String {
    format!(
        "app = 'shop'\n[build]\nimage = 'i'\n[http_service]\ninternal_port = PORT\n\
         [http_service.concurrency]\ntype = 'requests'\n{more}"
    )
}

impl Stage {
    /// Serves the app of a fly.toml with one machine, `m1`, whose connections `backend` gets.
    pub async fn new<F, A>(text: &str, backend: F) -> Stage
    where
        F: Fn(TcpStream) -> A + Send + Sync + 'static,
        A: Future<Output = ()> + Send + 'static,
    {
        Stage::with(text, Options::default(), backend).await
    }

    pub async fn with<F, A>(text: &str, options: Options, backend: F) -> Stage
    where
        F: Fn(TcpStream) -> A + Send + Sync + 'static,
        A: Future<Output = ()> + Send + 'static,
    {
        let at = address();
        let listener = TcpListener::bind((at, 0)).await.unwrap();
        let internal_port = listener.local_addr().unwrap().port();
        let (fake, told) = (Arc::new(Fake::default()), Arc::new(Told::default()));
        fake.add("shop", "m1", at);
        accept(listener, backend);
        let directory = tempfile::tempdir().unwrap();
        let proxy = Proxy::new(fake.clone(), options, told.clone());
        let stage = Stage { fake, told, proxy, internal_port, directory };
        stage.serve(&[text]);
        stage
    }

    /// Serves these apps from now on.
    pub fn serve(&self, texts: &[&str]) {
        let directory = self.directory.path();
        let sites: Vec<_> =
            texts.iter().map(|text| site(text, self.internal_port, directory.to_path_buf())).collect();
        assert_eq!(self.proxy.serve(&sites), Vec::<String>::new());
    }

    /// One more machine, with the same port.
    pub async fn machine<F, A>(&self, app: &str, id: &str, backend: F) -> Arc<Machine>
    where
        F: Fn(TcpStream) -> A + Send + Sync + 'static,
        A: Future<Output = ()> + Send + 'static,
    {
        loop {
            let at = address();
            if let Ok(listener) = TcpListener::bind((at, self.internal_port)).await {
                accept(listener, backend);
                return self.fake.add(app, id, at);
            }
        }
    }

    pub fn first(&self) -> Arc<Machine> {
        self.fake.machines.lock().unwrap()[0].1.clone()
    }

    /// A new listener for `port` of the apps.
    pub async fn listen(&self, port: u16) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        self.proxy.listen(port, listener).unwrap();
        address
    }

    pub async fn connect(&self, port: u16) -> Client {
        Client(TcpStream::connect(self.listen(port).await).await.unwrap())
    }

    /// The line of the log about the only request, which may come a moment after its answer.
    pub async fn line(&self) -> serde_json::Value {
        eventually(|| self.told.lines.lock().unwrap().first().cloned()).await.parse().unwrap()
    }

    pub async fn drain(&self) -> Drained {
        self.proxy.drain(Duration::from_secs(5)).await
    }
}

/// Waits until something is there.
pub async fn eventually<T>(mut what: impl FnMut() -> Option<T>) -> T {
    for _ in 0..2000 {
        if let Some(found) = what() {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("it does not come");
}

fn accept<F, A>(listener: TcpListener, backend: F)
where
    F: Fn(TcpStream) -> A + Send + Sync + 'static,
    A: Future<Output = ()> + Send + 'static,
{
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(backend(stream));
        }
    });
}

/// What a machine does with a connection.
type Talk = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A machine that answers each head with the same bytes, and remembers all that it reads.
pub fn canned(answer: &'static str) -> (Arc<Mutex<Vec<u8>>>, impl Fn(TcpStream) -> Talk) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = seen.clone();
    let backend = move |mut stream: TcpStream| -> Talk {
        let log = log.clone();
        Box::pin(async move {
            let mut pending = Vec::new();
            while let Some(head) = read_head(&mut stream, &mut pending).await {
                log.lock().unwrap().extend_from_slice(head.as_bytes());
                let mut body = vec![0; length(&head)];
                let ahead = pending.len().min(body.len());
                body[..ahead].copy_from_slice(&pending[..ahead]);
                pending.drain(..ahead);
                if stream.read_exact(&mut body[ahead..]).await.is_err() {
                    return;
                }
                log.lock().unwrap().extend_from_slice(&body);
                if stream.write_all(answer.as_bytes()).await.is_err() {
                    return;
                }
            }
        })
    };
    (seen, backend)
}

/// A head with its empty line, from `pending` and then the stream; `None` at the end.
pub async fn read_head(stream: &mut TcpStream, pending: &mut Vec<u8>) -> Option<String> {
    loop {
        if let Some(end) = pending.windows(4).position(|window| window == b"\r\n\r\n") {
            let head: Vec<u8> = pending.drain(..end + 4).collect();
            return Some(String::from_utf8_lossy(&head).into_owned());
        }
        let mut some = [0; 4096];
        match stream.read(&mut some).await {
            Ok(count @ 1..) => pending.extend_from_slice(&some[..count]),
            _ => return None,
        }
    }
}

/// `Content-Length` of a head, or 0.
pub fn length(head: &str) -> usize {
    field(head, "content-length").map_or(0, |value| value.parse().unwrap())
}

/// The value of a field of a head.
pub fn field<'h>(head: &'h str, name: &str) -> Option<&'h str> {
    head.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then_some(value.trim())
    })
}

/// A client that knows no HTTP but what it is told.
pub struct Client(pub TcpStream);

impl Client {
    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.write_all(bytes.as_ref()).await.unwrap();
    }

    /// An answer's head, and its body if that has a length.
    pub async fn answer(&mut self) -> (String, String) {
        let mut pending = Vec::new();
        let head = read_head(&mut self.0, &mut pending).await.expect("the connection ended before an answer");
        let mut body = vec![0; length(&head)];
        let ahead = pending.len();
        assert!(ahead <= body.len(), "more than an answer: {head} {:?}", String::from_utf8_lossy(&pending));
        body[..ahead].copy_from_slice(&pending);
        self.0.read_exact(&mut body[ahead..]).await.unwrap();
        (head, String::from_utf8(body).unwrap())
    }

    /// All that comes until the end.
    pub async fn rest(&mut self) -> String {
        let mut all = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(20), self.0.read_to_end(&mut all)).await;
        // A reset is an end too.
        let _ = read.expect("the connection does not end");
        String::from_utf8_lossy(&all).into_owned()
    }

    /// So many bytes.
    pub async fn exactly(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        let read = tokio::time::timeout(Duration::from_secs(20), self.0.read_exact(&mut bytes)).await;
        read.expect("nothing comes").unwrap();
        bytes
    }
}
