//! The side of clients: one request after another.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::Poll;
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, EXPECT};
use http::{HeaderMap, HeaderValue, Method, StatusCode};

use super::head::{self, Refused, RequestHead};
use super::reader::{Body, NoHead, Reader};
use super::writer::{Framing, Writer, put_field, put_fields, put_framing, put_status};
use crate::fields;
use crate::forward::{self, Ask, Upgrade};
use crate::machines::Machines;
use crate::own::Own;
use crate::shared::{Connection, Peer, Shared};
use crate::socket::{Read, Write};
use crate::watch::Watch;
use crate::wire::{Broken, Frame, Incoming as _, Outgoing, Respond, Size};

/// What HTTP/2 begins with, up to the first empty line (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\n";
/// What is read of a client that was refused, so that it reads why before it is told that nobody listens.
const LINGER_BYTES: usize = 1 << 20;
const LINGER: Duration = Duration::from_secs(2);

/// Limits of the port, as long as no request has told its app.
pub(crate) struct Limits {
    pub idle: Duration,
    pub head: Duration,
}

/// How waiting for a request ended.
enum Next {
    Head(Bytes),
    Refused(Refused),
    /// Nobody is there, or nobody is to stay.
    End,
}

/// Serves a connection to its end.
pub(crate) async fn serve<M: Machines>(
    shared: &Arc<Shared<M>>,
    mut peer: Peer,
    read: Read,
    write: Write,
    limits: Limits,
) {
    let mut reader = Reader::new(read, BytesMut::new());
    let mut writer = Writer::new(write);
    let mut watch = Watch::new(limits.head);
    let mut is_first = true;
    loop {
        match next(&mut reader, &mut watch, &limits, shared.options.max_head_bytes, &peer, is_first).await {
            Next::Head(bytes) if is_first && bytes == PREFACE && !peer.told.is_tls => {
                let mut ahead = BytesMut::from(&bytes[..]);
                ahead.extend_from_slice(reader.buffer());
                reader.buffer().clear();
                std::mem::swap(reader.buffer(), &mut ahead);
                let whole = reader.into_whole(writer.into_write());
                peer.leases = Some(crate::held::Leases::default());
                // Large, and seldom.
                return Box::pin(crate::h2::serve(shared, peer, whole, limits)).await;
            }
            Next::Head(bytes) => match head::request(bytes) {
                Ok(head) => {
                    is_first = false;
                    match one(shared, &peer, head, &mut reader, &mut writer, &mut watch).await {
                        Then::Next => reader.shrink(),
                        Then::Close => return finish(reader, writer, watch).await,
                        Then::Reset => return peer.connection.reset_at_end(),
                    }
                    // A client that never lets this task wait leaves others their turn.
                    tokio::task::coop::consume_budget().await;
                }
                Err(refused) => return refuse(shared, &peer, refused, reader, writer, watch).await,
            },
            Next::Refused(refused) => return refuse(shared, &peer, refused, reader, writer, watch).await,
            Next::End => return,
        }
    }
}

/// Waits for a request's head.
async fn next(
    reader: &mut Reader,
    watch: &mut Watch,
    limits: &Limits,
    max_bytes: usize,
    peer: &Peer,
    is_first: bool,
) -> Next {
    let mut is_waited = false;
    let mut in_head = is_first;
    poll_fn(|cx| {
        match reader.poll_head(cx, max_bytes, true) {
            Poll::Ready(Ok(bytes)) => return Poll::Ready(Next::Head(bytes)),
            Poll::Ready(Err(NoHead::Refused(refused))) => return Poll::Ready(Next::Refused(refused)),
            Poll::Ready(Err(NoHead::End | NoHead::Broken(_))) => return Poll::Ready(Next::End),
            Poll::Pending => {}
        }
        let is_between = reader.buffer().is_empty();
        if is_between && peer.connection.poll_draining(cx).is_ready() {
            return Poll::Ready(Next::End);
        }
        if !is_waited {
            is_waited = true;
            watch.set(if is_first { limits.head } else { limits.idle });
        }
        if !is_between && !in_head {
            in_head = true;
            watch.set(limits.head);
        }
        if watch.poll(cx).is_pending() {
            return Poll::Pending;
        }
        if is_between {
            return Poll::Ready(Next::End);
        }
        let why = "The header took longer than this server waits.";
        Poll::Ready(Next::Refused(Refused { status: StatusCode::REQUEST_TIMEOUT, why }))
    })
    .await
}

