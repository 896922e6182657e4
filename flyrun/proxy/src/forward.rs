//! A request on its way: from a client to a machine, to another if the first fails or asks for it, and the answer back.

use std::future::{Future as _, poll_fn};
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::Poll;
use std::time::{Duration, Instant, SystemTime};

use app::config::model::Http;
use bytes::Bytes;
use http::header::{HOST, UPGRADE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};

use crate::access::Record;
use crate::backend::{Answer, Exchange, Outbound, Service};
use crate::fields;
use crate::h1::head::{self, Target};
use crate::held::Held;
use crate::kept::Kept;
use crate::machines::{Failure, Machines, Want};
use crate::own::Own;
use crate::phases::{Phases, Stop};
use crate::replay;
use crate::routes::Route;
use crate::shared::{Peer, Shared};
use crate::watch::Watch;
use crate::wire::{Broken, Incoming, Respond, Size};

const FLY_REPLAY: HeaderName = HeaderName::from_static("fly-replay");
/// So many machines are tried for one request.
const MAX_MACHINES: usize = 3;
/// Whoever asks again right away asks too early.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// nginx's: the client did not wait for an answer.
const CLIENT_GONE: u16 = 499;

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
struct Story {
    start: Instant,
    time: SystemTime,
    status: u16,
    received: u64,
    sent: u64,
    waited: Duration,
    instance: Option<Arc<str>>,
    attempts: u32,
    error: Option<String>,
}

