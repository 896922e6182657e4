//! What the fuzz target and the property tests hold true of any bytes that a client can send.

use std::future::Future as _;
use std::net::{IpAddr, Ipv4Addr};
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use app::config::model::ProxyProtocol;
use bytes::{Bytes, BytesMut};
use http::{HeaderValue, Method};
use ipnet::IpNet;

use crate::backend::{Outbound, h1};
use crate::fields::{self, Told};
use crate::h1::chunk::{Chunks, Step};
use crate::h1::head::{self, RequestHead, Scan};
use crate::machines::Steer;
use crate::wire::{Frame, Size};
use crate::{Facts, believed, proxy_protocol, replay};

const MAX_HEAD_BYTES: usize = 4096;

/// What a recipient takes bytes for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Event {
    Request(String),
    Data(Vec<u8>),
    End,
    Refused,
}

/// Reads requests as the proxy does, from bytes in pieces of this length.
fn read(bytes: &[u8], piece: usize) -> (Vec<Event>, Vec<RequestHead>) {
    let (mut events, mut heads) = (Vec::new(), Vec::new());
    let (mut buffer, mut scan, mut body) = (BytesMut::new(), Scan::default(), None::<Body>);
    for piece in bytes.chunks(piece.max(1)) {
        buffer.extend_from_slice(piece);
        loop {
            match step(&mut buffer, &mut scan, &mut body, &mut heads) {
                Ok(Some(Event::Data(more))) => match events.last_mut() {
                    Some(Event::Data(data)) => data.extend(more),
                    _ => events.push(Event::Data(more)),
                },
                Ok(Some(event)) => events.push(event),
                Ok(None) => break,
                Err(()) => {
                    events.push(Event::Refused);
                    return (events, heads);
                }
            }
        }
    }
    (events, heads)
}

enum Body {
    Length(u64),
    Chunks(Chunks),
}

fn step(
    buffer: &mut BytesMut,
    scan: &mut Scan,
    body: &mut Option<Body>,
    heads: &mut Vec<RequestHead>,
) -> Result<Option<Event>, ()> {
    match body {
        None => {
            head::skip_empty_lines(buffer).map_err(|_| ())?;
            let Some(end) = scan.end(buffer, MAX_HEAD_BYTES).map_err(|_| ())? else { return Ok(None) };
            *scan = Scan::default();
            let head = head::request(buffer.split_to(end).freeze()).map_err(|_| ())?;
            *body = Some(match head.size {
                Size::None => Body::Length(0),
                Size::Known(length) => Body::Length(length),
                Size::Unknown => Body::Chunks(Chunks::new()),
            });
            let event = Event::Request(format!("{head:?}"));
            heads.push(head);
            Ok(Some(event))
        }
        Some(Body::Length(0)) => {
            *body = None;
            Ok(Some(Event::End))
        }
        Some(Body::Length(left)) if !buffer.is_empty() => {
            let count = usize::try_from(*left).unwrap_or(usize::MAX).min(buffer.len());
            *left -= count as u64;
            Ok(Some(Event::Data(buffer.split_to(count).to_vec())))
        }
        Some(Body::Length(_)) => Ok(None),
        Some(Body::Chunks(chunks)) => match chunks.next(buffer).map_err(|_| ())? {
            Step::Frame(Frame::Data(data)) => Ok(Some(Event::Data(data.to_vec()))),
            Step::Frame(Frame::Trailers(fields)) => Ok(Some(Event::Request(format!("{fields:?}")))),
            Step::More => Ok(None),
            Step::End => {
                *body = None;
                Ok(Some(Event::End))
            }
        },
    }
}

/// How bytes are cut makes no difference to what they are; and a request that is passed on is one request to whoever gets
/// it, with the same target and a body of the same size.
///
/// # Panics
/// It is not so.
pub fn requests(bytes: &[u8], piece: usize) {
    let (whole, heads) = read(bytes, usize::MAX);
    let (cut, _) = read(bytes, piece);
    // Refused early or late, what goes before is the same as far as it goes.
    let same = cut.iter().zip(&whole).take_while(|(a, b)| a == b).count();
    let is_refused = [&cut, &whole].iter().all(|events| events.last() == Some(&Event::Refused));
    assert!(cut == whole || is_refused && same + 2 >= cut.len().max(whole.len()), "{cut:?} {whole:?}");
    for head in heads {
        passed_on(head);
    }
}

/// A header of the PROXY protocol that is understood is understood as the same when it is written anew.
///
/// # Panics
/// It is not so.
pub fn proxy_header(mut bytes: &[u8]) {
    let Some(Ok(Some((client, server)))) = header_of(&mut bytes) else { return };
    if client.is_ipv4() != server.is_ipv4()
        || [client, server].iter().any(|end| end.ip() != end.ip().to_canonical())
    {
        return;
    }
    for version in [ProxyProtocol::V1, ProxyProtocol::V2] {
        let written = proxy_protocol::header(version, client, server);
        let mut left = &written[..];
        assert_eq!(header_of(&mut left), Some(Ok(Some((client, server)))), "{written:?}");
        assert!(left.is_empty(), "{written:?}");
    }
}