/// What follows a request.
enum Then {
    /// Another.
    Next,
    Close,
    /// The end of the connection would be taken for the end of an answer that is not whole.
    Reset,
}

/// Serves one request.
async fn one<M: Machines>(
    shared: &Arc<Shared<M>>,
    peer: &Peer,
    head: RequestHead,
    reader: &mut Reader,
    writer: &mut Writer,
    watch: &mut Watch,
) -> Then {
    let upgrade = match (&head.method, head.size) {
        (&Method::CONNECT, _) => Some(Upgrade::Connect),
        (_, Size::None | Size::Known(0)) if !head.is_http10 => {
            fields::wanted_upgrade(&head.fields).map(Upgrade::Named)
        }
        _ => None,
    };
    let is_connect = head.method == Method::CONNECT;
    // Such a client may leave its body away once it is answered (RFC 9110, section 10.1.1).
    let expects = head.fields.contains_key(EXPECT) && !matches!(head.size, Size::None | Size::Known(0));
    reader.expect(match head.size {
        // What follows a request to connect is no body of it.
        _ if is_connect => Body::None,
        Size::None => Body::None,
        Size::Known(length) => Body::Length(length),
        Size::Unknown => Body::chunked(),
    });
    let mut respond = Answering {
        writer,
        is_http10: head.is_http10,
        has_body: head.method != Method::HEAD,
        keep_alive: head.keep_alive,
        connection: &peer.connection,
        is_complete: true,
    };
    let ask = Ask {
        method: head.method,
        target: head.target,
        authority: head.host,
        fields: head.fields,
        size: if is_connect { Size::None } else { head.size },
        upgrade,
        protocol: if head.is_http10 { "HTTP/1.0" } else { "HTTP/1.1" },
        via: if head.is_http10 { "1.0 flyrun" } else { "1.1 flyrun" },
        may_inform: !head.is_http10,
    };
    forward::handle(shared, peer, ask, reader, &mut respond, watch).await;
    let Answering { keep_alive, is_complete, .. } = respond;
    if !is_complete && writer.is_raw() {
        return Then::Reset;
    }
    let may_go_on = keep_alive && is_complete && writer.is_between_messages();
    let is_read = reader.is_between_messages() || may_go_on && !expects && discard(reader, watch).await;
    if may_go_on && is_read { Then::Next } else { Then::Close }
}

/// Reads what is left of a request that is answered: a client that was not told of the connection's end may have sent its next one
/// already. False if that is too much, or takes too long.
async fn discard(reader: &mut Reader, watch: &mut Watch) -> bool {
    watch.set(LINGER);
    let mut left = LINGER_BYTES;
    poll_fn(|cx| {
        loop {
            match reader.poll_frame(cx) {
                Poll::Ready(None) => return Poll::Ready(true),
                Poll::Ready(Some(Ok(Frame::Data(data)))) if data.len() < left => left -= data.len(),
                Poll::Ready(Some(Ok(Frame::Trailers(_)))) => {}
                Poll::Ready(Some(_)) => return Poll::Ready(false),
                Poll::Pending if watch.poll(cx).is_ready() => return Poll::Ready(false),
                Poll::Pending => return Poll::Pending,
            }
        }
    })
    .await
}

/// A request that no app sees.
async fn refuse<M: Machines>(
    shared: &Arc<Shared<M>>,
    peer: &Peer,
    refused: Refused,
    reader: Reader,
    mut writer: Writer,
    mut watch: Watch,
) {
    shared.metrics.refused.fetch_add(1, Relaxed);
    let mut respond = Answering {
        writer: &mut writer,
        is_http10: false,
        has_body: true,
        keep_alive: false,
        is_complete: true,
        connection: &peer.connection,
    };
    let id = crate::id::next(SystemTime::now(), "local");
    let own = Own::new(refused.status, refused.why).closing();
    let sent = own.send(&mut respond, &Method::GET, &id, &mut watch, LINGER).await;
    forward::log_refused(shared, peer, &own, &id, sent.unwrap_or(0));
    finish(reader, writer, watch).await;
}

