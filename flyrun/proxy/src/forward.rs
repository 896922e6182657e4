//! A request, whatever protocol it came in: to its app, and what becomes of it to the client, the log and the counters.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode};

use crate::access::Record;
use crate::believed::{self, Believed};
use crate::fields::Told;
use crate::h1::head::{self, Target};
use crate::journey::Journey;
use crate::machines::Machines;
use crate::own::Own;
use crate::routes::Route;
use crate::shared::{Peer, Shared};
use crate::watch::{Deadlines, Watch};
use crate::wire::{Incoming, Respond, Size};

/// nginx's: the client did not wait for an answer.
const CLIENT_GONE: u16 = 499;
/// To write an answer of our own while no app is known.
const OWN_LIMIT: Duration = Duration::from_secs(5);

/// A request, in whatever protocol it came.
pub(crate) struct Ask {
    pub method: Method,
    pub target: Target,
    pub authority: Option<Bytes>,
    pub fields: HeaderMap,
    pub size: Size,
    pub upgrade: Option<Upgrade>,
    pub protocol: &'static str,
    pub via: &'static str,
    /// The client knows answers before the answer.
    pub may_inform: bool,
}

/// What a client wants to go on with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Upgrade {
    /// `Upgrade` of HTTP/1.1.
    Named(HeaderValue),
    /// `:protocol` of HTTP/2 (RFC 8441).
    Extended(HeaderValue),
    /// Bytes to wherever the machine takes them.
    Connect,
}

/// What the log is told at the end.
pub(crate) struct Story {
    client: IpAddr,
    protocol: &'static str,
    method: Method,
    authority: Bytes,
    target: Target,
    start: Instant,
    pub time: SystemTime,
    pub status: u16,
    pub received: u64,
    pub sent: u64,
    pub waited: Duration,
    pub instance: Option<Arc<str>>,
    pub attempts: u32,
    pub error: Option<String>,
}

/// How a request ended other than by a machine's answer.
pub(crate) enum End {
    Own(Own),
    Gone,
    /// The head of the answer is out, and its body will not be whole.
    Cut(String),
}

/// Answers a request.
pub(crate) async fn handle<M: Machines, I: Incoming, R: Respond>(
    shared: &Shared<M>,
    peer: &Peer,
    ask: Ask,
    incoming: &mut I,
    respond: &mut R,
    watch: &mut Watch,
) {
    let mut story = Story::new(&ask, peer.address);
    let route = find(shared, peer, &story.authority);
    let region = route.as_ref().ok().and_then(|route| route.region.to_str().ok()).unwrap_or("local");
    let id = crate::id::next(story.time, region);
    let believed = route.as_ref().ok().and_then(|route| believe(route, peer, &ask.fields));
    let told = believed.as_ref().map_or(&peer.told, |believed| &believed.told);
    story.client = believed.as_ref().map_or(peer.address, |believed| believed.address);
    let end = match &route {
        Err(own) => Err(End::Own(Own::new(own.status, own.why.clone()))),
        Ok(route) => match proof(shared, peer, &ask).or_else(|| redirect(route, told, &ask)) {
            Some(own) => Err(End::Own(own)),
            None => {
                let deadlines = Deadlines::new(story.start.into(), route.body_timeout, route.total_timeout);
                let journey =
                    Journey { shared, peer, told, id: &id, story: &mut story, watch, deadlines, respond };
                journey.go(route.clone(), ask, incoming).await
            }
        },
    };
    let route = route.ok();
    match end {
        Ok(()) => {}
        Err(End::Own(own)) => {
            story.status = own.status.as_u16();
            story.error = own.error();
            let limit =
                route.as_ref().and_then(|route| route.http()).map_or(OWN_LIMIT, |http| http.idle_timeout);
            match own.send(respond, &story.method, &id, watch, limit).await {
                Ok(sent) => story.sent = sent,
                Err(_) => respond.abort(),
            }
        }
        Err(End::Gone) => {
            story.status = if story.status == 0 { CLIENT_GONE } else { story.status };
            story.error.get_or_insert_with(|| "The client did not wait for the end.".into());
            respond.abort();
        }
        Err(End::Cut(why)) => {
            story.error = Some(why);
            respond.abort();
        }
    }
    story.tell(shared, peer, route.as_deref(), &id);
}

