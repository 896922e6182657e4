//! Against pebble, Let's Encrypt's own authority for tests, with a proxy that has no machines.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU8, Ordering::SeqCst};

use proxy::{Failure, Lease, Log as ProxyLog, Machines, Options, Proxy, Record, Refusal, Want};
use reqwest::tls::TlsInfo;
use tokio::net::TcpListener;

use super::*;

/// Where pebble looks for proofs.
const HTTP_PORT: u16 = 5002;
const TLS_PORT: u16 = 5001;
const NAME: &str = "shop.example.com";
const HTTP_SERVICE: &str = "[http_service]\n";
const TLS_ALONE: &str =
    "[[services]]\ninternal_port = 1\nports = [{ port = 443, handlers = ['tls', 'http'] }]\n";

/// An address of the loopback network that nobody else uses: ports are pebble's own there.
fn address() -> IpAddr {
    static NEXT: AtomicU8 = AtomicU8::new(2);
    let process = std::process::id().to_le_bytes();
    Ipv4Addr::new(127, process[0] | 128, process[1], NEXT.fetch_add(1, SeqCst)).into()
}

/// A program that ends with the test.
struct Program(Child);

impl Program {
    fn start(words: &[&str], log: &Path) -> Program {
        let [program, arguments @ ..] = words else { panic!("no program") };
        let log = std::fs::File::options().append(true).create(true).open(log).unwrap();
        let mut command = Command::new(program);
        command.args(arguments).env("PEBBLE_VA_NOSLEEP", "1").stdin(Stdio::null());
        let child = command.stdout(log.try_clone().unwrap()).stderr(log).spawn();
        Program(child.unwrap_or_else(|error| panic!("{program}: {error}; tests/setup installs it")))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Stage {
    address: IpAddr,
    directory: tempfile::TempDir,
    _names: Program,
    pebble: Option<Program>,
    proxy: Arc<Proxy<Nobody>>,
    keepers: Arc<Keepers>,
}

impl Stage {
    /// An authority whose certificates hold so long, and a proxy with nothing to serve.
    async fn new(seconds: u64) -> Stage {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (address, directory) = (address(), tempfile::tempdir().unwrap());
        let at = |name: &str| directory.path().join(name);
        let own = rcgen::generate_simple_self_signed(vec![address.to_string()]).unwrap();
        std::fs::write(at("pebble.pem"), own.cert.pem()).unwrap();
        std::fs::write(at("pebble.key"), own.signing_key.serialize_pem()).unwrap();
        let config = serde_json::json!({"pebble": {
            "listenAddress": format!("{address}:14000"), "managementListenAddress": format!("{address}:15000"),
            "certificate": at("pebble.pem"), "privateKey": at("pebble.key"),
            "httpPort": HTTP_PORT, "tlsPort": TLS_PORT, "certificateValidityPeriod": seconds,
        }});
        std::fs::write(at("pebble.json"), config.to_string()).unwrap();
        let text = |port: u16| format!("{address}:{port}");
        let (dns, management, here) = (text(8053), text(8055), address.to_string());
        let words = [
            "pebble-challtestsrv",
            "-defaultIPv4",
            &here,
            "-defaultIPv6",
            "",
            "-dns01",
            &dns,
            "-management",
            &management,
            "-http01",
            "",
            "-https01",
            "",
            "-tlsalpn01",
            "",
        ];
        let names = Program::start(&words, &at("log"));
        let proxy = Arc::new(Proxy::new(Arc::new(Nobody), Options::default(), Arc::new(Nobody)));
        let of_proxy = proxy.clone();
        let mut keepers = Keepers::new(
            at("root"),
            proxy.challenges(),
            Box::new(move || of_proxy.refresh_certificates()),
            Log::on_stderr(false).unwrap(),
        );
        keepers.pauses = Pauses { first: Duration::from_millis(100), longest: Duration::from_millis(500) };
        let mut stage =
            Stage { address, directory, _names: names, pebble: None, proxy, keepers: Arc::new(keepers) };
        stage.start_pebble().await;
        stage
    }

    /// One that knows nothing of what another before it did.
    async fn start_pebble(&mut self) {
        let config = self.directory.path().join("pebble.json").display().to_string();
        let dns = format!("{}:8053", self.address);
        let words = ["pebble", "-config", &config, "-dnsserver", &dns];
        self.pebble = Some(Program::start(&words, &self.directory.path().join("log")));
        eventually("pebble is there", async || self.root().await.is_some()).await;
    }

    /// The root of what it signs.
    async fn root(&self) -> Option<reqwest::Certificate> {
        let own = std::fs::read(self.directory.path().join("pebble.pem")).unwrap();
        let own = reqwest::Certificate::from_pem(&own).unwrap();
        let client = reqwest::Client::builder().no_proxy().tls_certs_only([own]).build().unwrap();
        let answer = client.get(format!("https://{}:15000/roots/0", self.address)).send().await.ok()?;
        reqwest::Certificate::from_pem(&answer.bytes().await.ok()?).ok()
    }

    fn site(&self, services: &str, names: &str) -> Site {
        let text = format!(
            "app = 'shop'\nbuild.image = 'i'\n{services}[flyrun]\nhostnames = [{names}]\n[flyrun.acme]\n\
             terms_of_service_agreed = true\ndirectory = 'https://{}:14000/dir'\nca = 'pebble.pem'\nemail = 'a@example.com'\n",
            self.address
        );
        let file =
            app::config::read("fly.toml", text.as_bytes()).unwrap_or_else(|refused| panic!("{refused}"));
        let mut app = file.app;
        app.certificates.extend(self.keepers.certificate(&app));
        Site { app: Arc::new(app), directory: self.directory.path().to_path_buf() }
    }

    /// Serves an app, as `Front` does.
    async fn serve(&self, services: &str, names: &str) -> Site {
        let site = self.site(services, names);
        self.proxy.serve(std::slice::from_ref(&site));
        for port in self.proxy.ports() {
            self.listen(port).await;
        }
        self.keepers.follow(std::slice::from_ref(&site));
        site
    }

    async fn listen(&self, port: u16) {
        let outside = if port == 80 { HTTP_PORT } else { TLS_PORT };
        self.proxy.listen(port, TcpListener::bind((self.address, outside)).await.unwrap()).unwrap();
    }

    /// The certificate that is shown for a name; `None` if a client that trusts the authority (or anybody) does not like it.
    async fn shown(&self, name: &str, trusts_all: bool) -> Option<Vec<u8>> {
        let client = reqwest::Client::builder().no_proxy().tls_info(true);
        let client = client.resolve(name, SocketAddr::new(self.address, TLS_PORT));
        let client = match trusts_all {
            true => client.tls_danger_accept_invalid_certs(true),
            false => client.tls_certs_only([self.root().await?]),
        };
        let answer = client.build().unwrap().get(format!("https://{name}:{TLS_PORT}/")).send().await.ok()?;
        // There are no machines.
        assert_eq!(answer.status(), 503);
        Some(answer.extensions().get::<TlsInfo>()?.peer_certificate()?.to_vec())
    }

    fn orders(&self, outcome: &str) -> u64 {
        let figures = self.keepers.figures();
        let name = format!("flyrun_acme_orders_total{{app=\"shop\",outcome=\"{outcome}\"}} ");
        figures
            .lines()
            .find_map(|line| line.strip_prefix(&name)?.parse().ok())
            .unwrap_or_else(|| panic!("{figures}"))
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
            eprintln!("--- pebble told:\n{log}");
        }
    }
}

/// No machines, and no log.
struct Nobody;

impl Machines for Nobody {
    async fn lease(&self, _: Want) -> std::result::Result<Lease, Refusal> {
        let (why, id) = ("there are no machines".to_string(), "0".to_string());
        Err(Refusal { not_found: false, why, id, retry_after: Duration::ZERO })
    }

