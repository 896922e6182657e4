//! An app, resolved: every default of fly.toml is filled in, and an `Option` means that there may be none.
//!
//! Each item names its key in fly.toml. The values are checked: nothing here contradicts anything else.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use ipnet::IpNet;

use super::{Bytes, Hostname};

/// One app: groups of equal machines behind services.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct App {
    /// `app`: lower-case letters, digits and dashes, at most 63.
    pub name: String,
    /// `primary_region`: a label, which guests see as PRIMARY_REGION and FLY_REGION.
    pub primary_region: String,
    /// `[build] image`: what `flyrun run` takes. Not checked here.
    pub image: String,
    /// `kill_signal`: asks a machine's process to end.
    pub kill_signal: Signal,
    /// `kill_timeout`: how long it has until it is killed.
    pub kill_timeout: Duration,
    /// `[deploy]`.
    pub deploy: Deploy,
    /// `[env]`: no name begins with FLY_.
    pub env: BTreeMap<String, String>,
    /// `[processes]`: the groups of machines, at least one. Without the table it is `app`.
    pub groups: BTreeMap<String, Group>,
    /// `[http_service]`, written out as the service that it stands for, then each of `[[services]]`.
    pub services: Vec<Service>,
    /// `[checks]`: they tell whether machines do their work, and keep no request away. In a deploy they must pass.
    pub checks: BTreeMap<String, NamedCheck>,
    /// `[flyrun] hostnames`: requests for these names go to this app.
    pub hostnames: Vec<Hostname>,
    /// `[[flyrun.tls]]`: what the handler `tls` shows; the client's SNI selects.
    pub certificates: Vec<Certificate>,
    /// `[flyrun.acme]`: a certificate for the host names, which is ordered and renewed.
    pub acme: Option<Acme>,
    /// `[flyrun] trusted_proxies`: whoever connects from there is believed to be a proxy.
    pub trusted_proxies: Vec<IpNet>,
    /// `[flyrun] accept_proxy_protocol`: connections from there begin with the header of the PROXY protocol.
    pub accept_proxy_protocol: bool,
    /// `[flyrun] body_timeout`: a client has so long to send a request's body.
    pub body_timeout: Option<Duration>,
    /// `[flyrun] total_timeout`: a request, from its head to the end of its answer, has so long.
    pub total_timeout: Option<Duration>,
    /// `[flyrun] idle_timeout`: a machine without requests is stopped or suspended after so long.
    pub idle_timeout: Duration,
    /// `[flyrun] start_timeout`: a machine that is not ready so long after its start has failed.
    pub start_timeout: Duration,
    /// `[flyrun] queue_timeout`: a request waits so long for a machine, then gets 503.
    pub queue_timeout: Duration,
    /// `[flyrun] queue_limit`: so many requests may wait in each group; one more gets 503.
    pub queue_limit: u32,
    /// `[flyrun] max_machines`: the most machines of each group.
    pub max_machines: u32,
}

/// `[processes]`: machines that run the same command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// The words that replace the image's command; none leave it.
    pub command: Vec<String>,
    /// `[[vm]]`.
    pub vm: Vm,
    /// `[[restart]]`.
    pub restart: Restart,
    /// `[[mounts]]`, by destination: with any the group has one machine.
    pub mounts: Vec<Mount>,
    /// `[[files]]`, by path.
    pub files: Vec<GuestFile>,
    /// `[[metrics]]`: where machines tell Prometheus about themselves.
    pub metrics: Option<Metrics>,
}

/// `kill_signal`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Signal {
    Int,
    Term,
    Quit,
    Usr1,
    Usr2,
    Kill,
    Stop,
}

impl Signal {
    /// The number on x86-64.
    pub fn number(self) -> i32 {
        match self {
            Signal::Int => 2,
            Signal::Quit => 3,
            Signal::Kill => 9,
            Signal::Usr1 => 10,
            Signal::Usr2 => 12,
            Signal::Term => 15,
            Signal::Stop => 19,
        }
    }
}

/// `[deploy]`: how a new version takes the old one's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deploy {
    /// `strategy`.
    pub strategy: Strategy,
    /// `wait_timeout`: a new machine that is not healthy after so long ends the deploy.
    pub wait_timeout: Duration,
    /// `release_command`: runs once before any machine is replaced, in the image and with its entrypoint.
    pub release_command: Option<Vec<String>>,
    /// `release_command_timeout`.
    pub release_command_timeout: Duration,
}

