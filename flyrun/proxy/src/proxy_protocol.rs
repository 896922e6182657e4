//! The header that tells who is at the other end of a connection: PROXY protocol, versions 1 and 2
//! (haproxy.org/download/3.0/doc/proxy-protocol.txt). To a machine that wants it, and from a proxy in front that is trusted.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use app::config::model::ProxyProtocol;
use bytes::{Buf as _, BufMut as _, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _};

const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, and the command PROXY.
const PROXY: u8 = 0x21;
/// Version 2, and the command LOCAL: the proxy itself looks whether somebody is there.
const LOCAL: u8 = 0x20;
/// The longest line of version 1, with its end.
const MAX_LINE: usize = 107;
/// Bytes after the first 16 of version 2, with what else may be told there. The specification asks for 536 at least.
const MAX_REST: usize = 4096;
const TCP_OVER_IPV4: u8 = 0x11;
const TCP_OVER_IPV6: u8 = 0x21;

/// The header, for a connection from `client` to `server`.
pub(crate) fn header(version: ProxyProtocol, client: SocketAddr, server: SocketAddr) -> BytesMut {
    let (source, target) = same_family(client.ip().to_canonical(), server.ip().to_canonical());
    let mut header = BytesMut::with_capacity(128);
    match version {
        ProxyProtocol::V1 => {
            let family = if source.is_ipv4() { "TCP4" } else { "TCP6" };
            let line = format!("PROXY {family} {source} {target} {} {}\r\n", client.port(), server.port());
            header.extend_from_slice(line.as_bytes());
        }
        ProxyProtocol::V2 => {
            header.extend_from_slice(SIGNATURE);
            header.put_u8(PROXY);
            match (source, target) {
                (IpAddr::V4(source), IpAddr::V4(target)) => {
                    header.put_u8(TCP_OVER_IPV4);
                    header.put_u16(12);
                    header.extend_from_slice(&source.octets());
                    header.extend_from_slice(&target.octets());
                }
                (source, target) => {
                    header.put_u8(TCP_OVER_IPV6);
                    header.put_u16(36);
                    header.extend_from_slice(&six(source).octets());
                    header.extend_from_slice(&six(target).octets());
                }
            }
            header.put_u16(client.port());
            header.put_u16(server.port());
        }
    }
    header
}

/// What is no such header.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NoHeader;

/// Both ends as the header has them; `None` where the proxy speaks for itself.
pub(crate) type Ends = Option<(SocketAddr, SocketAddr)>;

/// Reads the header, and no byte of what comes after it.
pub(crate) async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<Ends, NoHeader> {
    let broken = |_| NoHeader;
    // No header of either version is shorter.
    let mut start = [0; SIGNATURE.len()];
    stream.read_exact(&mut start).await.map_err(broken)?;
    if start != *SIGNATURE {
        let mut line = start.to_vec();
        while !line.ends_with(b"\r\n") {
            if line.len() >= MAX_LINE {
                return Err(NoHeader);
            }
            line.push(stream.read_u8().await.map_err(broken)?);
        }
        return version_1(&line);
    }
    let mut fixed = [0; 4];
    stream.read_exact(&mut fixed).await.map_err(broken)?;
    let [command, family, length @ ..] = fixed;
    let length = usize::from(u16::from_be_bytes(length));
    if length > MAX_REST {
        return Err(NoHeader);
    }
    let mut rest = vec![0; length];
    stream.read_exact(&mut rest).await.map_err(broken)?;
    version_2(command, family, &rest)
}

fn version_1(line: &[u8]) -> Result<Ends, NoHeader> {
    let line = std::str::from_utf8(line).ok().and_then(|line| line.strip_suffix("\r\n")).ok_or(NoHeader)?;
    let words: Vec<_> = line.split(' ').collect();
    match words.as_slice() {
        ["PROXY", "UNKNOWN", ..] => Ok(None),
        ["PROXY", family @ ("TCP4" | "TCP6"), source, target, source_port, target_port] => {
            let end = |address: &str, port: &str| {
                let address: IpAddr = address.parse().ok()?;
                let fits = address.is_ipv4() == (*family == "TCP4");
                Some(SocketAddr::new(address, port.parse().ok()?)).filter(|_| fits)
            };
            Some(end(source, source_port).zip(end(target, target_port)))
                .filter(Option::is_some)
                .ok_or(NoHeader)
        }
        _ => Err(NoHeader),
    }
}

fn version_2(command: u8, family: u8, mut rest: &[u8]) -> Result<Ends, NoHeader> {
    let (source, target): (IpAddr, IpAddr) = match (command, family) {
        (LOCAL, _) => return Ok(None),
        (PROXY, TCP_OVER_IPV4) => {
            let mut next =
                || rest.try_get_u32().map(|bits| Ipv4Addr::from(bits).into()).map_err(|_| NoHeader);
            (next()?, next()?)
        }
        (PROXY, TCP_OVER_IPV6) => {
            let mut next =
                || rest.try_get_u128().map(|bits| Ipv6Addr::from(bits).into()).map_err(|_| NoHeader);
            (next()?, next()?)
        }
        // A family that is none of TCP's tells nothing of a client.
        (PROXY, _) => return Ok(None),
        _ => return Err(NoHeader),
    };
    let mut port = || rest.try_get_u16().map_err(|_| NoHeader);
    let (source_port, target_port) = (port()?, port()?);
    Ok(Some((SocketAddr::new(source, source_port), SocketAddr::new(target, target_port))))
}