/// What a machine answers: a head that is read has one size, and what the client gets of it names no other.
///
/// # Panics
/// It is not so.
pub fn answers(bytes: &[u8]) {
    let Some((method, bytes)) = bytes.split_first() else { return };
    let method = [Method::GET, Method::HEAD, Method::CONNECT][usize::from(method % 3)].clone();
    let Ok(Some(end)) = Scan::default().end(bytes, MAX_HEAD_BYTES) else { return };
    let Ok(answer) = head::answer(Bytes::copy_from_slice(&bytes[..end]), &method) else { return };
    assert!((100..1000).contains(&answer.status.as_u16()));
    let lengths: Vec<_> = answer.fields.get_all("content-length").iter().collect();
    assert!(lengths.len() <= 1, "{lengths:?}");
    assert!(!answer.is_chunked || answer.size == Size::Unknown);
    assert!(answer.size != Size::Unknown || answer.is_chunked || !answer.keep_alive, "where does it end?");
    let mut fields = answer.fields;
    fields::strip_hop_by_hop(&mut fields);
    assert!(["connection", "transfer-encoding", "keep-alive"].iter().all(|name| !fields.contains_key(*name)));
    for value in fields.get_all("fly-replay").iter().filter_map(|value| value.to_str().ok()) {
        replayed(value);
    }
}

/// What is asked for is said in the field, and what another machine is told of it is one field again.
fn replayed(text: &str) {
    let replay = replay::read(text);
    let instance = match &replay.steer {
        Some(Steer::Force(name) | Steer::Prefer(name)) => Some(name),
        None => None,
    };
    assert!(
        [replay.app.as_ref(), instance, replay.state.as_ref()]
            .into_iter()
            .flatten()
            .all(|it| text.contains(it))
    );
    let told = replay::source("machine", "local", 1, replay.state.as_deref());
    assert!(
        HeaderValue::from_str(&told).is_ok() || replay.state.is_some_and(|state| !state.is_ascii()),
        "{told:?}"
    );
}

/// Certificates with their key, as an authority or a user writes them, and a certificate alone.
///
/// # Panics
/// They are told to hold before they begin.
pub fn certificates(bytes: &[u8]) {
    let _ = Facts::of_pair(bytes);
    if let Some(facts) = Facts::of_der(bytes) {
        let _ = facts.seconds_left(facts.not_before);
        assert!(facts.names.iter().all(|name| !name.contains(|c: char| c.is_ascii_uppercase())));
    }
}

/// Bytes that are there are read without waiting.
fn header_of(bytes: &mut &[u8]) -> Option<Result<proxy_protocol::Ends, proxy_protocol::NoHeader>> {
    match pin!(proxy_protocol::read(bytes)).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(read) => Some(read),
        Poll::Pending => None,
    }
}

fn passed_on(head: RequestHead) {
    let text = |text: &'static str| HeaderValue::from_static(text);
    let peer = Ipv4Addr::new(192, 0, 2, 1).into();
    let own = Told::of(peer, 80, false);
    // As if whoever sends it were a proxy that is trusted: then its words go on.
    let trusted = [IpNet::from(peer), IpNet::from(IpAddr::from(Ipv4Addr::LOCALHOST))];
    let believed = believed::read(peer, &own, &trusted, &head.fields);
    let told = believed.map_or(own, |believed| believed.told);
    assert!(told.forwarded_for.as_bytes().ends_with(b"192.0.2.1"), "{told:?}");
    let (size, target, method) = (head.size, head.target.clone(), head.method.clone());
    let authority = head.host.clone().unwrap_or(Bytes::from_static(b"app"));
    let mut outbound = Outbound {
        method: head.method,
        target: head.target,
        authority: authority.clone(),
        fields: head.fields,
        added: Vec::new(),
        size: head.size,
        upgrade: None,
    };
    outbound.added = fields::to_machine(&mut outbound.fields, &told, &text("r"), &text("id"), "1.1 p");
    let (mut buffer, framing) = (BytesMut::new(), h1::framing(size));
    h1::put_request(&mut buffer, framing, &outbound);
    let length = buffer.len();
    let again = Scan::default().end(&buffer, usize::MAX).ok().flatten();
    assert_eq!(again, Some(length), "{buffer:?} ends before its end");
    // A client may send as many fields as are taken; with the proxy's they may be more than that.
    if outbound.fields.len() + outbound.added.len() + 4 > head::MAX_FIELDS {
        return;
    }
    let again = head::request(buffer.clone().freeze());
    assert!(again.is_ok(), "{buffer:?} is refused: {again:?}");
    if let Ok(again) = again {
        assert_eq!((again.size, again.target, again.method), (size, target, method), "{buffer:?}");
        assert_eq!(again.host, Some(authority));
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    type Target<'a> = &'a dyn Fn(&[u8]);

    #[test]
    fn what_the_fuzz_targets_begin_with_holds() {
        let targets: &[(&str, Target)] = &[
            ("answers", &answers),
            ("certificates", &certificates),
            ("http1", &|bytes| requests(bytes.get(1..).unwrap_or_default(), 7)),
            ("proxy_protocol", &proxy_header),
        ];
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
        for (name, target) in targets {
            let seeds = fs::read_dir(corpus.join(name)).unwrap().map(|seed| seed.unwrap().path());
            let count = seeds.map(|seed| target(&fs::read(seed).unwrap())).count();
            assert!(count > 0, "{name} has no seeds");
        }
    }
}