/// `[deploy] strategy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// One machine after another.
    Rolling,
    /// All new ones beside all old ones; requests move when they are healthy.
    Bluegreen,
}

/// What listens on ports of the host, and is answered by machines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// `processes`: the groups whose machines answer, at least one.
    pub groups: Vec<String>,
    /// `internal_port`: where the process listens in its machine.
    pub internal_port: u16,
    /// `ports`: at least one. No two of an app overlap; all services together have at most 1024.
    pub ports: Vec<Port>,
    /// `concurrency`.
    pub concurrency: Concurrency,
    /// `auto_stop_machines`: what happens to machines without requests. The same in all services of a group.
    pub auto_stop: AutoStop,
    /// `auto_start_machines`: a request starts a machine. The same in all services of a group.
    pub auto_start: bool,
    /// `min_machines_running`: so many are left running, at most [`App::max_machines`]. The same in all services of a group.
    pub min_machines_running: u32,
    /// `tcp_checks`, then `http_checks` (in `[http_service]`: `checks`). A machine gets requests while all pass. If the file
    /// has none, there is one here: the port accepts a connection.
    pub checks: Vec<Check>,
}

/// `[[services.ports]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// `port`, or `start_port` to `end_port`.
    pub numbers: RangeInclusive<u16>,
    /// The handler `tls`: clients speak TLS, which ends here.
    pub tls: Option<Tls>,
    /// The other handlers.
    pub carries: Carries,
}

/// What goes from a port to machines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Carries {
    /// The handler `http`: requests.
    Http(Http),
    /// No such handler: bytes.
    Tcp {
        /// The handler `proxy_proto`: each connection begins with a header that tells the client's address.
        proxy_protocol: Option<ProxyProtocol>,
    },
}

/// `tls_options`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// `alpn`: the protocols that are offered, the preferred one first.
    pub alpn: Vec<String>,
    /// `versions`: at least one.
    pub versions: Vec<TlsVersion>,
}

/// `tls_options.versions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum TlsVersion {
    V1_2,
    V1_3,
}

/// `proxy_proto_options.version`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum ProxyProtocol {
    V1,
    V2,
}

/// `http_options`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Http {
    /// `force_https` beside the handlers: requests are answered with a redirect to https.
    pub force_https: bool,
    /// `h2_backend`: machines are spoken to in HTTP/2 without TLS, not in HTTP/1.1.
    pub h2_backend: bool,
    /// `idle_timeout`: a connection on which nothing moves is closed after so long.
    pub idle_timeout: Duration,
    /// `headers_read_timeout`: a client has so long to send a request's header.
    pub headers_read_timeout: Duration,
    /// `response.pristine`: answers get no header of the proxy's own.
    pub pristine: bool,
    /// `response.headers`: by name in lower case.
    pub response_headers: BTreeMap<String, HeaderRule>,
}

/// What is done to a header of each answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HeaderRule {
    /// `false`: it is taken away.
    Remove,
    /// A text or several: they take the place of what the machine sent. Never empty.
    Set(Vec<String>),
}

/// `concurrency`: what one machine is given at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Concurrency {
    /// `type`: what is counted.
    pub by: Load,
    /// `soft_limit`: with so many a machine is full while another is not; at most the hard limit.
    pub soft_limit: u32,
    /// `hard_limit`: it is never given more.
    pub hard_limit: Option<u32>,
}

/// `concurrency.type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Load {
    Connections,
    Requests,
}

/// `auto_stop_machines`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AutoStop {
    /// `off`, or `false`: they go on running.
    Off,
    /// `stop`, or `true`.
    Stop,
    /// `suspend`.
    Suspend,
}

/// A question to a machine, asked again and again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// `interval`: from one to the next.
    pub interval: Duration,
    /// `timeout`: what takes longer has failed.
    pub timeout: Duration,
    /// `grace_period`: the first one comes so long after the start.
    pub grace_period: Duration,
    /// What is asked.
    pub asks: Asks,
}

/// What a check asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asks {
    /// The port accepts a connection.
    Tcp,
    /// A request is answered with 2xx; redirects are not followed.
    Http {
        /// `method`.
        method: Method,
        /// `path`: begins with a slash, printable ASCII without spaces.
        path: String,
        /// `headers`: by name in lower case.
        headers: BTreeMap<String, String>,
    },
}

/// `method` of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Method {
    Get,
    Head,
    Options,
    Post,
    Put,
}

