//! The side of clients: streams, each a task.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::server::{Builder, Connection, SendResponse};
use h2::{Reason, RecvStream};
use http::header::{CONTENT_LENGTH, HOST, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version};

use super::{Receive, Send};
use crate::forward::{self, Ask, Upgrade};
use crate::h1::Limits;
use crate::h1::head::{self, MAX_FIELDS, Target};
use crate::machines::Machines;
use crate::own::Own;
use crate::shared::{Peer, Shared};
use crate::socket::Whole;
use crate::watch::Watch;
use crate::wire::{Broken, Frame, Outgoing, Respond, Size};

/// What a client may send of one body before it is taken.
const WINDOW: u32 = 128 << 10;
/// Of all bodies of a connection.
const CONNECTION_WINDOW: u32 = 1 << 20;
/// Requests under way at a time on one connection.
const MAX_STREAMS: u32 = 128;
/// What is held for a client that does not read, for each request.
const SEND_BUFFER: usize = 64 << 10;
/// Requests that were reset, and errors that were answered with a reset, until a client is taken for an attacker
/// (CVE-2023-44487, CVE-2025-8671).
const MAX_RESETS: usize = 64;

/// Serves a connection to its end.
pub(crate) async fn serve<M: Machines>(shared: &Arc<Shared<M>>, peer: Peer, whole: Whole, limits: Limits) {
    let mut builder = Builder::new();
    builder
        .initial_window_size(WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(u32::try_from(shared.options.max_head_bytes).unwrap_or(u32::MAX))
        .max_send_buffer_size(SEND_BUFFER)
        .max_pending_accept_reset_streams(MAX_RESETS)
        .max_local_error_reset_streams(Some(MAX_RESETS))
        .enable_connect_protocol();
    let Ok(Ok(mut connection)) = tokio::time::timeout(limits.head, builder.handshake(whole)).await else {
        return;
    };
    let peer = Arc::new(peer);
    let mut watch = Watch::new(limits.idle);
    let mut is_leaving = false;
    loop {
        match next(&mut connection, &peer, &mut watch, is_leaving).await {
            Next::Request(request, respond) => {
                watch.set(limits.idle);
                let (shared, peer) = (shared.clone(), peer.clone());
                tokio::spawn(async move { one(&shared, &peer, request, respond).await });
            }
            // Clients are told that no more will be answered, and what is under way ends in peace.
            Next::Leave => {
                is_leaving = true;
                connection.graceful_shutdown();
                watch.set(limits.idle);
            }
            Next::Idle if connection.has_streams() => watch.set(limits.idle),
            Next::Idle if !is_leaving => {
                is_leaving = true;
                connection.graceful_shutdown();
                watch.set(limits.head.min(limits.idle));
            }
            Next::Idle | Next::End => return,
        }
    }
}

#[allow(clippy::large_enum_variant)] // Nearly always the large one.
enum Next {
    Request(Request<RecvStream>, SendResponse<Bytes>),
    /// All connections are to end.
    Leave,
    /// No request for so long.
    Idle,
    End,
}

async fn next(
    connection: &mut Connection<Whole, Bytes>,
    peer: &Peer,
    watch: &mut Watch,
    is_leaving: bool,
) -> Next {
    poll_fn(|cx| {
        match connection.poll_accept(cx) {
            Poll::Ready(Some(Ok((request, respond)))) => return Poll::Ready(Next::Request(request, respond)),
            Poll::Ready(Some(Err(_)) | None) => return Poll::Ready(Next::End),
            Poll::Pending => {}
        }
        if !is_leaving && peer.connection.poll_draining(cx).is_ready() {
            return Poll::Ready(Next::Leave);
        }
        watch.poll(cx).map(|()| Next::Idle)
    })
    .await
}

/// Serves one request.
async fn one<M: Machines>(
    shared: &Arc<Shared<M>>,
    peer: &Peer,
    request: Request<RecvStream>,
    respond: SendResponse<Bytes>,
) {
    let (mut parts, stream) = request.into_parts();
    let mut watch = Watch::new(shared.options.connect_timeout);
    let has_ended = stream.is_end_stream();
    let mut receive = Receive::new(stream);
    let protocol = parts.extensions.remove::<h2::ext::Protocol>();
    let mut answering = Answering { respond, send: None, is_keyed: false };
    match ask(parts, has_ended, protocol.as_ref(), &mut answering) {
        Ok(ask) => forward::handle(shared, peer, ask, &mut receive, &mut answering, &mut watch).await,
        Err(why) => {
            let id = crate::id::next(std::time::SystemTime::now(), "local");
            let own = Own::new(StatusCode::BAD_REQUEST, why);
            let limit = shared.options.connect_timeout;
            let sent = own.send(&mut answering, &Method::GET, &id, &mut watch, limit).await;
            forward::log_refused(shared, peer, &own, &id, sent.unwrap_or(0));
        }
    }
}

/// RFC 9113, section 8.3. What the h2 crate refuses by itself: fields of a connection, pseudo-headers that are unknown,
/// repeated or late, a body that is not as long as it says.
fn ask(
    parts: http::request::Parts,
    has_ended: bool,
    protocol: Option<&h2::ext::Protocol>,
    answering: &mut Answering,
) -> Result<Ask, &'static str> {
    let mut fields = parts.headers;
    if fields.len() > MAX_FIELDS {
        return Err("The header has more fields than this server takes.");
    }
    let named = parts.uri.authority().map(|authority| Bytes::copy_from_slice(authority.as_str().as_bytes()));
    let mut hosts = fields.get_all(HOST).iter();
    let (host, more) = (hosts.next(), hosts.next());
    if more.is_some() || matches!((&named, host), (Some(named), Some(host)) if named != host.as_bytes()) {
        return Err("There is more than one host.");
    }
    let authority = named
        .or_else(|| host.map(|host| Bytes::copy_from_slice(host.as_bytes())))
        .ok_or("There is no host.")?;
    if !head::is_authority(&authority) {
        return Err("The authority is not a host name.");
    }
    fields.remove(HOST);
    let mut lengths = fields.get_all(CONTENT_LENGTH).iter();
    let length = lengths.next().and_then(|value| value.to_str().ok()?.parse().ok());
    if lengths.next().is_some() || length.is_none() && fields.contains_key(CONTENT_LENGTH) {
        return Err("Content-Length is not one number.");
    }
    fields.remove(CONTENT_LENGTH);
    let upgrade = match (&parts.method, protocol) {
        (&Method::CONNECT, Some(protocol)) => Some(Upgrade::Extended(
            HeaderValue::from_str(protocol.as_str()).map_err(|_| "The protocol is no token.")?,
        )),
        (&Method::CONNECT, None) => Some(Upgrade::Connect),
        _ => None,
    };
    let target = match (&upgrade, parts.uri.path_and_query()) {
        (Some(Upgrade::Connect), _) => Target::Authority,
        (_, Some(path)) if path.as_str() == "*" && parts.method == Method::OPTIONS => Target::Asterisk,
        (_, Some(path))
            if path.as_str().starts_with('/') && path.as_str().bytes().all(|b| b.is_ascii_graphic()) =>
        {
            Target::Path(path.clone())
        }
        _ => return Err("The path is not one of HTTP."),
    };
    let is_websocket = |protocol: &HeaderValue| protocol.as_bytes().eq_ignore_ascii_case(b"websocket");
    answering.is_keyed = matches!(&upgrade, Some(Upgrade::Extended(protocol)) if is_websocket(protocol));
    if answering.is_keyed {
        fields.insert(SEC_WEBSOCKET_KEY, HeaderValue::from_static(WEBSOCKET_KEY));
    }
    let size = match (&upgrade, length, has_ended) {
        (Some(_), ..) => Size::None,
        (None, None, true) => Size::None,
        (None, Some(length), _) => Size::Known(length),
        (None, None, false) => Size::Unknown,
    };
    Ok(Ask {
        method: parts.method,
        target,
        authority: Some(authority),
        fields,
        size,
        upgrade,
        protocol: "HTTP/2",
        via: "2.0 flyrun",
        may_inform: true,
    })
}