/// How a request ended other than by a machine's answer.
enum End {
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
    let time = SystemTime::now();
    let mut story = Story {
        start: Instant::now(),
        time,
        status: 0,
        received: 0,
        sent: 0,
        waited: Duration::ZERO,
        instance: None,
        attempts: 0,
        error: None,
    };
    let (authority, method) = (ask.authority.clone().unwrap_or_default(), ask.method.clone());
    let (target, protocol) = (ask.target.clone(), ask.protocol);
    let route = find(shared, peer, &authority);
    let region = route.as_ref().ok().and_then(|route| route.region.to_str().ok()).unwrap_or("local");
    let id = crate::id::next(time, region);
    let end = match &route {
        Err(own) => Err(End::Own(Own::new(own.status, own.why.clone()))),
        Ok(route) => match redirect(route, peer, &ask) {
            Some(own) => Err(End::Own(own)),
            None => {
                let journey = Journey { shared, peer, id: &id, story: &mut story, watch, respond };
                journey.go(route.clone(), ask, incoming).await
            }
        },
    };
    let route = route.ok();
    match end {
        Ok(()) => {}
        Err(End::Own(own)) => {
            story.status = own.status.as_u16();
            let detail = own.detail.clone().map(|detail| format!(": {detail}")).unwrap_or_default();
            story.error = Some(format!("{}{detail}", own.why));
            let limit =
                route.as_ref().and_then(|route| route.http()).map_or(RETRY_AFTER, |http| http.idle_timeout);
            match own.send(respond, &method, &id, watch, limit).await {
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
    tell(shared, peer, &story, route.as_deref(), &id, protocol, &method, &authority, &target);
}

#[allow(clippy::too_many_arguments)]
fn tell<M>(
    shared: &Shared<M>,
    peer: &Peer,
    story: &Story,
    route: Option<&Route>,
    id: &HeaderValue,
    protocol: &str,
    method: &Method,
    authority: &Bytes,
    target: &Target,
) {
    let duration = story.start.elapsed();
    match route {
        Some(route) => {
            route.metrics.sent(story.status);
            route.metrics.edge_seconds.add(duration);
            route.metrics.data_in.fetch_add(story.received, Relaxed);
            route.metrics.data_out.fetch_add(story.sent, Relaxed);
        }
        None => {
            shared.metrics.refused.fetch_add(1, Relaxed);
        }
    }
    shared.log.access(&Record {
        time: story.time,
        id: id.to_str().unwrap_or_default(),
        app: route.map(|route| &*route.name),
        client: peer.address,
        port: peer.port,
        protocol,
        method: method.as_str(),
        host: std::str::from_utf8(authority).unwrap_or_default(),
        path: match target {
            Target::Path(path) => path.path(),
            Target::Asterisk => "*",
            Target::Authority => "",
        },
        status: story.status,
        received: story.received,
        sent: story.sent,
        duration,
        waited: story.waited,
        instance: story.instance.as_deref(),
        attempts: story.attempts,
        error: story.error.as_deref(),
    });
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

/// `force_https`.
fn redirect(route: &Route, peer: &Peer, ask: &Ask) -> Option<Own> {
    let http = route.http()?;
    if !http.force_https || peer.told.is_tls {
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

/// All that goes with one request.
struct Journey<'j, M, R> {
    shared: &'j Shared<M>,
    peer: &'j Peer,
    id: &'j HeaderValue,
    story: &'j mut Story,
    watch: &'j mut Watch,
    respond: &'j mut R,
}

/// What came of one machine.
#[allow(clippy::large_enum_variant)] // Moved twice, which costs less than to allocate it.
enum Try {
    Answered(Answer, Exchange),
    /// It can be had again elsewhere.
    Failed(Failure, String),
    End(End),
}

impl<M: Machines, R: Respond> Journey<'_, M, R> {
    async fn go<I: Incoming>(mut self, mut route: Arc<Route>, ask: Ask, incoming: &mut I) -> Result<(), End> {
        let Some(http) = route.http().cloned() else { return Err(End::Gone) };
        let (may_inform, via, asked) = (ask.may_inform, ask.via, ask.upgrade.clone());
        let mut want = Want {
            app: route.name.clone(),
            service: route.service,
            steer: fields::steer(&ask.fields),
            not: Vec::new(),
        };
        let mut outbound = outbound(ask, &route.name);
        outbound.added =
            fields::to_machine(&mut outbound.fields, &self.peer.told, &route.region, self.id, via);
        let mut body = Kept::new(incoming, &self.shared.kept);
        if asked.is_some() {
            body.withhold();
        }
        let mut hops = 0;
        loop {
            let held = self.lease(&route, &want, &mut body).await?;
            let start = Instant::now();
            self.story.instance = Some(held.lease.instance.clone());
            match self.attempt(&held, &route, &http, &outbound, &mut body, may_inform).await {
                Try::End(end) => return Err(end),
                Try::Failed(failure, why) => {
                    self.failed(&held, failure, &mut want);
                    let may_resend = failure == Failure::Connect || outbound.method.is_safe();
                    if !(may_resend && body.is_untouched() && self.story.attempts < MAX_MACHINES as u32) {
                        return Err(End::Own(broken(failure, why)));
                    }
                    route.metrics.retries.fetch_add(1, Relaxed);
                }
                Try::Answered(mut answer, exchange) => {
                    route.metrics.answered(answer.status.as_u16());
                    let Some(asks) = answer.fields.remove(FLY_REPLAY) else {
                        let done =
                            self.pass_on(answer, exchange, &route, &http, asked, &mut body, &held).await;
                        route.metrics.app_seconds.add(start.elapsed());
                        return done;
                    };
                    hops += 1;
                    if matches!(answer.size, Size::None | Size::Known(0)) && outbound.size == Size::None {
                        exchange.finish();
                    }
                    route.metrics.replays.fetch_add(1, Relaxed);
                    route = self.replay(&asks, hops, &held, &route, &mut want, &mut outbound)?;
                    if !body.rewind() {
                        let why = "The request was to be replayed, and its body is more than is kept for that (1 MiB).";
                        return Err(End::Own(Own::new(StatusCode::BAD_GATEWAY, why)));
                    }
                }
            }
        }
    }

    /// A machine; meanwhile it is seen if the client goes.
    async fn lease<I: Incoming>(
        &mut self,
        route: &Arc<Route>,
        want: &Want,
        body: &mut Kept<'_, I>,
    ) -> Result<Arc<Held>, End> {
        let leases = self.peer.leases.as_ref();
        let may_share = want.steer.is_none() && want.not.is_empty();
        if let Some(held) = leases.filter(|_| may_share).and_then(|leases| leases.find(route)) {
            return Ok(held);
        }
        let start = Instant::now();
        let mut lease = pin!(self.shared.machines.lease(want.clone()));
        let respond = &mut *self.respond;
        let leased = poll_fn(|cx| {
            if let Poll::Ready(leased) = lease.as_mut().poll(cx) {
                return Poll::Ready(Some(leased));
            }
            let is_gone = body.poll_gone(cx).is_ready() || respond.poll_gone(cx).is_ready();
            if is_gone { Poll::Ready(None) } else { Poll::Pending }
        })
        .await;
        self.story.waited += start.elapsed();
        match leased {
            None => Err(End::Gone),
            Some(Ok(lease)) => {
                let life = self.shared.lives.of(&lease);
                let held = Held::new(lease, life, &route.metrics);
                if let Some(leases) = leases {
                    leases.share(route, &held);
                }
                Ok(held)
            }
            Some(Err(refusal)) => match self.story.error.take() {
                // Why the last one failed says more than that there is no other.
                Some(why) => {
                    let own =
                        Own::new(StatusCode::BAD_GATEWAY, why).after(refusal.retry_after.max(RETRY_AFTER));
                    Err(End::Own(own.detailed(refusal.to_string())))
                }
                None => Err(End::Own(Own::refused(&refusal))),
            },
        }
    }

    /// Sends the request to a machine, once more on a new connection if the old one turns out to be closed.
    async fn attempt<I: Incoming>(
        &mut self,
        held: &Held,
        route: &Route,
        http: &Http,
        outbound: &Outbound,
        body: &mut Kept<'_, I>,
        may_inform: bool,
    ) -> Try {
        let address = SocketAddr::new(held.lease.address, route.internal_port);
        let service = Service { address, is_h2: http.h2_backend };
        let mut may_reuse = true;
        loop {
            self.story.attempts += 1;
            let limit = self.shared.options.connect_timeout;
            let begun =
                Exchange::begin(&held.life, service, outbound, may_reuse, limit, &route.metrics).await;
            let mut exchange = match begun {
                Ok(exchange) => exchange,
                // What all share may have ended since; that says nothing of the machine.
                Err(_) if may_reuse && service.is_h2 => {
                    may_reuse = false;
                    continue;
                }
                Err(error) => return Try::Failed(Failure::Connect, error.to_string()),
            };
            let mut phases = Phases::new(&mut exchange, body, self.respond, self.watch, http.idle_timeout);
            let answer = phases.answer(may_inform).await;
            self.story.received = self.story.received.max(phases.up.bytes);
            return match answer {
                Ok(answer) => {
                    phases.leave();
                    Try::Answered(answer, exchange)
                }
                Err(Stop::Machine(_))
                    if exchange.is_reused && outbound.method.is_safe() && body.is_untouched() =>
                {
                    may_reuse = false;
                    route.metrics.retries.fetch_add(1, Relaxed);
                    continue;
                }
                Err(Stop::Machine(error)) => Try::Failed(Failure::Broken, error.to_string()),
                Err(Stop::Late) => Try::Failed(Failure::TimedOut, "nothing moved for too long".into()),
                Err(Stop::Gone) => Try::End(End::Gone),
                Err(Stop::Malformed(why)) => {
                    Try::End(End::Own(Own::new(StatusCode::BAD_REQUEST, why).closing()))
                }
                Err(Stop::Slow) => Try::End(End::Own(
                    Own::new(
                        StatusCode::REQUEST_TIMEOUT,
                        "The request's body took longer than this server waits.",
                    )
                    .closing(),
                )),
            };
        }
    }

    /// A machine did not answer: whoever has it is told, and it is not asked again unless it comes back to life.
    fn failed(&mut self, held: &Held, failure: Failure, want: &mut Want) {
        if held.life.is_over() {
            self.story.error = Some("The machine went away before it answered.".into());
            return;
        }
        self.shared.machines.failed(&held.lease, failure);
        want.not.push(held.lease.instance.clone());
        self.story.error = Some(what(failure).into());
    }

    /// Where a replayed request goes.
    fn replay(
        &mut self,
        asks: &HeaderValue,
        hops: usize,
        held: &Held,
        route: &Arc<Route>,
        want: &mut Want,
        outbound: &mut Outbound,
    ) -> Result<Arc<Route>, End> {
        let bad = |why: String| Err(End::Own(Own::new(StatusCode::BAD_GATEWAY, why)));
        if hops > replay::MAX_HOPS {
            return bad(format!("The request was replayed more than {} times.", replay::MAX_HOPS));
        }
        let asks = replay::read(asks.to_str().unwrap_or_default());
        let next = match asks.app.as_deref().filter(|app| **app != *route.name) {
            None => route.clone(),
            Some(app) => match self.shared.routes.load().of_app(app, self.peer.port) {
                Some(route) => route.clone(),
                None => return bad("The request was to be replayed to an app that is not here.".into()),
            },
        };
        let micros =
            self.story.time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_micros());
        let region = route.region.to_str().unwrap_or_default();
        let source = replay::source(&held.lease.instance, region, micros, asks.state.as_deref());
        fields::replayed(&mut outbound.added, &source);
        let not = if asks.elsewhere { vec![held.lease.instance.clone()] } else { Vec::new() };
        *want = Want { app: next.name.clone(), service: next.service, steer: asks.steer, not };
        Ok(next)
    }

    /// The answer, to its end.
    #[allow(clippy::too_many_arguments)]
    async fn pass_on<I: Incoming>(
        &mut self,
        mut answer: Answer,
        mut exchange: Exchange,
        route: &Route,
        http: &Http,
        asked: Option<Upgrade>,
        body: &mut Kept<'_, I>,
        held: &Held,
    ) -> Result<(), End> {
        body.forget();
        self.story.error = None;
        self.story.status = answer.status.as_u16();
        let protocol = answer.fields.get(UPGRADE).cloned();
        let own = (!http.pristine).then_some(self.id);
        fields::to_client(&mut answer.fields, &route.rules, own, SystemTime::now);
        let is_switch = answer.status == StatusCode::SWITCHING_PROTOCOLS;
        let is_tunnel = match asked {
            Some(Upgrade::Connect) => answer.status.is_success(),
            Some(_) => is_switch,
            None => false,
        };
        let is_misread = matches!(asked, Some(Upgrade::Extended(_))) && answer.status.is_success();
        if is_misread {
            let why = "The app does not speak the protocol that was asked for.";
            return Err(End::Own(Own::new(StatusCode::BAD_GATEWAY, why)));
        }
        if is_switch && !is_tunnel {
            return Err(End::Own(broken(Failure::Broken, "101 to a request that asked for nothing".into())));
        }
        let head = if is_tunnel {
            self.respond.switch(answer.status, answer.fields, protocol.filter(|_| is_switch))
        } else {
            self.respond.head(answer.status, answer.fields, answer.size)
        };
        head.map_err(|error| match error {
            Broken::Malformed(why) => End::Own(Own::new(StatusCode::BAD_GATEWAY, why)),
            _ => End::Gone,
        })?;
        let mut phases = Phases::resume(&mut exchange, body, self.respond, self.watch, http.idle_timeout);
        let done = if is_tunnel { phases.tunnel().await } else { phases.body().await };
        self.story.sent = phases.down.bytes;
        self.story.received = self.story.received.max(phases.up.bytes);
        let is_sent = phases.up.is_done();
        match done {
            Ok(()) => {
                if is_sent && !is_tunnel {
                    exchange.finish();
                }
                Ok(())
            }
            Err(Stop::Gone) => Err(End::Gone),
            Err(Stop::Malformed(why)) => Err(End::Cut(why.into())),
            Err(Stop::Slow) => Err(End::Cut("The client neither read nor sent for too long.".into())),
            Err(Stop::Late) => {
                if !is_tunnel {
                    self.shared.machines.failed(&held.lease, Failure::TimedOut);
                }
                Err(End::Cut("The machine fell silent.".into()))
            }
            Err(Stop::Machine(error)) => {
                if !held.life.is_over() && !is_tunnel {
                    self.shared.machines.failed(&held.lease, Failure::Broken);
                }
                Err(End::Cut(format!("The machine broke off: {error}.")))
            }
        }
    }
}

/// A request as machines get it.
fn outbound(ask: Ask, app: &str) -> Outbound {
    let mut fields = ask.fields;
    fields.remove(HOST);
    let (method, upgrade) = match ask.upgrade {
        // RFC 8441, section 4, read backwards.
        Some(Upgrade::Extended(protocol)) => (Method::GET, Some(protocol)),
        Some(Upgrade::Named(protocol)) => (ask.method, Some(protocol)),
        Some(Upgrade::Connect) | None => (ask.method, None),
    };
    // HTTP/1.1 demands a Host of the proxy that HTTP/1.0 does not of the client.
    let authority = ask.authority.unwrap_or_else(|| Bytes::copy_from_slice(app.as_bytes()));
    Outbound { method, target: ask.target, authority, fields, added: Vec::new(), size: ask.size, upgrade }
}

fn what(failure: Failure) -> &'static str {
    match failure {
        Failure::Connect => "The app does not accept connections.",
        Failure::Broken => "The app broke off before it answered.",
        Failure::TimedOut => "The app took longer than this server waits.",
    }
}

fn broken(failure: Failure, detail: String) -> Own {
    let status = match failure {
        Failure::Connect | Failure::Broken => StatusCode::BAD_GATEWAY,
        Failure::TimedOut => StatusCode::GATEWAY_TIMEOUT,
    };
    Own::new(status, what(failure)).after(RETRY_AFTER).detailed(detail)
}
