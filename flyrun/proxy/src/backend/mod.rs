//! Connections to machines, kept between requests. None outlives the life of its machine.

pub(crate) mod h1;
mod h2;
mod lives;

pub(crate) use lives::{Life, Lives};

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use tokio::net::TcpStream;

use crate::fields::Added;
use crate::h1::head::Target;
use crate::metrics::AppMetrics;
use crate::socket::Socket;
use crate::wire::{Broken, Copy, Frame, Incoming, Outgoing, Size};

/// A request as a machine gets it.
#[derive(Clone, Debug)]
pub(crate) struct Outbound {
    pub method: Method,
    pub target: Target,
    pub authority: Bytes,
    pub fields: HeaderMap,
    /// The proxy's own, after the client's.
    pub added: Added,
    pub size: Size,
    /// The protocol to go on with, in HTTP/1.1's words.
    pub upgrade: Option<HeaderValue>,
}

/// A machine's answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub status: StatusCode,
    pub fields: HeaderMap,
    pub size: Size,
}

/// A connection, or a stream of one, with a request on it.
pub(crate) struct Exchange {
    pub input: Input,
    pub output: Output,
    kind: Kind,
    /// Whether it had carried a request before.
    pub is_reused: bool,
    pub life: Arc<Life>,
    method: Method,
    /// How far the request's body has come, and whether the machine takes no more of it.
    pub upload: (Copy, bool),
}

enum Kind {
    H1(h1::Spare),
    H2(h2::Pending),
}

/// Gives the answer's body.
pub(crate) enum Input {
    H1(crate::h1::Reader),
    H2(crate::h2::Receive),
}

/// Takes the request's body.
pub(crate) enum Output {
    H1(crate::h1::Writer),
    H2(crate::h2::Send),
}

/// Where a service of a machine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Service {
    pub address: SocketAddr,
    pub is_h2: bool,
}

/// Where connections go, and what they may take.
#[derive(Clone, Copy)]
pub(crate) struct To<'a> {
    pub life: &'a Arc<Life>,
    pub service: Service,
    /// Until it is connected.
    pub limit: Duration,
    pub metrics: &'a AppMetrics,
}

impl Exchange {
    /// Begins a request, on a connection that is there (`may_reuse`) or a new one.
    pub async fn begin(to: To<'_>, outbound: &Outbound, may_reuse: bool) -> Result<Exchange, Broken> {
        if to.service.is_h2 && outbound.upgrade.is_none() && outbound.method != Method::CONNECT {
            h2::begin(to, outbound, may_reuse).await
        } else {
            h1::begin(to, outbound, may_reuse).await
        }
    }

    /// The answer's head, or one that goes before it (1xx).
    pub fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<Result<Answer, Broken>> {
        match (&mut self.kind, &mut self.input) {
            (Kind::H1(spare), Input::H1(reader)) => spare.poll_answer(cx, reader, &self.method),
            (Kind::H2(pending), input) => pending.poll_answer(cx, input),
            (Kind::H1(_), Input::H2(_)) => Poll::Ready(Err(Broken::Closed)),
        }
    }

    /// From here on it is bytes, both ways.
    pub fn raw(&mut self) {
        self.input.raw();
        if let Output::H1(writer) = &mut self.output {
            writer.head(crate::h1::Framing::Raw);
        }
    }

    /// The answer's body. One that has no length ends with its connection, and is not whole if the machine's life has ended that.
    pub fn answer_body(&mut self) -> impl Incoming {
        AnswerBody { input: &mut self.input, life: &self.life }
    }

    /// The exchange is over. If both messages are whole the connection is kept.
    pub fn finish(self) {
        if let (Kind::H1(spare), Input::H1(reader), Output::H1(writer)) = (self.kind, self.input, self.output)
        {
            spare.keep(reader, writer, &self.life);
        }
    }
}

struct AnswerBody<'e> {
    input: &'e mut Input,
    life: &'e Life,
}

impl Incoming for AnswerBody<'_> {
    fn raw(&mut self) {
        self.input.raw();
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, Broken>>> {
        let frame = self.input.poll_frame(cx);
        let is_cut = matches!(frame, Poll::Ready(None)) && self.input.is_raw() && self.life.is_over();
        if is_cut { Poll::Ready(Some(Err(Broken::Closed))) } else { frame }
    }
}

impl Input {
    /// Whether it ends with its connection alone.
    fn is_raw(&self) -> bool {
        matches!(self, Input::H1(reader) if reader.is_raw())
    }
}

impl Incoming for Input {
    fn raw(&mut self) {
        match self {
            Input::H1(reader) => reader.raw(),
            Input::H2(receive) => receive.raw(),
        }
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, Broken>>> {
        match self {
            Input::H1(reader) => reader.poll_frame(cx),
            Input::H2(receive) => receive.poll_frame(cx),
        }
    }
}

impl Outgoing for Output {
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        match self {
            Output::H1(writer) => writer.poll_ready(cx),
            Output::H2(send) => send.poll_ready(cx),
        }
    }

    fn push(&mut self, frame: Frame) -> Result<(), Broken> {
        match self {
            Output::H1(writer) => writer.push(frame),
            Output::H2(send) => send.push(frame),
        }
    }

    fn end(&mut self) -> Result<(), Broken> {
        match self {
            Output::H1(writer) => writer.end(),
            Output::H2(send) => send.end(),
        }
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        match self {
            Output::H1(writer) => writer.poll_flush(cx),
            Output::H2(send) => send.poll_flush(cx),
        }
    }
}

/// A connection to a machine that has carried nothing, which ends with this life of it.
pub(crate) async fn connect(
    life: &Life,
    address: SocketAddr,
    limit: Duration,
    metrics: &AppMetrics,
) -> io::Result<Socket> {
    let stream = match life.take_opened(address) {
        Some(stream) => stream,
        None => connect_anew(address, limit, metrics).await?,
    };
    metrics.app_connects.fetch_add(1, Relaxed);
    let socket = Socket::new(stream);
    if life.own(&socket) { Ok(socket) } else { Err(io::ErrorKind::ConnectionAborted.into()) }
}

async fn connect_anew(address: SocketAddr, limit: Duration, metrics: &AppMetrics) -> io::Result<TcpStream> {
    let start = std::time::Instant::now();
    let connected = match tokio::time::timeout(limit, TcpStream::connect(address)).await {
        Ok(connected) => connected,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    };
    let stream = connected.inspect_err(|_| {
        metrics.app_connect_errors.fetch_add(1, Relaxed);
    })?;
    metrics.connect_seconds.add(start.elapsed());
    Ok(stream)
}
