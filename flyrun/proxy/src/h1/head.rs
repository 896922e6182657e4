//! Heads of messages: bytes to values. Pure.

use std::mem::MaybeUninit;

use bytes::{Buf, Bytes, BytesMut};
use http::header::{CONNECTION, CONTENT_LENGTH, HOST, TRANSFER_ENCODING};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use httparse::{Error, Header, Status};

use crate::wire::Size;

/// The most fields that a head may have, whatever its bytes.
pub const MAX_FIELDS: usize = 128;

/// Why a message is refused, and with what a request is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refused {
    pub status: StatusCode,
    /// One sentence.
    pub why: &'static str,
}

impl Refused {
    pub const fn bad(why: &'static str) -> Refused {
        Refused { status: StatusCode::BAD_REQUEST, why }
    }
}

/// What a request is for (RFC 9112, section 3.2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// The origin-form, or what an absolute-form says beside its authority.
    Path(PathAndQuery),
    /// `*`, for OPTIONS.
    Asterisk,
    /// The authority-form, for CONNECT.
    Authority,
}

/// A request's head. The fields have neither Host nor what frames the body.
#[derive(Debug)]
pub(crate) struct RequestHead {
    pub method: Method,
    pub target: Target,
    /// The authority: of the target if it has one, else of Host. `None` is allowed in HTTP/1.0 alone.
    pub host: Option<Bytes>,
    pub is_http10: bool,
    pub fields: HeaderMap,
    pub size: Size,
    /// Whether the connection may carry another request.
    pub keep_alive: bool,
}

/// An answer's head. The fields have nothing of what frames the body, except an answer without one, where Content-Length
/// speaks of another.
#[derive(Debug)]
pub(crate) struct AnswerHead {
    pub status: StatusCode,
    pub fields: HeaderMap,
    pub size: Size,
    /// The body comes in chunks. One of unknown size that does not ends with the connection.
    pub is_chunked: bool,
    pub keep_alive: bool,
}

/// Looks for the end of a head, and remembers where it has looked.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    seen: usize,
}

impl Scan {
    /// The length of the head, with the empty line; `None` if its end has not arrived.
    ///
    /// # Errors
    /// A line ends with a bare LF (RFC 9112, section 2.2), or the head is longer than `max_bytes`.
    pub fn end(&mut self, buffer: &[u8], max_bytes: usize) -> Result<Option<usize>, Refused> {
        let from = self.seen.min(buffer.len());
        for at in memchr::memchr_iter(b'\n', buffer.get(from..).unwrap_or_default()).map(|at| from + at) {
            let before = |count: usize| at.checked_sub(count).and_then(|index| buffer.get(index));
            if before(1) != Some(&b'\r') {
                return Err(Refused::bad("A line ends with a bare LF."));
            }
            if before(2) == Some(&b'\n') {
                self.seen = 0;
                let length = at + 1;
                return if length > max_bytes { Err(TOO_LONG) } else { Ok(Some(length)) };
            }
        }
        self.seen = buffer.len();
        if buffer.len() > max_bytes { Err(TOO_LONG) } else { Ok(None) }
    }
}

const TOO_LONG: Refused = Refused {
    status: StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
    why: "The header is longer than this server takes.",
};

/// Takes empty lines before a request (RFC 9112, section 2.2: at least one is to be ignored).
pub(crate) fn skip_empty_lines(buffer: &mut BytesMut) -> Result<(), Refused> {
    const MAX: usize = 4;
    for _ in 0..MAX {
        if !buffer.starts_with(b"\r\n") {
            return Ok(());
        }
        buffer.advance(2);
    }
    Err(Refused::bad("There are empty lines where a request should be."))
}

