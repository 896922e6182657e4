//! A request among machines: to one, to another if that fails or asks for it, and the answer back.

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
use http::{HeaderName, HeaderValue, Method, StatusCode};

use crate::backend::{Answer, Exchange, Outbound, Service, To};
use crate::fields::{self, Told};
use crate::forward::{Ask, End, Story, Upgrade};
use crate::held::Held;
use crate::kept::Kept;
use crate::machines::{Failure, Machines, Want};
use crate::own::Own;
use crate::phases::{Phases, Stop};
use crate::replay;
use crate::routes::Route;
use crate::shared::{Peer, Shared};
use crate::watch::{Deadlines, Watch};
use crate::wire::{Broken, Incoming, Respond, Size};

const FLY_REPLAY: HeaderName = HeaderName::from_static("fly-replay");
const WENT_AWAY: &str = "The machine went away before it answered.";
/// So many machines are tried for one request.
const MAX_MACHINES: usize = 3;
const OVERDUE: &str = "The request took longer than this app has for one (total_timeout).";
/// Whoever asks again right away asks too early.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// All that goes with one request.
pub(crate) struct Journey<'j, M, R> {
    pub shared: &'j Shared<M>,
    pub peer: &'j Peer,
    /// What is told of the client, by a proxy in front if that is believed.
    pub told: &'j Told,
    pub id: &'j HeaderValue,
    pub story: &'j mut Story,
    pub watch: &'j mut Watch,
    /// Of the app that was asked, wherever a replay leads.
    pub deadlines: Deadlines,
    pub respond: &'j mut R,
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
    /// To its end, or to what the client is told instead of an answer.
    pub async fn go<I: Incoming>(
        mut self,
        mut route: Arc<Route>,
        ask: Ask,
        incoming: &mut I,
    ) -> Result<(), End> {
        let (may_inform, via, asked) = (ask.may_inform, ask.via, ask.upgrade.clone());
        let mut want = Want {
            app: route.name.clone(),
            service: route.service,
            steer: fields::steer(&ask.fields),
            not: Vec::new(),
        };
        let mut outbound = outbound(ask, &route.name);
        outbound.added = fields::to_machine(&mut outbound.fields, self.told, &route.region, self.id, via);
        let mut body = Kept::new(incoming, &self.shared.kept);
        if asked.is_some() {
            body.withhold();
        }
        let (mut hops, mut failures) = (0, 0);
        loop {
            // A replay may have led to an app with other options.
            let here = route.clone();
            let Some(http) = here.http() else { return Err(End::Gone) };
            let held = self.lease(&route, &want, &mut body).await?;
            let start = Instant::now();
            self.story.instance = Some(held.lease.instance.clone());
            match self.attempt(&held, &route, http, &outbound, &mut body, may_inform).await {
                Try::End(end) => return Err(end),
                Try::Failed(failure, why) => {
                    let is_gone = self.failed(&held, failure, &mut want);
                    let may_resend = failure == Failure::Connect || outbound.method.is_safe();
                    failures += 1;
                    if !(may_resend && body.is_untouched() && failures < MAX_MACHINES) {
                        let mut own = broken(failure, why);
                        if is_gone {
                            own.why = WENT_AWAY.into();
                        }
                        return Err(End::Own(own));
                    }
                    route.metrics.retries.fetch_add(1, Relaxed);
                }
                Try::Answered(mut answer, exchange) => {
                    route.metrics.answered(answer.status.as_u16());
                    let Some(asks) = answer.fields.remove(FLY_REPLAY) else {
                        let done =
                            self.pass_on(answer, exchange, &route, http, asked, &mut body, &held).await;
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
        let (respond, watch) = (&mut *self.respond, &mut *self.watch);
        if let Some(end) = self.deadlines.total {
            watch.set_until(end);
        }
        let leased = poll_fn(|cx| {
            if let Poll::Ready(leased) = lease.as_mut().poll(cx) {
                return Poll::Ready(Ok(leased));
            }
            if body.poll_gone(cx).is_ready() || respond.poll_gone(cx).is_ready() {
                return Poll::Ready(Err(End::Gone));
            }
            if self.deadlines.total.is_some() && watch.poll(cx).is_ready() {
                return Poll::Ready(Err(End::Own(overdue())));
            }
            Poll::Pending
        })
        .await;
        self.story.waited += start.elapsed();
        match leased? {
            Ok(lease) => {
                let life = self.shared.lives.of(&lease);
                let held = Held::new(lease, life, &route.metrics);
                if let Some(leases) = leases {
                    leases.share(route, &held);
                }
                Ok(held)
            }
            Err(refusal) => match self.story.error.take() {
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
        let limit = self.deadlines.left_of(self.shared.options.connect_timeout);
        let to = To { life: &held.life, service, limit, metrics: &route.metrics };
        let mut may_reuse = true;
        loop {
            self.story.attempts += 1;
            let mut exchange = match Exchange::begin(to, outbound, may_reuse).await {
                Ok(exchange) => exchange,
                // What all share may have ended since; that says nothing of the machine.
                Err(_) if may_reuse && service.is_h2 => {
                    may_reuse = false;
                    continue;
                }
                Err(_) if self.deadlines.is_over() => return Try::End(End::Own(overdue())),
                Err(error) => return Try::Failed(Failure::Connect, error.to_string()),
            };
            let limits = (http.idle_timeout, self.deadlines);
            let mut phases = Phases::new(&mut exchange, body, self.respond, self.watch, limits);
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
                Err(Stop::Overdue) => Try::End(End::Own(overdue())),
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

    /// A machine did not answer: whoever has it is told, and it is not asked again unless it comes back to life. True if that life is
    /// over.
    fn failed(&mut self, held: &Held, failure: Failure, want: &mut Want) -> bool {
        if held.life.is_over() {
            self.story.error = Some(WENT_AWAY.into());
            return true;
        }
        self.shared.machines.failed(&held.lease, failure);
        want.not.push(held.lease.instance.clone());
        self.story.error = Some(what(failure).into());
        false
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
        let is_events = fields::is_event_stream(&answer.fields);
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
        // It has been answered in time; how long it goes on is for both ends to say.
        let may_last = is_tunnel || is_events;
        let head = if is_tunnel {
            self.respond.switch(answer.status, answer.fields, protocol.filter(|_| is_switch))
        } else {
            self.respond.head(answer.status, answer.fields, answer.size)
        };
        head.map_err(|error| match error {
            Broken::Malformed(why) => End::Own(Own::new(StatusCode::BAD_GATEWAY, why)),
            _ => End::Gone,
        })?;
        let limits = (http.idle_timeout, if may_last { Deadlines::default() } else { self.deadlines });
        let mut phases = Phases::resume(&mut exchange, body, self.respond, self.watch, limits);
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
            Err(Stop::Overdue) => Err(End::Cut(OVERDUE.into())),
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

/// The machine did nothing that is wrong with all that it is asked.
fn overdue() -> Own {
    Own::new(StatusCode::GATEWAY_TIMEOUT, OVERDUE).closing()
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