/// Both as IPv4 if both are, else both as IPv6: the header knows no mixture.
fn same_family(source: IpAddr, target: IpAddr) -> (IpAddr, IpAddr) {
    if source.is_ipv4() && target.is_ipv4() {
        return (source, target);
    }
    (IpAddr::V6(six(source)), IpAddr::V6(six(target)))
}

fn six(address: IpAddr) -> std::net::Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn version_1_is_the_line_of_the_specification() {
        let header = |client, server| header(ProxyProtocol::V1, at(client), at(server));
        assert_eq!(
            header("192.0.2.1:56324", "192.0.2.2:443"),
            "PROXY TCP4 192.0.2.1 192.0.2.2 56324 443\r\n"
        );
        assert_eq!(
            header("[2001:db8::1]:1", "[2001:db8::2]:2"),
            "PROXY TCP6 2001:db8::1 2001:db8::2 1 2\r\n"
        );
        assert_eq!(header("[::ffff:192.0.2.1]:1", "192.0.2.2:2"), "PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n");
        assert_eq!(
            header("[2001:db8::1]:1", "192.0.2.2:2"),
            "PROXY TCP6 2001:db8::1 ::ffff:192.0.2.2 1 2\r\n"
        );
    }

    #[test]
    fn version_2_has_addresses_and_ports_in_network_order() {
        let four = header(ProxyProtocol::V2, at("1.2.3.4:258"), at("5.6.7.8:443"));
        assert_eq!(&four[..16], b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c");
        assert_eq!(&four[16..], [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 1, 187]);
        let six = header(ProxyProtocol::V2, at("[2001:db8::1]:1"), at("5.6.7.8:2"));
        assert_eq!(&six[12..16], b"\x21\x21\0\x24");
        assert_eq!(six.len(), 16 + 36);
    }

    fn read_all(mut bytes: &[u8]) -> (Result<Ends, NoHeader>, &[u8]) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let read = runtime.block_on(read(&mut bytes));
        (read, bytes)
    }

    #[test]
    fn what_is_written_is_read_and_nothing_beyond_it() {
        for version in [ProxyProtocol::V1, ProxyProtocol::V2] {
            for (client, server) in
                [("192.0.2.1:56324", "192.0.2.2:443"), ("[2001:db8::1]:1", "[2001:db8::2]:2")]
            {
                let (client, server) = (at(client), at(server));
                let mut bytes = header(version, client, server);
                bytes.extend_from_slice(b"GET /");
                assert_eq!(read_all(&bytes), (Ok(Some((client, server))), &b"GET /"[..]));
            }
        }
    }

    #[test]
    fn a_proxy_may_speak_for_itself() {
        assert_eq!(read_all(b"PROXY UNKNOWN\r\nx"), (Ok(None), &b"x"[..]));
        assert_eq!(read_all(b"PROXY UNKNOWN a b 1 2\r\nx"), (Ok(None), &b"x"[..]));
        assert_eq!(read_all(b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0x"), (Ok(None), &b"x"[..]));
        // A unix socket, with its addresses.
        let unix = [&SIGNATURE[..], b"\x21\x31\0\xd8", &[0; 216], b"x"].concat();
        assert_eq!(read_all(&unix), (Ok(None), &b"x"[..]));
        // TCP, with something after the ports.
        let more = [&SIGNATURE[..], b"\x21\x11\0\x0f", &[1, 1, 1, 1, 2, 2, 2, 2, 0, 1, 0, 2, 9, 9, 9], b"x"]
            .concat();
        assert_eq!(read_all(&more), (Ok(Some((at("1.1.1.1:1"), at("2.2.2.2:2")))), &b"x"[..]));
    }

    #[test]
    fn what_is_no_header_is_refused() {
        let long = [&b"PROXY TCP4 "[..], &[b'1'; 200]].concat();
        for bytes in [
            &b""[..],
            b"GET / HTTP/1.1\r\n\r\n",
            b"PROXY TCP4 1.1.1.1 2.2.2.2 1 2",
            b"PROXY TCP4 1.1.1.1 2.2.2.2 1 2\n",
            b"PROXY TCP4 ::1 ::2 1 2\r\n",
            b"PROXY TCP6 1.1.1.1 2.2.2.2 1 2\r\n",
            b"PROXY TCP4 1.1.1.1 2.2.2.2 1 65536\r\n",
            b"PROXY TCP4  1.1.1.1 2.2.2.2 1 2\r\n",
            b"PROXY TCP4 1.1.1.1 2.2.2.2 1\r\n",
            b"proxy tcp4 1.1.1.1 2.2.2.2 1 2\r\n",
            b"PROXY TCP4 1.1.1.1 2.2.2.2 1 \xff\r\n",
            &long,
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0",
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x04\x01\x01\x01\x01",
            b"\r\n\r\n\0\r\nQUIT\n\x11\x11\0\x0c\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01",
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff",
        ] {
            assert_eq!(read_all(bytes).0, Err(NoHeader), "{:?}", String::from_utf8_lossy(bytes));
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_a_header_or_none(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200), version in 0..3) {
            let start: &[u8] = match version {
                0 => b"",
                1 => b"PROXY TCP4 1.2.3.4 ",
                _ => b"\r\n\r\n\0\r\nQUIT\n\x21\x21\0\x24",
            };
            crate::fuzzing::proxy_header(&[start, &bytes].concat());
        }
    }
}