/// Reads a request's head, which is whole.
pub(crate) fn request(head: Bytes) -> Result<RequestHead, Refused> {
    let mut fields = [const { MaybeUninit::<Header<'_>>::uninit() }; MAX_FIELDS];
    let mut parsed = httparse::Request::new(&mut []);
    match parsed.parse_with_uninit_headers(&head, &mut fields) {
        Ok(Status::Complete(length)) if length == head.len() => {}
        Ok(_) => return Err(Refused::bad("The header is not one of HTTP.")),
        Err(Error::Version) if !has_version(&head) => return Err(unparsable(Error::Token)),
        Err(error) => return Err(unparsable(error)),
    }
    let (Some(method), Some(path), Some(version)) = (parsed.method, parsed.path, parsed.version) else {
        return Err(Refused::bad("The request line is not one of HTTP."));
    };
    let method =
        Method::from_bytes(method.as_bytes()).map_err(|_| Refused::bad("The method is not a token."))?;
    let is_http10 = version == 0;
    let (target, authority) = target(&head, &method, path)?;
    let mut seen = Seen::default();
    let map = fields_of(&head, parsed.headers, &mut seen)?;
    let host = host(authority, seen.host.take(), seen.hosts, is_http10)?;
    let size = request_size(&seen, is_http10)?;
    Ok(RequestHead {
        keep_alive: seen.keeps_alive(is_http10),
        method,
        target,
        host,
        is_http10,
        fields: map,
        size,
    })
}

/// Reads an answer's head, which is whole.
pub(crate) fn answer(head: Bytes, to: &Method) -> Result<AnswerHead, Refused> {
    let mut fields = [const { MaybeUninit::<Header<'_>>::uninit() }; MAX_FIELDS];
    let mut parsed = httparse::Response::new(&mut []);
    let mut config = httparse::ParserConfig::default();
    config.allow_spaces_after_header_name_in_responses(false);
    match config.parse_response_with_uninit_headers(&mut parsed, &head, &mut fields) {
        Ok(Status::Complete(length)) if length == head.len() => {}
        Ok(_) => return Err(Refused::bad("The header is not one of HTTP.")),
        Err(error) => return Err(unparsable(error)),
    }
    let (Some(code), Some(version)) = (parsed.code, parsed.version) else {
        return Err(Refused::bad("The status line is not one of HTTP."));
    };
    let status = StatusCode::from_u16(code).map_err(|_| Refused::bad("The status is not one of HTTP."))?;
    let mut seen = Seen::default();
    let mut map = fields_of(&head, parsed.headers, &mut seen)?;
    let size = answer_size(&seen, status, to)?;
    if let (Size::None, Some(length)) = (size, seen.length) {
        map.insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    let is_chunked = size == Size::Unknown && seen.is_chunked();
    let keep_alive = seen.keeps_alive(version == 0) && (size != Size::Unknown || is_chunked);
    Ok(AnswerHead { status, fields: map, size, is_chunked, keep_alive })
}

/// Reads fields after a chunked body, with the empty line. What frames or routes a message has no place there
/// (RFC 9110, section 6.5.1) and is left out.
pub(crate) fn trailers(bytes: &Bytes) -> Result<HeaderMap, Refused> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    match httparse::parse_headers(bytes, &mut fields) {
        Ok(Status::Complete((length, parsed))) if length == bytes.len() => {
            let mut seen = Seen::default();
            let mut map = fields_of(bytes, parsed, &mut seen)?;
            crate::fields::strip_from_trailers(&mut map);
            Ok(map)
        }
        Ok(_) => Err(Refused::bad("The trailer is not one of HTTP.")),
        Err(error) => Err(unparsable(error)),
    }
}

/// Whether a request line ends with a version, perhaps an unknown one, where it should.
fn has_version(head: &[u8]) -> bool {
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let mut words = line.split(|byte| *byte == b' ');
    let version = words.nth(2).and_then(|word| word.strip_prefix(b"HTTP/"));
    words.next().is_none()
        && matches!(version, Some([a, b'.', b]) if a.is_ascii_digit() && b.is_ascii_digit())
}

fn unparsable(error: Error) -> Refused {
    match error {
        Error::TooManyHeaders => {
            Refused { status: TOO_LONG.status, why: "The header has more fields than this server takes." }
        }
        Error::Version => Refused {
            status: StatusCode::HTTP_VERSION_NOT_SUPPORTED,
            why: "This server speaks HTTP/1.1 and HTTP/2.",
        },
        Error::HeaderName => Refused::bad("The name of a field is not a token."),
        Error::HeaderValue | Error::NewLine => Refused::bad("A field has characters that it must not have."),
        _ => Refused::bad("The first line is not one of HTTP."),
    }
}

/// What frames and routes a message, as its fields have it.
#[derive(Debug, Default)]
struct Seen {
    host: Option<Bytes>,
    hosts: usize,
    length: Option<u64>,
    has_bad_length: bool,
    /// Each element of Transfer-Encoding is told: how many, how many `chunked`, whether the last is.
    codings: usize,
    chunked: usize,
    ends_chunked: bool,
    close: bool,
    keep: bool,
}

impl Seen {
    fn is_chunked(&self) -> bool {
        self.codings == 1 && self.chunked == 1
    }

    fn keeps_alive(&self, is_http10: bool) -> bool {
        !self.close && (!is_http10 || self.keep)
    }
}

/// The fields as a map, whose values are parts of `head`.
fn fields_of(head: &Bytes, fields: &[Header<'_>], seen: &mut Seen) -> Result<HeaderMap, Refused> {
    let mut map = HeaderMap::with_capacity(fields.len() + 8);
    for field in fields {
        let name = HeaderName::from_bytes(field.name.as_bytes())
            .map_err(|_| Refused::bad("The name of a field is not a token."))?;
        match name {
            HOST => {
                seen.hosts += 1;
                seen.host = Some(head.slice_ref(field.value));
                continue;
            }
            CONTENT_LENGTH => {
                match digits(field.value) {
                    Some(length) if seen.length.is_none() => seen.length = Some(length),
                    // Equal ones could be taken as one; nobody who means well sends them.
                    _ => seen.has_bad_length = true,
                }
                continue;
            }
            TRANSFER_ENCODING => {
                for coding in field.value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
                    seen.codings += 1;
                    seen.ends_chunked = coding.eq_ignore_ascii_case(b"chunked");
                    seen.chunked += usize::from(seen.ends_chunked);
                }
                continue;
            }
            CONNECTION => {
                for option in field.value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
                    seen.close |= option.eq_ignore_ascii_case(b"close");
                    seen.keep |= option.eq_ignore_ascii_case(b"keep-alive");
                }
            }
            _ => {}
        }
        let value = HeaderValue::from_maybe_shared(head.slice_ref(field.value))
            .map_err(|_| Refused::bad("A field has characters that it must not have."))?;
        map.append(name, value);
    }
    Ok(map)
}

/// 1*DIGIT, without sign, list or overflow.
fn digits(value: &[u8]) -> Option<u64> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(value).ok()?.parse().ok()
}

/// RFC 9112, section 6.3, for requests.
fn request_size(seen: &Seen, is_http10: bool) -> Result<Size, Refused> {
    if seen.has_bad_length {
        return Err(Refused::bad("Content-Length is not one number."));
    }
    if seen.codings == 0 {
        return Ok(seen.length.map_or(Size::None, Size::Known));
    }
    if seen.length.is_some() {
        return Err(Refused::bad("There is Content-Length beside Transfer-Encoding."));
    }
    if is_http10 {
        return Err(Refused::bad("HTTP/1.0 has no Transfer-Encoding."));
    }
    if seen.is_chunked() {
        return Ok(Size::Unknown);
    }
    if seen.chunked == 1 && seen.ends_chunked {
        return Err(Refused {
            status: StatusCode::NOT_IMPLEMENTED,
            why: "The only transfer coding here is chunked.",
        });
    }
    Err(Refused::bad("Transfer-Encoding does not end with one chunked."))
}

/// RFC 9112, section 6.3, for answers.
fn answer_size(seen: &Seen, status: StatusCode, to: &Method) -> Result<Size, Refused> {
    if seen.has_bad_length {
        return Err(Refused::bad("Content-Length is not one number."));
    }
    if seen.length.is_some() && seen.codings > 0 {
        return Err(Refused::bad("There is Content-Length beside Transfer-Encoding."));
    }
    let has_none = to == Method::HEAD
        || status.is_informational()
        || status == StatusCode::NO_CONTENT
        || status == StatusCode::NOT_MODIFIED
        || to == Method::CONNECT && status.is_success();
    match (has_none, seen.length) {
        (true, _) => Ok(Size::None),
        (false, Some(length)) => Ok(Size::Known(length)),
        (false, None) if seen.codings == 0 || seen.is_chunked() => Ok(Size::Unknown),
        (false, None) => Err(Refused::bad("The only transfer coding here is chunked.")),
    }
}

fn target(head: &Bytes, method: &Method, text: &str) -> Result<(Target, Option<Bytes>), Refused> {
    const BAD: Refused = Refused::bad("The request target is not one of HTTP.");
    // '#' begins a fragment, which is never sent.
    if !text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#') {
        return Err(BAD);
    }
    let bytes = head.slice_ref(text.as_bytes());
    if method == Method::CONNECT {
        return Ok((Target::Authority, Some(bytes)));
    }
    if text.starts_with('/') {
        let path = PathAndQuery::from_maybe_shared(bytes).map_err(|_| BAD)?;
        return Ok((Target::Path(path), None));
    }
    if text == "*" && method == Method::OPTIONS {
        return Ok((Target::Asterisk, None));
    }
    let scheme = ["http://", "https://"]
        .into_iter()
        .find(|scheme| text.get(..scheme.len()).is_some_and(|start| start.eq_ignore_ascii_case(scheme)));
    let rest = scheme.and_then(|scheme| text.get(scheme.len()..)).ok_or(BAD)?;
    let cut = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(cut);
    let path = if path.starts_with('/') {
        PathAndQuery::from_maybe_shared(head.slice_ref(path.as_bytes())).map_err(|_| BAD)?
    } else {
        PathAndQuery::from_maybe_shared(Bytes::from(format!("/{path}"))).map_err(|_| BAD)?
    };
    Ok((Target::Path(path), Some(head.slice_ref(authority.as_bytes()))))
}

/// RFC 9112, section 3.2: one Host, and valid, even where the target has an authority.
fn host(
    authority: Option<Bytes>,
    host: Option<Bytes>,
    count: usize,
    is_http10: bool,
) -> Result<Option<Bytes>, Refused> {
    if count > 1 {
        return Err(Refused::bad("There is more than one Host."));
    }
    if count == 0 && !is_http10 {
        return Err(Refused::bad("There is no Host."));
    }
    if ![&authority, &host].into_iter().flatten().all(|name| is_authority(name)) {
        return Err(Refused::bad("Host is not a host name."));
    }
    Ok(authority.or(host))
}

/// `uri-host [ ":" port ]` (RFC 9110, section 7.2), not empty and without userinfo.
pub(crate) fn is_authority(text: &[u8]) -> bool {
    let (host, port) = split_port(text);
    let is_name = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=%".contains(byte);
    let is_address = |byte: &u8| byte.is_ascii_hexdigit() || b":.".contains(byte);
    let is_host = match host.strip_prefix(b"[").and_then(|rest| rest.strip_suffix(b"]")) {
        Some(inner) => !inner.is_empty() && inner.iter().all(is_address),
        None => !host.is_empty() && host.iter().all(is_name),
    };
    is_host && port.is_none_or(|port| port.len() <= 5 && port.iter().all(u8::is_ascii_digit))
}

/// Host and port of an authority.
pub(crate) fn split_port(text: &[u8]) -> (&[u8], Option<&[u8]>) {
    let colon = text.iter().rposition(|byte| *byte == b':');
    match colon.map(|at| text.split_at(at)) {
        Some((host, port)) if !host.starts_with(b"[") || host.ends_with(b"]") => (host, port.get(1..)),
        _ => (text, None),
    }
}
