//! HTTP/1.1 to machines.

use std::net::SocketAddr;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use http::header::{CONNECTION, CONTENT_LENGTH, HOST, TE, UPGRADE};
use http::{Method, StatusCode};

use super::{Answer, Exchange, Input, Kind, Life, Outbound, Output, To};
use crate::h1::head::{self, Target};
use crate::h1::{Body, Framing, NoHead, Reader, Writer, put_field, put_fields, put_framing};
use crate::socket::{self, Socket};
use crate::wire::{Broken, Size};

/// The most bytes of an answer's head.
const MAX_HEAD_BYTES: usize = 128 << 10;
/// A request that must not be sent twice goes only on a connection that was used so lately: the machine may be about to
/// close one that was not.
const FRESH: Duration = Duration::from_millis(1500);

/// A connection that waits for its next request.
pub(crate) struct Idle {
    reader: Reader,
    writer: Writer,
    socket: Socket,
    pub since: Instant,
}

impl Idle {
    /// As far as is known without asking the kernel.
    pub fn is_open(&self) -> bool {
        self.socket.is_quiet()
    }
}

/// What makes a connection fit for another request.
pub(crate) struct Spare {
    socket: Socket,
    address: SocketAddr,
    keep_alive: bool,
}

pub(super) async fn begin(to: To<'_>, outbound: &Outbound, may_reuse: bool) -> Result<Exchange, Broken> {
    let fresh_for = if outbound.method.is_safe() { Duration::MAX } else { FRESH };
    let idle = if may_reuse { to.life.take_idle(to.service.address, fresh_for) } else { None };
    let is_reused = idle.is_some();
    let (reader, mut writer, socket) = match idle {
        Some(Idle { reader, writer, socket, .. }) => (reader, writer, socket),
        None => {
            let socket = super::connect(to.life, to.service.address, to.limit, to.metrics).await?;
            let (read, write) = socket::plain(&socket);
            (Reader::new(read, BytesMut::new()), Writer::new(write), socket)
        }
    };
    let framing = framing(outbound.size);
    put_request(writer.head(framing), framing, outbound);
    let spare = Spare { socket, address: to.service.address, keep_alive: false };
    Ok(Exchange {
        input: Input::H1(reader),
        output: Output::H1(writer),
        kind: Kind::H1(spare),
        is_reused,
        life: to.life.clone(),
        method: outbound.method.clone(),
        upload: Default::default(),
    })
}

pub(crate) fn framing(size: Size) -> Framing {
    match size {
        Size::None => Framing::None,
        Size::Known(length) => Framing::Length(length),
        Size::Unknown => Framing::Chunked,
    }
}

/// The head of a request.
pub(crate) fn put_request(buffer: &mut BytesMut, framing: Framing, outbound: &Outbound) {
    buffer.extend_from_slice(outbound.method.as_str().as_bytes());
    buffer.extend_from_slice(b" ");
    match &outbound.target {
        Target::Path(path) => buffer.extend_from_slice(path.as_str().as_bytes()),
        Target::Asterisk => buffer.extend_from_slice(b"*"),
        Target::Authority => buffer.extend_from_slice(&outbound.authority),
    }
    buffer.extend_from_slice(b" HTTP/1.1\r\n");
    put_field(buffer, HOST.as_str(), &outbound.authority);
    put_fields(buffer, &outbound.fields);
    for (name, value) in &outbound.added {
        put_field(buffer, name.as_str(), value.as_bytes());
    }
    put_framing(buffer, framing);
    if let Some(protocol) = &outbound.upgrade {
        put_field(buffer, CONNECTION.as_str(), b"upgrade");
        put_field(buffer, UPGRADE.as_str(), protocol.as_bytes());
    } else if outbound.added.iter().any(|(name, _)| *name == TE) {
        put_field(buffer, CONNECTION.as_str(), TE.as_str().as_bytes());
    }
    buffer.extend_from_slice(b"\r\n");
}

impl Spare {
    pub fn poll_answer(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut Reader,
        to: &Method,
    ) -> Poll<Result<Answer, Broken>> {
        let bytes = ready!(reader.poll_head(cx, MAX_HEAD_BYTES, false)).map_err(|error| match error {
            NoHead::End => Broken::Closed,
            NoHead::Broken(broken) => broken,
            NoHead::Refused(refused) => Broken::Malformed(refused.why),
        })?;
        let head = head::answer(bytes, to).map_err(|refused| Broken::Malformed(refused.why))?;
        let mut fields = head.fields;
        if head.status.is_informational() {
            fields.remove(CONTENT_LENGTH);
        }
        if !head.status.is_informational() || head.status == StatusCode::SWITCHING_PROTOCOLS {
            self.keep_alive = head.keep_alive;
            reader.expect(match head.size {
                Size::None => Body::None,
                Size::Known(length) => Body::Length(length),
                Size::Unknown if head.is_chunked => Body::chunked(),
                Size::Unknown => Body::Raw,
            });
        }
        Poll::Ready(Ok(Answer { status: head.status, fields, size: head.size }))
    }

    /// The connection waits for the life's next request, if both messages are whole.
    pub fn keep(self, mut reader: Reader, writer: Writer, life: &Life) {
        let is_whole =
            reader.is_between_messages() && writer.is_between_messages() && reader.buffer().is_empty();
        if self.keep_alive && is_whole {
            reader.shrink();
            let idle = Idle { reader, writer, socket: self.socket, since: Instant::now() };
            life.keep_idle(self.address, idle);
        }
    }
}