    fn failed(&self, _: &Lease, _: Failure) {}
}

impl ProxyLog for Nobody {
    fn access(&self, _: &Record<'_>) {}

    fn trouble(&self, _: &str) {}
}

async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    for _ in 0..1200 {
        if is_so().await {
            return;
        }
        sleep(Duration::from_millis(50)).await;
    }
    panic!("it does not come true: {what}");
}

const DAYS_90: u64 = 90 * 86_400;

#[tokio::test(flavor = "multi_thread")]
async fn names_are_proved_over_http_and_the_certificate_is_shown() {
    let stage = Stage::new(DAYS_90).await;
    let forced = "[http_service]\nforce_https = true\n";
    let site = stage.serve(forced, "'shop.example.com', 'www.shop.example.com'").await;
    eventually("it is shown", async || stage.shown(NAME, false).await.is_some()).await;
    assert_eq!(stage.shown("www.shop.example.com", false).await, stage.shown(NAME, false).await);
    assert_eq!((stage.orders("issued"), stage.orders("failed")), (1, 0));
    let path = Path::new(&site.app.certificates[0].certificate);
    assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
    let line = format!("flyrun_certificate_expiry_seconds{{file=\"{}\"}} ", path.display());
    let figures = stage.proxy.figures();
    let left: f64 = figures.lines().find_map(|text| text.strip_prefix(&line)?.parse().ok()).unwrap();
    assert!(left > 89.0 * 86_400.0 && left <= DAYS_90 as f64, "{left}");
    // Whoever serves next has it, and orders none.
    stage.keepers.follow(&[]);
    stage.keepers.follow(std::slice::from_ref(&site));
    // A name more does not fit what there is.
    let more = stage.site(forced, "'shop.example.com', 'new.example.com'");
    assert!(stage.shown("new.example.com", false).await.is_none());
    stage.proxy.serve(std::slice::from_ref(&more));
    stage.keepers.follow(&[more]);
    eventually("the new name is shown", async || stage.shown("new.example.com", false).await.is_some()).await;
    assert_eq!((stage.orders("issued"), stage.orders("failed")), (1, 0));
    let accounts = std::fs::read_dir(path.parent().unwrap()).unwrap().flatten();
    assert_eq!(accounts.filter(|file| file.file_name().to_string_lossy().starts_with("account.")).count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_proved_over_tls_where_port_80_is_not_the_apps() {
    let stage = Stage::new(DAYS_90).await;
    stage.serve(TLS_ALONE, "'shop.example.com', 'www.shop.example.com'").await;
    eventually("it is shown", async || stage.shown(NAME, false).await.is_some()).await;
    assert_eq!((stage.orders("issued"), stage.orders("failed")), (1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_renewed_in_time() {
    let stage = Stage::new(12).await;
    stage.serve(HTTP_SERVICE, "'shop.example.com'").await;
    let mut seen: Vec<Vec<u8>> = Vec::new();
    eventually("three have been shown", async || {
        if let Some(shown) = stage.shown(NAME, false).await
            && !seen.contains(&shown)
        {
            seen.push(shown);
        }
        seen.len() == 3
    })
    .await;
    assert_eq!(stage.orders("failed"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_that_is_gone_changes_nothing_and_one_that_forgot_us_is_told_again() {
    let mut stage = Stage::new(3).await;
    stage.serve(HTTP_SERVICE, "'shop.example.com'").await;
    eventually("it is shown", async || stage.orders("issued") > 0).await;
    stage.pebble = None;
    eventually("orders fail", async || stage.orders("failed") > 1).await;
    let old = stage.shown(NAME, true).await;
    assert!(old.is_some(), "what there was is shown on");
    // It has no accounts and another root.
    stage.start_pebble().await;
    eventually("another is shown", async || {
        let shown = stage.shown(NAME, false).await;
        shown.is_some() && shown != old
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_proved_is_told_and_the_other_way_is_tried() {
    let stage = Stage::new(DAYS_90).await;
    let site = stage.site(HTTP_SERVICE, "'shop.example.com'");
    stage.proxy.serve(std::slice::from_ref(&site));
    stage.listen(443).await;
    // Nobody listens on port 80.
    let wish = Wish::of(&site).unwrap();
    assert_eq!(wish.ways, [AcmeWay::Http01, AcmeWay::TlsAlpn01]);
    let told = stage.keepers.order(&wish, 0).await.unwrap_err().to_string();
    assert!(told.contains("HTTP-01") && told.contains("shop.example.com: "), "{told}");
    assert!(stage.shown(NAME, true).await.is_none(), "there is none to show");
    let facts = stage.keepers.order(&wish, 1).await.unwrap();
    assert_eq!(facts.names, [NAME]);
    assert!(stage.shown(NAME, false).await.is_some());
    // An authority that is no authority, or that nobody knows.
    for (url, ca, words) in [
        (format!("https://{}:15000/roots/0", stage.address), Some("pebble.pem"), "no account at https://"),
        (wish.acme.directory.clone(), None, "certificate"),
        (wish.acme.directory.clone(), Some("missing.pem"), "ca: cannot read"),
        (format!("https://{}:1/dir", stage.address), None, "refused"),
    ] {
        let acme = Acme { directory: url, ca: ca.map(str::to_string), email: None };
        let told = stage.keepers.order(&Wish { acme, ..wish.clone() }, 1).await.unwrap_err().to_string();
        assert!(told.contains(words), "{words}: {told}");
    }
}
