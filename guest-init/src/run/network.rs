//! Gives eth0 its addresses and routes: one conversation in rtnetlink(7), a handful of messages.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use protocol::NetworkConfig;
use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    io::Errno,
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with},
};

use crate::failure::{Failure, OrSetup};

const INTERFACE: &str = "eth0";

// linux/rtnetlink.h, linux/if_addr.h and linux/netlink.h.
const NLMSG_ERROR: u16 = 2;
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_NEWROUTE: u16 = 24;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_CREATE: u16 = 0x400;
const IFLA_ADDRESS: u16 = 1;
const IFLA_MTU: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
/// The host gives each address once: nobody need be asked whether it is free.
const IFA_F_NODAD: u8 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_LINK: u8 = 253;
const RTN_UNICAST: u8 = 1;
const IFF_UP: u32 = 1;

/// Brings the card up with its addresses and default routes.
///
/// # Errors
/// [`protocol::FailureKind::Setup`], naming the step that the kernel refuses.
pub fn set_up(config: &NetworkConfig) -> Result<(), Failure> {
    // Nobody sends advertisements to this link, so nobody need be asked for one.
    let _ = openat(
        CWD,
        "/proc/sys/net/ipv6/conf/eth0/accept_ra",
        OFlags::WRONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .and_then(|file| rustix::io::write(file, b"0"));
    converse(|index| messages(config, index), Errno::EXIST)
}

/// Gives the card another place: what it had goes, and with it all that was known of the neighbours.
///
/// # Errors
/// As [`set_up`].
pub fn renew(old: Option<&NetworkConfig>, new: &NetworkConfig) -> Result<(), Failure> {
    if let Some(old) = old {
        // The workload may have taken an address away itself.
        converse(|index| farewell(old, index), Errno::ADDRNOTAVAIL)?;
    }
    set_up(new)
}

/// Sends rtnetlink messages and reads the kernel's answers, one of which is no failure.
fn converse(messages: impl FnOnce(u32) -> (Vec<u8>, Vec<String>), harmless: Errno) -> Result<(), Failure> {
    // NETLINK_ROUTE is protocol 0.
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)
        .or_setup(|| "open a netlink socket".into())?;
    let index = rustix::net::netdevice::name_to_index(&socket, INTERFACE)
        .or_setup(|| format!("find the network card {INTERFACE}"))?;
    let (messages, steps) = messages(index);
    send(&socket, &messages, SendFlags::empty()).or_setup(|| "configure the network card".into())?;
    for _ in 0..steps.len() {
        let mut answer = [0; 512];
        let (length, _) = recv(&socket, &mut answer, RecvFlags::empty())
            .or_setup(|| "read the answer on the network card's configuration".into())?;
        let (step, result) = acknowledgement(answer.get(..length).unwrap_or_default());
        let step = steps.get(step as usize).map_or("a step", String::as_str);
        match result {
            Ok(()) => {}
            Err(errno) if errno == harmless => {}
            Err(errno) => return Err(errno).or_setup(|| format!("{step} of {INTERFACE}")),
        }
    }
    Ok(())
}

/// Takes the card down, which ends its routes, and its addresses away.
fn farewell(config: &NetworkConfig, index: u32) -> (Vec<u8>, Vec<String>) {
    let mut bytes = Vec::with_capacity(256);
    let mut steps = Vec::new();
    let mut add = |message: Message, told: String| {
        message.finish(steps.len() as u32, &mut bytes);
        steps.push(told);
    };
    let mut down = Message::new(RTM_NEWLINK, 0);
    down.bytes(&[0; 4]).bytes(&index.to_ne_bytes()).bytes(&0u32.to_ne_bytes()).bytes(&IFF_UP.to_ne_bytes());
    add(down, "taking down".into());
    let ipv4 = config.ipv4.map(|(own, _)| IpAddr::from(own));
    let ipv6 = config.ipv6.map(|(own, _)| IpAddr::from(own));
    for own in ipv4.into_iter().chain(ipv6) {
        let mut message = address(own, index);
        message.kind = RTM_DELADDR;
        add(message, format!("removing the address {own}"));
    }
    (bytes, steps)
}

/// All messages, one behind another, and what each is for. Sequence numbers count from 0.
fn messages(config: &NetworkConfig, index: u32) -> (Vec<u8>, Vec<String>) {
    let mut bytes = Vec::with_capacity(512);
    let mut steps = Vec::new();
    let mut add = |message: Message, told: String| {
        message.finish(steps.len() as u32, &mut bytes);
        steps.push(told);
    };
    // Before it is up, so that the address of its link is made of it.
    let mut known = Message::new(RTM_NEWLINK, 0);
    known.bytes(&[0; 4]).bytes(&index.to_ne_bytes()).bytes(&[0; 8]);
    known.attribute(IFLA_ADDRESS, &config.mac);
    add(known, "setting the Ethernet address".into());
    let mut up = Message::new(RTM_NEWLINK, 0);
    // struct ifinfomsg: family, type, index, flags, change mask.
    up.bytes(&[0; 4]).bytes(&index.to_ne_bytes()).bytes(&IFF_UP.to_ne_bytes()).bytes(&IFF_UP.to_ne_bytes());
    up.attribute(IFLA_MTU, &u32::from(config.mtu).to_ne_bytes());
    add(up, "bringing up".into());
    let ipv4 = config.ipv4.map(|(own, gateway)| (IpAddr::from(own), IpAddr::from(gateway)));
    let ipv6 = config.ipv6.map(|(own, gateway)| (IpAddr::from(own), IpAddr::from(gateway)));
    for (own, gateway) in ipv4.into_iter().chain(ipv6) {
        add(address(own, index), format!("setting the address {own}"));
        add(route(gateway, None, index), format!("making the route to {gateway}"));
        add(route(unspecified(gateway), Some(gateway), index), format!("making the route by {gateway}"));
    }
    (bytes, steps)
}

