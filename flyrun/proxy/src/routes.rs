//! Which app a client means. What is served is replaced as a whole; whoever has a route keeps it to the end.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use app::config::Hostname;
use app::config::model::{App, Carries, Http, Load, Port, ProxyProtocol};
use http::{HeaderName, HeaderValue};
use ipnet::IpNet;

use crate::fields;
use crate::metrics::{AppMetrics, Metrics};
use crate::tls::Offer;

/// All that is served.
#[derive(Default)]
pub(crate) struct Routes {
    ports: HashMap<u16, PortRoutes>,
    apps: HashMap<String, Vec<Arc<Route>>>,
}

/// What answers on a port.
#[derive(Default)]
pub(crate) struct PortRoutes {
    exact: HashMap<String, Arc<Route>>,
    /// Longest first.
    below: Vec<(Hostname, Arc<Route>)>,
    any: Option<Arc<Route>>,
    /// Whose connections begin with the header of the PROXY protocol.
    header_from: Vec<IpNet>,
    /// One of them, as all agree about TLS and what is carried.
    first: Option<Arc<Route>>,
}

/// A port of an app.
pub(crate) struct Route {
    pub name: Arc<str>,
    pub service: usize,
    pub internal_port: u16,
    pub by: Load,
    pub carries: Carries,
    /// Clients speak TLS.
    pub is_tls: bool,
    /// What is shown to them; `None` if there is nothing to show.
    pub tls: Option<Arc<Offer>>,
    pub region: HeaderValue,
    pub rules: Vec<(HeaderName, Vec<HeaderValue>)>,
    /// Where `force_https` sends clients.
    pub https_port: Option<u16>,
    pub trusted_proxies: Vec<IpNet>,
    pub body_timeout: Option<Duration>,
    pub total_timeout: Option<Duration>,
    pub metrics: Arc<AppMetrics>,
    first_number: u16,
    last_number: u16,
}

impl Route {
    /// `http_options`, for requests.
    pub fn http(&self) -> Option<&Http> {
        match &self.carries {
            Carries::Http(http) => Some(http),
            Carries::Tcp { .. } => None,
        }
    }

    /// The header that begins each connection of bytes.
    pub fn proxy_protocol(&self) -> Option<ProxyProtocol> {
        match &self.carries {
            Carries::Http(_) => None,
            Carries::Tcp { proxy_protocol } => *proxy_protocol,
        }
    }
}

impl Routes {
    /// `offer` finds what an app's port shows to clients that speak TLS.
    pub fn new(
        apps: &[Arc<App>],
        metrics: &Metrics,
        mut offer: impl FnMut(&App, &Port) -> Option<Arc<Offer>>,
    ) -> Routes {
        let mut routes = Routes::default();
        for app in apps {
            let name: Arc<str> = app.name.as_str().into();
            let app_metrics = metrics.app(&name, &app.primary_region);
            let https_port = https_port(app);
            for (service, port) in app
                .services
                .iter()
                .enumerate()
                .flat_map(|(index, one)| one.ports.iter().map(move |port| (index, port)))
            {
                let Some(of) = app.services.get(service) else { continue };
                let route = Arc::new(Route {
                    name: name.clone(),
                    service,
                    internal_port: of.internal_port,
                    by: of.concurrency.by,
                    carries: port.carries.clone(),
                    is_tls: port.tls.is_some(),
                    tls: offer(app, port),
                    region: HeaderValue::from_str(&app.primary_region)
                        .unwrap_or(HeaderValue::from_static("local")),
                    rules: match &port.carries {
                        Carries::Http(http) => fields::rules(&http.response_headers),
                        Carries::Tcp { .. } => Vec::new(),
                    },
                    https_port,
                    trusted_proxies: app.trusted_proxies.clone(),
                    body_timeout: app.body_timeout,
                    total_timeout: app.total_timeout,
                    metrics: app_metrics.clone(),
                    first_number: *port.numbers.start(),
                    last_number: *port.numbers.end(),
                });
                for number in port.numbers.clone() {
                    let of_port = routes.ports.entry(number).or_default();
                    of_port.add(&app.hostnames, &route);
                    if app.accept_proxy_protocol {
                        of_port.header_from.clone_from(&app.trusted_proxies);
                    }
                }
                routes.apps.entry(app.name.clone()).or_default().push(route);
            }
        }
        for port in routes.ports.values_mut() {
            port.below.sort_by_key(|(name, _)| std::cmp::Reverse(name.to_string().len()));
        }
        routes
    }