/// WebSocket over HTTP/2 has no key, and over HTTP/1.1 it guards against nothing here but a machine that does not know the
/// protocol: the example of RFC 6455, section 1.3.
const WEBSOCKET_KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
const WEBSOCKET_ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

/// An answer on one stream.
struct Answering {
    respond: SendResponse<Bytes>,
    /// Once the head is out.
    send: Option<Send>,
    /// A machine that speaks WebSocket over HTTP/1.1 is to answer our key.
    is_keyed: bool,
}

impl Outgoing for Answering {
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        match &mut self.send {
            Some(send) => send.poll_ready(cx),
            None => Poll::Ready(Ok(())),
        }
    }

    fn push(&mut self, frame: Frame) -> Result<(), Broken> {
        self.send.as_mut().ok_or(Broken::Closed)?.push(frame)
    }

    fn end(&mut self) -> Result<(), Broken> {
        self.send.as_mut().ok_or(Broken::Closed)?.end()
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        match &mut self.send {
            Some(send) => send.poll_flush(cx),
            None => Poll::Ready(Ok(())),
        }
    }
}

fn response(status: StatusCode, fields: HeaderMap) -> Response<()> {
    let mut response = Response::new(());
    *response.status_mut() = status;
    *response.version_mut() = Version::HTTP_2;
    *response.headers_mut() = fields;
    response
}

impl Respond for Answering {
    fn inform(&mut self, status: StatusCode, fields: HeaderMap) -> Result<(), Broken> {
        Ok(self.respond.send_informational(response(status, fields))?)
    }

    fn head(&mut self, status: StatusCode, mut fields: HeaderMap, size: Size) -> Result<(), Broken> {
        if let Size::Known(length) = size {
            fields.insert(CONTENT_LENGTH, length.into());
        }
        let is_last = matches!(size, Size::None | Size::Known(0));
        let stream = self.respond.send_response(response(status, fields), is_last)?;
        self.send = Some(Send::new(stream, is_last));
        Ok(())
    }

    fn switch(
        &mut self,
        status: StatusCode,
        mut fields: HeaderMap,
        protocol: Option<HeaderValue>,
    ) -> Result<(), Broken> {
        let accept = fields.remove(SEC_WEBSOCKET_ACCEPT);
        if self.is_keyed && accept.is_none_or(|accept| accept != WEBSOCKET_ACCEPT) {
            return Err(Broken::Malformed("The machine does not speak WebSocket."));
        }
        let status = if protocol.is_some() { StatusCode::OK } else { status };
        let stream = self.respond.send_response(response(status, fields), false)?;
        self.send = Some(Send::new(stream, false));
        Ok(())
    }

    fn abort(&mut self) {
        match &mut self.send {
            Some(send) => send.reset(Reason::INTERNAL_ERROR),
            None => self.respond.send_reset(Reason::INTERNAL_ERROR),
        }
    }

    /// A stream that is refused does no harm to the others.
    fn close(&mut self) {}

    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.send {
            Some(send) => send.poll_reset(cx),
            None => {
                ready!(self.respond.poll_reset(cx)).ok();
                Poll::Ready(())
            }
        }
    }
}
