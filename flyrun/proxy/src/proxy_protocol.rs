//! The header that tells a machine who is at the other end of a raw connection: PROXY protocol, versions 1 and 2
//! (haproxy.org/download/3.0/doc/proxy-protocol.txt). Pure.

use std::net::{IpAddr, SocketAddr};

use app::config::model::ProxyProtocol;
use bytes::{BufMut as _, BytesMut};

const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, and the command PROXY.
const PROXY: u8 = 0x21;
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
}