fn unspecified(like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => libc::AF_INET as u8,
        IpAddr::V6(_) => libc::AF_INET6 as u8,
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// The whole address as a prefix.
fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn address(own: IpAddr, index: u32) -> Message {
    let mut message = Message::new(RTM_NEWADDR, NLM_F_CREATE);
    let flags = if own.is_ipv6() { IFA_F_NODAD } else { 0 };
    // struct ifaddrmsg: family, prefix length, flags, scope, index.
    message.bytes(&[family(own), bits(own), flags, RT_SCOPE_UNIVERSE]).bytes(&index.to_ne_bytes());
    message.attribute(IFA_LOCAL, &octets(own)).attribute(IFA_ADDRESS, &octets(own));
    message
}

/// To `destination` (its default, if unspecified), which is on the link unless there is a gateway.
fn route(destination: IpAddr, gateway: Option<IpAddr>, index: u32) -> Message {
    let mut message = Message::new(RTM_NEWROUTE, NLM_F_CREATE);
    let length = if destination.is_unspecified() { 0 } else { bits(destination) };
    let scope = if gateway.is_none() && destination.is_ipv4() { RT_SCOPE_LINK } else { RT_SCOPE_UNIVERSE };
    // struct rtmsg: family, destination's and source's length, tos, table, protocol, scope, type, flags.
    message.bytes(&[family(destination), length, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, scope, RTN_UNICAST]);
    message.bytes(&[0; 4]);
    if length > 0 {
        message.attribute(RTA_DST, &octets(destination));
    }
    if let Some(gateway) = gateway {
        message.attribute(RTA_GATEWAY, &octets(gateway));
    }
    message.attribute(RTA_OIF, &index.to_ne_bytes());
    message
}

/// A request under construction.
struct Message {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

impl Message {
    fn new(kind: u16, flags: u16) -> Self {
        Message { kind, flags: flags | NLM_F_REQUEST | NLM_F_ACK, body: Vec::with_capacity(64) }
    }

    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.body.extend_from_slice(bytes);
        self
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let length = 4 + value.len() as u16;
        self.bytes(&length.to_ne_bytes()).bytes(&kind.to_ne_bytes()).bytes(value);
        self.body.resize(self.body.len().next_multiple_of(4), 0);
        self
    }

    fn finish(self, sequence: u32, to: &mut Vec<u8>) {
        let length = 16 + self.body.len() as u32;
        to.extend_from_slice(&length.to_ne_bytes());
        to.extend_from_slice(&self.kind.to_ne_bytes());
        to.extend_from_slice(&self.flags.to_ne_bytes());
        to.extend_from_slice(&sequence.to_ne_bytes());
        to.extend_from_slice(&[0; 4]);
        to.extend_from_slice(&self.body);
    }
}

/// The sequence number that an acknowledgement is for, and what it says.
fn acknowledgement(answer: &[u8]) -> (u32, Result<(), Errno>) {
    let number = |at: usize| {
        answer.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes)
    };
    let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok()).map_or(0, u16::from_ne_bytes);
    let error = number(16).cast_signed();
    let result = match (kind, error) {
        (NLMSG_ERROR, 0) => Ok(()),
        (NLMSG_ERROR, error) => Err(Errno::from_raw_os_error(error.saturating_neg())),
        _ => Err(Errno::PROTO),
    };
    (number(8), result)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> NetworkConfig {
        NetworkConfig {
            mac: [2, 0, 0, 0, 0, 3],
            mtu: 1500,
            ipv4: Some((Ipv4Addr::new(10, 0, 0, 3), Ipv4Addr::new(10, 0, 0, 2))),
            ipv6: Some(("fd00::3".parse().unwrap(), "fd00::2".parse().unwrap())),
            ..NetworkConfig::default()
        }
    }

    #[test]
    fn messages_follow_one_another_by_their_lengths() {
        let (bytes, steps) = messages(&config(), 2);
        let (mut rest, mut count) = (bytes.as_slice(), 0);
        while let Some(length) = rest.first_chunk::<4>() {
            let length = u32::from_ne_bytes(*length) as usize;
            assert_eq!(length % 4, 0);
            assert_eq!(rest[8..12], u32::to_ne_bytes(count));
            rest = &rest[length..];
            count += 1;
        }
        assert_eq!((rest.len(), count as usize), (0, steps.len()));
        assert_eq!(steps.len(), 8);
    }

    #[test]
    fn an_answer_that_is_none_is_an_error() {
        for length in 0..20 {
            assert!(acknowledgement(&[0xff; 20][..length]).1.is_err());
        }
        let mut refusal = [0; 20];
        refusal[4..6].copy_from_slice(&NLMSG_ERROR.to_ne_bytes());
        refusal[16..20].copy_from_slice(&(-1i32).to_ne_bytes());
        assert_eq!(acknowledgement(&refusal).1, Err(Errno::PERM));
    }
}