impl Story {
    fn new(ask: &Ask, client: IpAddr) -> Story {
        Story {
            client,
            protocol: ask.protocol,
            method: ask.method.clone(),
            authority: ask.authority.clone().unwrap_or_default(),
            target: ask.target.clone(),
            start: Instant::now(),
            time: SystemTime::now(),
            status: 0,
            received: 0,
            sent: 0,
            waited: Duration::ZERO,
            instance: None,
            attempts: 0,
            error: None,
        }
    }

    fn tell<M>(&self, shared: &Shared<M>, peer: &Peer, route: Option<&Route>, id: &HeaderValue) {
        let duration = self.start.elapsed();
        match route {
            Some(route) => {
                route.metrics.sent(self.status);
                route.metrics.edge_seconds.add(duration);
                route.metrics.data_in.fetch_add(self.received, Relaxed);
                route.metrics.data_out.fetch_add(self.sent, Relaxed);
            }
            None => {
                shared.metrics.refused.fetch_add(1, Relaxed);
            }
        }
        shared.log.access(&Record {
            time: self.time,
            id: id.to_str().unwrap_or_default(),
            app: route.map(|route| &*route.name),
            client: self.client,
            port: peer.port,
            protocol: self.protocol,
            method: self.method.as_str(),
            host: std::str::from_utf8(&self.authority).unwrap_or_default(),
            path: match &self.target {
                Target::Path(path) => path.path(),
                Target::Asterisk => "*",
                Target::Authority => "",
            },
            status: self.status,
            received: self.received,
            sent: self.sent,
            duration,
            waited: self.waited,
            instance: self.instance.as_deref(),
            attempts: self.attempts,
            error: self.error.as_deref(),
        });
    }
}

/// Tells the log of a request that could not be read.
pub(crate) fn log_refused<M>(shared: &Shared<M>, peer: &Peer, own: &Own, id: &HeaderValue, sent: u64) {
    shared.log.access(&Record {
        time: SystemTime::now(),
        id: id.to_str().unwrap_or_default(),
        app: None,
        client: peer.address,
        port: peer.port,
        protocol: "HTTP/1.1",
        method: "",
        host: "",
        path: "",
        status: own.status.as_u16(),
        received: 0,
        sent,
        duration: Duration::ZERO,
        waited: Duration::ZERO,
        instance: None,
        attempts: 0,
        error: Some(&own.why),
    });
}

/// The app that a request is for.
fn find<M>(shared: &Shared<M>, peer: &Peer, authority: &[u8]) -> Result<Arc<Route>, Own> {
    let routes = shared.routes.load();
    let nobody = || {
        let (host, _) = head::split_port(authority);
        let host = String::from_utf8_lossy(host);
        Own::new(StatusCode::NOT_FOUND, format!("No app here has the host name '{host}'."))
    };
    let port = routes.port(peer.port).ok_or_else(nobody)?;
    let (host, _) = head::split_port(authority);
    // HTTP/1.0 need not say whom it means.
    let found = if host.is_empty() { port.without_name() } else { port.find(host) };
    let route = found.filter(|route| route.http().is_some()).ok_or_else(nobody)?;
    match &peer.named {
        // What TLS was agreed on for one app is not good for another (RFC 9110, section 15.5.20).
        Some(named) if *named != route.name => Err(Own::new(
            StatusCode::MISDIRECTED_REQUEST,
            "This connection was made to another app: connect again for this host.",
        )),
        _ => Ok(route.clone()),
    }
}

/// What a proxy in front says, if the app trusts this one.
fn believe(route: &Route, peer: &Peer, fields: &HeaderMap) -> Option<Believed> {
    believed::read(peer.address, &peer.told, &route.trusted_proxies, fields)
}

/// What a certificate authority asks for: over plain HTTP, whatever an app forces.
fn proof<M>(shared: &Shared<M>, peer: &Peer, ask: &Ask) -> Option<Own> {
    match &ask.target {
        Target::Path(path) if ask.method.is_safe() && !peer.told.is_tls => {
            shared.challenges.document(path.path()).map(Own::document)
        }
        _ => None,
    }
}

/// `force_https`.
fn redirect(route: &Route, told: &Told, ask: &Ask) -> Option<Own> {
    let http = route.http()?;
    if !http.force_https || told.is_tls {
        return None;
    }
    let path = match &ask.target {
        Target::Path(path) => path.as_str(),
        Target::Asterisk | Target::Authority => "/",
    };
    let authority = ask.authority.as_deref().unwrap_or_default();
    let host = String::from_utf8_lossy(head::split_port(authority).0);
    let port = route.https_port.filter(|port| *port != 443).map_or(String::new(), |port| format!(":{port}"));
    Some(Own::redirect(&format!("https://{host}{port}{path}")))
}
