//! HTTP/2 without TLS to machines: one connection for all requests to a service of a life.

use std::future::Future as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use http::header::CONTENT_LENGTH;
use http::uri::Scheme;
use http::{Request, Response, Uri};

use super::{Answer, Exchange, Input, Kind, Outbound, Output, To};
use crate::h1::head::Target;
use crate::h2::{Receive, Send};
use crate::wire::{Broken, Size};

/// What a machine may send of one body before it is taken.
const WINDOW: u32 = 256 << 10;
/// Of all bodies of a connection.
const CONNECTION_WINDOW: u32 = 4 << 20;
const MAX_HEAD_BYTES: u32 = 128 << 10;
/// What is held for a machine that does not read, for each request.
const SEND_BUFFER: usize = 128 << 10;

/// A connection that any request may take a stream of.
#[derive(Clone)]
pub(crate) struct Shared {
    send: SendRequest<Bytes>,
    is_closed: Arc<AtomicBool>,
}

impl Shared {
    pub fn is_open(&self) -> bool {
        !self.is_closed.load(Ordering::Relaxed)
    }
}

/// A stream whose answer has not begun.
pub(crate) struct Pending {
    response: ResponseFuture,
    is_head: bool,
}

pub(super) async fn begin(to: To<'_>, outbound: &Outbound, may_reuse: bool) -> Result<Exchange, Broken> {
    let known = if may_reuse { to.life.h2(to.service.address) } else { None };
    let is_reused = known.is_some();
    let shared = match known {
        Some(shared) => shared,
        None => connect(to).await?,
    };
    // As many streams as the machine allows are open perhaps: the others end in time, or the request does.
    let ready = tokio::time::timeout(to.limit, shared.send.ready()).await;
    let mut send = ready.map_err(|_| Broken::Io(std::io::ErrorKind::TimedOut.into()))??;
    let has_no_body = matches!(outbound.size, Size::None | Size::Known(0));
    let (response, stream) = send.send_request(request(outbound)?, has_no_body)?;
    Ok(Exchange {
        input: Input::H2(Receive::default()),
        output: Output::H2(Send::new(stream, has_no_body)),
        kind: Kind::H2(Pending { response, is_head: outbound.method == http::Method::HEAD }),
        is_reused,
        life: to.life.clone(),
        method: outbound.method.clone(),
        upload: Default::default(),
    })
}

async fn connect(to: To<'_>) -> Result<Shared, Broken> {
    let socket = super::connect(to.life, to.service.address, to.limit, to.metrics).await?;
    let handshake = h2::client::Builder::new()
        .initial_window_size(WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(MAX_HEAD_BYTES)
        .max_send_buffer_size(SEND_BUFFER)
        .enable_push(false)
        .handshake(socket);
    let handshake = tokio::time::timeout(to.limit, handshake).await;
    let (send, connection) = handshake.map_err(|_| Broken::Io(std::io::ErrorKind::TimedOut.into()))??;
    let shared = Shared { send, is_closed: Arc::default() };
    to.life.keep_h2(to.service.address, shared.clone());
    let is_closed = shared.is_closed.clone();
    tokio::spawn(async move {
        // Whatever it ends with, each of its streams ends with too, and tells.
        let _ = connection.await;
        is_closed.store(true, Ordering::Relaxed);
    });
    Ok(shared)
}

fn request(outbound: &Outbound) -> Result<Request<()>, Broken> {
    const BAD: Broken = Broken::Malformed("The request cannot be said in HTTP/2.");
    let path = match &outbound.target {
        Target::Path(path) => path.as_str(),
        Target::Asterisk => "*",
        Target::Authority => return Err(BAD),
    };
    let uri = Uri::builder()
        .scheme(Scheme::HTTP)
        .authority(outbound.authority.as_ref())
        .path_and_query(path)
        .build()
        .map_err(|_| BAD)?;
    let mut request = Request::new(());
    *request.method_mut() = outbound.method.clone();
    *request.uri_mut() = uri;
    *request.version_mut() = http::Version::HTTP_2;
    let fields = request.headers_mut();
    *fields = outbound.fields.clone();
    for (name, value) in &outbound.added {
        fields.append(name, value.clone());
    }
    if let Size::Known(length) = outbound.size {
        request.headers_mut().insert(CONTENT_LENGTH, length.into());
    }
    Ok(request)
}

impl Pending {
    pub fn poll_answer(&mut self, cx: &mut Context<'_>, input: &mut Input) -> Poll<Result<Answer, Broken>> {
        if let Poll::Ready(Some(early)) = self.response.poll_informational(cx) {
            let (parts, ()) = early?.into_parts();
            return Poll::Ready(Ok(Answer { status: parts.status, fields: parts.headers, size: Size::None }));
        }
        let response: Response<_> = ready!(std::pin::Pin::new(&mut self.response).poll(cx))?;
        let (parts, stream) = response.into_parts();
        let mut fields = parts.headers;
        let length = fields.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        let size = match length {
            _ if self.is_head || parts.status == 304 || parts.status == 204 => Size::None,
            None if stream.is_end_stream() => Size::None,
            Some(length) => Size::Known(length),
            None => Size::Unknown,
        };
        if size != Size::None {
            fields.remove(CONTENT_LENGTH);
        }
        *input = Input::H2(Receive::new(stream));
        Poll::Ready(Ok(Answer { status: parts.status, fields, size }))
    }
}
