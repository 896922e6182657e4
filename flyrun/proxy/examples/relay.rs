//! Serves an app whose one machine is an address that answers already: to try the proxy, and to measure it beside others.
//!
//! `cargo run --release -p proxy --example relay -- app.toml 127.0.0.1 [ACCESS_LOG]`
//!
//! One thread, as there is one in each of the proxies that it is compared with.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "an example that cannot go on panics"
)]

use std::fs::File;
use std::io::Write as _;
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proxy::{Failure, Lease, Log, Machines, Options, Proxy, Record, Refusal, Site, Want};
use tokio::net::TcpListener;
use tokio::sync::watch;

struct Fixed {
    instance: Arc<str>,
    address: IpAddr,
    life: watch::Sender<bool>,
}

impl Machines for Fixed {
    async fn lease(&self, _: Want) -> Result<Lease, Refusal> {
        let (instance, over) = (self.instance.clone(), self.life.subscribe());
        Ok(Lease {
            instance,
            life: 1,
            address: self.address,
            opened: Default::default(),
            over,
            held: Box::new(()),
        })
    }

    fn failed(&self, lease: &Lease, failure: Failure) {
        eprintln!("relay: {} failed: {failure:?}", lease.instance);
    }
}

/// Lines in a file, written when there are many.
struct Lines(Option<Mutex<(File, String)>>);

impl Log for Lines {
    fn access(&self, record: &Record<'_>) {
        let Some(lines) = &self.0 else { return };
        let (file, text) = &mut *lines.lock().unwrap();
        record.write_json(text);
        if text.len() > 32 << 10 {
            file.write_all(text.as_bytes()).unwrap();
            text.clear();
        }
    }

    fn trouble(&self, what: &str) {
        eprintln!("relay: {what}");
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let args: Vec<String> = std::env::args().collect();
    let [_, path, address, rest @ ..] = &args[..] else {
        panic!("usage: relay app.toml ADDRESS [ACCESS_LOG]")
    };
    let text = std::fs::read(path).expect("the file of the app can be read");
    let file = app::config::read(path, &text).unwrap_or_else(|refused| panic!("{refused}"));
    let machines = Fixed {
        instance: "fixed".into(),
        address: address.parse().expect("an address"),
        life: watch::channel(false).0,
    };
    let log = Lines(rest.first().map(|path| Mutex::new((File::create(path).unwrap(), String::new()))));
    let proxy = Proxy::new(Arc::new(machines), Options::default(), Arc::new(log));
    let directory = Path::new(path).parent().unwrap().to_path_buf();
    for problem in proxy.serve(&[Site { app: Arc::new(file.app), directory }]) {
        eprintln!("relay: {problem}");
    }
    for port in proxy.ports() {
        proxy.listen(port, TcpListener::bind(("127.0.0.1", port)).await.unwrap()).unwrap();
    }
    tokio::signal::ctrl_c().await.unwrap();
    let drained = proxy.drain(Duration::from_secs(5)).await;
    eprint!("{}", proxy.metrics().render());
    eprintln!("relay: {drained:?}");
}