/// `[checks.NAME]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedCheck {
    /// `processes`: the groups whose machines are asked, at least one.
    pub groups: Vec<String>,
    /// `port`: in the machine.
    pub port: u16,
    /// The rest.
    pub check: Check,
}

/// `[[vm]]`: what a machine is given. `size` is resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vm {
    /// `cpu_kind`.
    pub cpu_kind: CpuKind,
    /// `cpus`: 1 to 32.
    pub cpus: u8,
    /// `memory`, or `memory_mb`: whole MiB.
    pub memory: Bytes,
}

/// `[[vm]] cpu_kind`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuKind {
    /// Machines share the host's processors.
    Shared,
    /// A machine has its processors' whole time.
    Performance,
}

/// `[[restart]]`: what follows when a machine's process ends by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restart {
    /// `policy = "never"`.
    Never,
    /// `policy = "on-failure"`.
    OnFailure {
        /// `retries`: as often at most.
        retries: u32,
    },
    /// `policy = "always"`.
    Always,
}

/// `[[mounts]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// `source`: a volume's name.
    pub source: String,
    /// `destination`: an absolute path below the root, without `..` and without a slash at the end.
    pub destination: String,
    /// `initial_size`: the volume's, if it is made; whole MiB.
    pub initial_size: Bytes,
}

/// `[[files]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestFile {
    /// `guest_path`: absolute, below the root, without `..`.
    pub guest_path: String,
    /// What it contains.
    pub content: Content,
}

/// The content of a file in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// `raw_value`: this text.
    Text(String),
    /// `local_path`: a file of the host, below the directory of fly.toml unless absolute.
    HostFile(String),
    /// `secret_name`: a secret, which is base64.
    Secret(String),
}

/// `[[metrics]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metrics {
    /// `port`: in the machine.
    pub port: u16,
    /// `path`: begins with a slash.
    pub path: String,
}

/// `[[flyrun.tls]]`: PEM files of the host, below the directory of fly.toml unless absolute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// `certificate`: the chain, the server's own first.
    pub certificate: String,
    /// `key`.
    pub key: String,
}

/// `[flyrun.acme]`: who gives certificates (RFC 8555).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acme {
    /// `directory`: the URL by which the authority is known.
    pub directory: String,
    /// `email`: what the authority may write to.
    pub email: Option<String>,
    /// `ca`: a PEM file of the host with the root that the directory's own certificate has, where the host knows none. Below
    /// the directory of fly.toml unless absolute.
    pub ca: Option<String>,
}

impl Acme {
    /// Let's Encrypt.
    pub const DEFAULT_DIRECTORY: &str = "https://acme-v02.api.letsencrypt.org/directory";
}

/// How it is proved that a host name leads here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AcmeWay {
    /// By a document on port 80 (RFC 8555, section 8.3).
    Http01,
    /// By a certificate on port 443 (RFC 8737).
    TlsAlpn01,
}

impl App {
    /// Whether there is something to show to clients that speak TLS.
    pub fn has_certificate(&self) -> bool {
        !self.certificates.is_empty() || self.acme.is_some()
    }

    /// The host names that a certificate can be ordered for: proof for a wildcard takes a record in the DNS.
    pub fn acme_names(&self) -> Vec<&str> {
        let names = self.hostnames.iter().filter_map(|name| match name {
            Hostname::Exact(name) => Some(name.as_str()),
            Hostname::Below(_) | Hostname::Any => None,
        });
        names.collect()
    }

    /// How an authority can be shown that the host names lead here.
    pub fn acme_ways(&self) -> Vec<AcmeWay> {
        let ports = || self.services.iter().flat_map(|service| &service.ports);
        let is_http = |port: &Port| port.tls.is_none() && matches!(port.carries, Carries::Http(_));
        let http = ports().any(|port| port.numbers.contains(&80) && is_http(port));
        let tls = ports().any(|port| port.numbers.contains(&443) && port.tls.is_some());
        [(http, AcmeWay::Http01), (tls, AcmeWay::TlsAlpn01)]
            .into_iter()
            .filter_map(|(has, way)| has.then_some(way))
            .collect()
    }
}

impl Service {
    /// The check of a service whose file has none.
    pub fn default_check() -> Check {
        Check {
            interval: Duration::from_secs(15),
            timeout: Duration::from_secs(2),
            grace_period: Duration::from_secs(1),
            asks: Asks::Tcp,
        }
    }
}
