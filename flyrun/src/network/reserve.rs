//! Published ports are bound on the host too, though no packet gets so far: that is how another program, or another
//! flyrun, is told that they are taken, and how this one learns it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, getsockname, socket_with, sockopt};

use super::port_taken;
use super::publish::{Protocol, Publish};
use crate::error::{Error, Result};

/// A bound socket.
#[derive(Debug)]
pub struct Reserved {
    _sockets: Vec<OwnedFd>,
}

/// Binds all ports; those that are 0 become ones that are free.
///
/// # Errors
/// One of them is taken, or its address is not the host's.
pub fn reserve(wishes: &[Publish]) -> Result<(Vec<Reserved>, Vec<Publish>)> {
    let mut reserved = Vec::new();
    let mut published = Vec::new();
    for wish in wishes {
        let (sockets, port) = bind_all(wish).map_err(|errno| told(wish, errno))?;
        reserved.push(Reserved { _sockets: sockets });
        published.push(Publish { host: port, ..*wish });
    }
    Ok((reserved, published))
}

fn told(wish: &Publish, errno: Errno) -> Error {
    match errno {
        Errno::ADDRINUSE => port_taken(wish),
        Errno::ADDRNOTAVAIL => Error::new(format!("-p {wish}: this host does not have that address"))
            .advice("`ip address` lists those it has; without an address a port is published on all."),
        Errno::ACCESS => Error::new(format!("-p {wish}: no permission to use a port below 1024")),
        errno => Error::caused(format!("-p {wish}: cannot reserve the port"), &std::io::Error::from(errno)),
    }
}

fn bind_all(wish: &Publish) -> rustix::io::Result<(Vec<OwnedFd>, u16)> {
    if let Some(address) = wish.host_ip {
        let (socket, port) = bind_one(SocketAddr::new(address, wish.host), wish.protocol)?;
        return Ok((vec![socket], port));
    }
    let (socket, port) = bind_one((Ipv4Addr::UNSPECIFIED, wish.host).into(), wish.protocol)?;
    match bind_one(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port), wish.protocol) {
        Ok((other, _)) => Ok((vec![socket, other], port)),
        // A host without IPv6.
        Err(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) => Ok((vec![socket], port)),
        Err(errno) => Err(errno),
    }
}

fn bind_one(address: SocketAddr, protocol: Protocol) -> rustix::io::Result<(OwnedFd, u16)> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let kind = match protocol {
        Protocol::Tcp => SocketType::STREAM,
        Protocol::Udp => SocketType::DGRAM,
    };
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    bind(&socket, &address)?;
    let bound = SocketAddr::try_from(getsockname(&socket)?)?;
    Ok((socket, bound.port()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::publish::parse;

    #[test]
    fn a_port_is_reserved_once_and_free_again_afterwards() {
        let wish = parse("127.0.0.1::80").unwrap();
        let (first, published) = reserve(&wish).unwrap();
        assert_ne!(published[0].host, 0);
        let error = reserve(&published).unwrap_err().to_string();
        assert!(
            error.contains("already in use") && error.contains(&published[0].host.to_string()),
            "{error}"
        );
        drop(first);
        reserve(&published).unwrap();
    }

    #[test]
    fn an_address_of_another_host_is_named() {
        let error = reserve(&parse("192.0.2.1:0:80").unwrap_or(parse("192.0.2.1::80").unwrap())).unwrap_err();
        assert!(error.to_string().contains("does not have that address"), "{error}");
    }
}