/// Closes a connection whose client may still be sending.
async fn finish(mut reader: Reader, mut writer: Writer, mut watch: Watch) {
    writer.shut();
    watch.set(LINGER);
    reader.expect_raw();
    let mut left = LINGER_BYTES;
    poll_fn(|cx| {
        let is_shut = writer.poll_flush(cx);
        if matches!(is_shut, Poll::Ready(Err(_))) || watch.poll(cx).is_ready() {
            return Poll::Ready(());
        }
        loop {
            match reader.poll_frame(cx) {
                Poll::Ready(Some(Ok(Frame::Data(data)))) if data.len() < left => left -= data.len(),
                Poll::Ready(_) => return Poll::Ready(()),
                Poll::Pending => return Poll::Pending,
            }
        }
    })
    .await;
}

/// An answer to one request.
struct Answering<'a> {
    writer: &'a mut Writer,
    is_http10: bool,
    /// Not to HEAD.
    has_body: bool,
    keep_alive: bool,
    is_complete: bool,
    connection: &'a Connection,
}

impl Outgoing for Answering<'_> {
    fn poll_ready(&mut self, cx: &mut std::task::Context<'_>) -> Poll<Result<(), Broken>> {
        self.writer.poll_ready(cx)
    }

    fn push(&mut self, frame: Frame) -> Result<(), Broken> {
        self.writer.push(frame)
    }

    fn end(&mut self) -> Result<(), Broken> {
        self.writer.end()
    }

    fn poll_flush(&mut self, cx: &mut std::task::Context<'_>) -> Poll<Result<(), Broken>> {
        self.writer.poll_flush(cx)
    }
}

impl Respond for Answering<'_> {
    fn inform(&mut self, status: StatusCode, fields: HeaderMap) -> Result<(), Broken> {
        let buffer = self.writer.head(Framing::None);
        put_status(buffer, status);
        put_fields(buffer, &fields);
        buffer.extend_from_slice(b"\r\n");
        Ok(())
    }

    fn head(&mut self, status: StatusCode, fields: HeaderMap, size: Size) -> Result<(), Broken> {
        let framing = match size {
            Size::None => Framing::None,
            Size::Known(length) => Framing::Length(length),
            Size::Unknown if self.is_http10 => Framing::Raw,
            Size::Unknown => Framing::Chunked,
        };
        self.keep_alive &= framing != Framing::Raw && !self.connection.is_draining();
        let is_without =
            status == StatusCode::NO_CONTENT || status == StatusCode::NOT_MODIFIED || !self.has_body;
        let buffer = self.writer.head(framing);
        put_status(buffer, status);
        put_fields(buffer, &fields);
        put_framing(buffer, framing);
        if framing == Framing::None && !is_without && !fields.contains_key(CONTENT_LENGTH) {
            put_framing(buffer, Framing::Length(0));
        }
        if !self.keep_alive {
            buffer.extend_from_slice(b"connection: close\r\n");
        } else if self.is_http10 {
            buffer.extend_from_slice(b"connection: keep-alive\r\n");
        }
        buffer.extend_from_slice(b"\r\n");
        Ok(())
    }

    fn switch(
        &mut self,
        status: StatusCode,
        fields: HeaderMap,
        protocol: Option<HeaderValue>,
    ) -> Result<(), Broken> {
        let buffer = self.writer.head(Framing::Raw);
        put_status(buffer, status);
        put_fields(buffer, &fields);
        if let Some(protocol) = protocol {
            put_field(buffer, "connection", b"upgrade");
            put_field(buffer, "upgrade", protocol.as_bytes());
        }
        buffer.extend_from_slice(b"\r\n");
        self.keep_alive = false;
        Ok(())
    }

    fn abort(&mut self) {
        self.keep_alive = false;
        self.is_complete = false;
    }

    fn close(&mut self) {
        self.keep_alive = false;
    }
}
