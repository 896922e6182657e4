//! Whatever bytes come, and however they are cut, a message is read in one way only.

use bytes::{Bytes, BytesMut};
use http::Method;
use proptest::collection::vec;
use proptest::prelude::*;

use super::chunk::{Chunks, Step};
use super::head::{self, Scan};
use super::writer::decimal;
use crate::wire::{Frame, Size};

/// The data, the trailers' names, and what is left; `None` if it was refused.
type Decoded = Option<(Vec<u8>, Vec<String>, Vec<u8>, bool)>;

/// Decodes a chunked body that comes in these pieces.
fn decode(pieces: &[&[u8]]) -> Decoded {
    let (mut chunks, mut buffer) = (Chunks::new(), BytesMut::new());
    let (mut data, mut trailers) = (Vec::new(), Vec::new());
    let mut is_over = false;
    for piece in pieces {
        buffer.extend_from_slice(piece);
        while !is_over {
            match chunks.next(&mut buffer).ok()? {
                Step::Frame(Frame::Data(more)) => data.extend_from_slice(&more),
                Step::Frame(Frame::Trailers(fields)) => {
                    trailers.extend(fields.keys().map(ToString::to_string))
                }
                Step::More => break,
                Step::End => is_over = true,
            }
        }
    }
    Some((data, trailers, buffer.to_vec(), is_over))
}

/// Bytes that look like chunks more often than not.
fn chunkish() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        4 => vec(any::<u8>(), 0..20).prop_map(|data| {
            [format!("{:x}\r\n", data.len()).into_bytes(), data, b"\r\n".to_vec()].concat()
        }),
        1 => Just(b"0\r\n".to_vec()),
        1 => Just(b"\r\n".to_vec()),
        1 => Just(b"A: b\r\n".to_vec()),
        1 => Just(b"3;x=\"y\"\r\nabc\r\n".to_vec()),
        1 => vec(any::<u8>(), 0..4),
    ];
    vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn chunks_are_the_same_however_they_are_cut(bytes in chunkish(), cuts in vec(any::<prop::sample::Index>(), 0..6)) {
        let mut at: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
        at.extend([0, bytes.len()]);
        at.sort_unstable();
        let pieces: Vec<&[u8]> = at.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect();
        prop_assert_eq!(decode(&pieces), decode(&[&bytes]));
    }

    #[test]
    fn what_is_encoded_in_chunks_is_decoded(data in vec(vec(any::<u8>(), 1..3000), 0..8), next in vec(any::<u8>(), 0..20)) {
        let mut bytes = Vec::new();
        for one in &data {
            bytes.extend(format!("{:X}\r\n", one.len()).into_bytes());
            bytes.extend_from_slice(one);
            bytes.extend_from_slice(b"\r\n");
        }
        bytes.extend_from_slice(b"0\r\n\r\n");
        bytes.extend_from_slice(&next);
        prop_assert_eq!(decode(&[&bytes]), Some((data.concat(), vec![], next, true)));
    }

    #[test]
    fn any_bytes_are_a_head_or_refused(bytes in vec(any::<u8>(), 0..300)) {
        let _ = head::request(Bytes::from(bytes.clone()));
        let _ = head::answer(Bytes::from(bytes.clone()), &Method::GET);
        let _ = head::trailers(&Bytes::from(bytes));
    }

    #[test]
    fn a_head_with_one_byte_changed_never_has_two_readings(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let good = b"POST /a?b HTTP/1.1\r\nHost: a.example\r\nContent-Length: 5\r\nTransfer-Encodin: chunked\r\n\r\n";
        let mut bytes = good.to_vec();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        // A head is read once its end was found, and with that its lines.
        let end = Scan::default().end(&bytes, 1000);
        prop_assume!(end == Ok(Some(bytes.len())));
        if let Ok(head) = head::request(Bytes::from(bytes.clone())) {
            // Another length may come of it, which is then what the field says.
            let text = String::from_utf8_lossy(&bytes).to_ascii_lowercase();
            let length = text.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
            prop_assert_eq!(head.size, length.map_or(Size::None, Size::Known));
            for (_, value) in &head.fields {
                prop_assert!(value.as_bytes().iter().all(|byte| *byte == b'\t' || !byte.is_ascii_control()));
            }
        }
    }

    #[test]
    fn the_end_of_a_head_is_found_however_it_comes(lines in vec("[a-z]{0,5}", 1..6), cuts in vec(any::<prop::sample::Index>(), 0..5)) {
        // An empty line is the end.
        let text = lines.iter().map(|line| format!("{line}\r\n")).collect::<String>() + "\r\n";
        let mut at: Vec<_> = cuts.iter().map(|cut| cut.index(text.len() + 1)).collect();
        at.push(text.len());
        at.sort_unstable();
        let mut whole = Scan::default();
        let expected = whole.end(text.as_bytes(), 1000);
        let mut scan = Scan::default();
        let found = at.iter().find_map(|end| scan.end(&text.as_bytes()[..*end], 1000).transpose());
        prop_assert_eq!(found, Some(expected.map(|end| end.unwrap_or_default())));
    }

    #[test]
    fn numbers_are_written_as_they_are(number in any::<u64>()) {
        let (mut digits, text) = ([0; 20], number.to_string());
        prop_assert_eq!(decimal(number, &mut digits), text.as_bytes());
    }
    #[test]
    fn requests_are_the_same_however_they_are_cut_and_passed_on_as_one(
        bytes in vec(prop_oneof![
            4 => request_line(),
            2 => Just(b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nT: u\r\n\r\n".to_vec()),
            2 => Just(b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc".to_vec()),
            1 => vec(any::<u8>(), 0..10),
        ], 0..6),
        piece in 1..40_usize,
    ) {
        crate::fuzzing::requests(&bytes.concat(), piece);
    }
}

fn request_line() -> impl Strategy<Value = Vec<u8>> {
    let name = prop_oneof![
        Just("Host"),
        Just("Content-Length"),
        Just("Transfer-Encoding"),
        Just("Connection"),
        Just("X-A"),
        Just("TE")
    ];
    let value = prop_oneof![
        Just("a"),
        Just("3"),
        Just("chunked"),
        Just("close, host"),
        Just("trailers"),
        Just("a\u{1}"),
        Just("")
    ];
    let method = prop_oneof![Just("GET"), Just("POST"), Just("OPTIONS"), Just("CONNECT")];
    let target =
        prop_oneof![Just("/"), Just("*"), Just("http://b/c"), Just("http://b"), Just("b:1"), Just("/%00?#")];
    (method, target, vec((name, value), 0..5)).prop_map(|(method, target, fields)| {
        let fields: String = fields.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        format!("{method} {target} HTTP/1.1\r\nHost: a\r\n{fields}\r\n").into_bytes()
    })
}