    /// What answers on a port; `None` if nothing does.
    pub fn port(&self, number: u16) -> Option<&PortRoutes> {
        self.ports.get(&number)
    }

    /// Every port that something answers on.
    pub fn numbers(&self) -> impl Iterator<Item = u16> {
        self.ports.keys().copied()
    }

    /// Where a request for an app goes that was replayed to it: the same port if it has that, else its first for requests.
    pub fn of_app(&self, app: &str, port: u16) -> Option<&Arc<Route>> {
        let routes = || self.apps.get(app).into_iter().flatten().filter(|route| route.http().is_some());
        let same = |route: &&Arc<Route>| (route.first_number..=route.last_number).contains(&port);
        routes().find(same).or_else(|| routes().next())
    }
}

impl PortRoutes {
    fn add(&mut self, hostnames: &[Hostname], route: &Arc<Route>) {
        self.first.get_or_insert_with(|| route.clone());
        for hostname in hostnames {
            match hostname {
                Hostname::Exact(name) => {
                    self.exact.insert(name.clone(), route.clone());
                }
                Hostname::Below(_) => self.below.push((hostname.clone(), route.clone())),
                Hostname::Any => self.any = Some(route.clone()),
            }
        }
    }

    /// Whether the PROXY protocol's header comes first, from whoever connects from this address.
    pub fn begins_with_a_header(&self, peer: IpAddr) -> bool {
        let peer = peer.to_canonical();
        self.header_from.iter().any(|range| range.contains(&peer))
    }

    /// Any of the routes: all agree about TLS and what is carried.
    pub fn first(&self) -> Option<&Arc<Route>> {
        self.first.as_ref()
    }

    /// The app that has this name closest; a name without port, in any case, perhaps with a dot at the end.
    pub fn find(&self, host: &[u8]) -> Option<&Arc<Route>> {
        if self.exact.is_empty() && self.below.is_empty() {
            return self.any.as_ref();
        }
        let mut space = [0; 256];
        let name = lower(host, &mut space).unwrap_or_default();
        let below = || self.below.iter().find(|(below, _)| below.fit(name).is_some()).map(|(_, route)| route);
        self.exact.get(name).or_else(below).or(self.any.as_ref())
    }

    /// Where clients go that name no host: with one app there is no other.
    pub fn without_name(&self) -> Option<&Arc<Route>> {
        let only = || {
            let first = self.first.as_ref()?;
            let all = self.exact.values().chain(self.below.iter().map(|(_, route)| route));
            all.into_iter().all(|route| Arc::ptr_eq(route, first)).then_some(first)
        };
        self.any.as_ref().or_else(only)
    }
}

/// In lower case and without a dot at the end; `None` for what no host name can be.
fn lower<'s>(host: &[u8], space: &'s mut [u8; 256]) -> Option<&'s str> {
    let host = host.strip_suffix(b".").unwrap_or(host);
    let name = space.get_mut(..host.len())?;
    name.copy_from_slice(host);
    name.make_ascii_lowercase();
    std::str::from_utf8(name).ok()
}

/// 443 if it speaks https, else the lowest port that does.
fn https_port(app: &App) -> Option<u16> {
    let speaks = |port: &&Port| port.tls.is_some() && matches!(port.carries, Carries::Http(_));
    let ports = || app.services.iter().flat_map(|service| &service.ports).filter(speaks);
    if ports().any(|port| port.numbers.contains(&443)) {
        return Some(443);
    }
    ports().map(|port| *port.numbers.start()).min()
}
