//! The socket device between a guest's driver and unix sockets (virtio 1.2, section 5.10).

use std::{
    collections::HashMap,
    io::{ErrorKind, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::Mutex,
    time::Duration,
};

use tempfile::TempDir;
use vm_memory::Bytes;

use super::{
    muxer::{ALLOCATION, MAX_CONNECTIONS},
    packet::{HOST_CID, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND},
    *,
};
use crate::{
    testing::Guest,
    virtio::mmio::{F_EVENT_IDX, F_INDIRECT_DESC},
};

mod credit;
mod properties;

const CID: u64 = 3;
const HEADER: u32 = 44;
/// Length of the buffers that the driver offers, with the header.
const RX_BYTES: u32 = 4096;

/// The guest's driver, and the host's end of the sockets.
struct Setup {
    guest: Guest,
    device: Arc<Mutex<Vsock>>,
    rx_buffers: HashMap<u16, u64>,
    path: PathBuf,
    dir: TempDir,
    /// What the guest says of its buffer.
    allocation: u32,
    forwarded: u32,
}

impl Setup {
    fn new() -> Self {
        Self::with_rx(64)
    }

    fn with_rx(buffers: usize) -> Self {
        Self::with(buffers, F_EVENT_IDX | F_INDIRECT_DESC)
    }

    fn with(buffers: usize, features: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        let device = Arc::new(Mutex::new(Vsock::new(CID, &path).unwrap()));
        let mut guest = Guest::with_shared(device.clone());
        guest.start(features, 256);
        let mut setup =
            Setup { guest, device, rx_buffers: HashMap::new(), path, dir, allocation: 1 << 18, forwarded: 0 };
        setup.offer(buffers);
        setup
    }

    fn offer(&mut self, buffers: usize) {
        for _ in 0..buffers {
            let address = self.guest.allocate(RX_BYTES.into());
            let head = self.guest.add(RX, &[(address, RX_BYTES, true)]).unwrap();
            self.rx_buffers.insert(head, address);
        }
        self.guest.kick(RX);
    }

    fn listen(&self, port: u32) -> UnixListener {
        let listener = UnixListener::bind(self.dir.path().join(format!("v_{port}"))).unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    }

    fn send(&mut self, host: u32, guest: u32, op: Op, flags: u32, data: &[u8]) {
        let header = Header {
            source_cid: CID,
            destination_cid: HOST_CID,
            source_port: guest,
            destination_port: host,
            length: data.len() as u32,
            stream: true,
            op: Some(op),
            flags,
            buffer_allocation: self.allocation,
            forward_count: self.forwarded,
        };
        self.send_raw(header, data);
    }

    fn send_raw(&mut self, header: Header, data: &[u8]) {
        let bytes = [&header.to_bytes(), data].concat();
        // The chain is used when this returns, so all tx packets share one place.
        let at = 0x70_0000;
        self.guest.memory.write_slice(&bytes, vm_memory::GuestAddress(at)).unwrap();
        self.guest
            .add(
                TX,
                &[(at, HEADER, false), (at + u64::from(HEADER), data.len() as u32, false)]
                    [..1 + usize::from(!data.is_empty())],
            )
            .unwrap();
        self.guest.kick(TX);
        assert_eq!(self.guest.used(TX).map(|used| used.1), Some(0), "the packet was not taken");
    }

    /// Takes the next packet from the device, and offers its buffer again.
    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, written) = self.guest.used(RX)?;
        let address = self.rx_buffers.remove(&head).unwrap();
        let bytes = self.guest.bytes(address, written as usize);
        let header = Header::parse(bytes[..44].try_into().unwrap());
        assert_eq!(header.length, written - HEADER);
        assert_eq!((header.source_cid, header.destination_cid, header.stream), (HOST_CID, CID, true));
        let head = self.guest.add(RX, &[(address, RX_BYTES, true)]).unwrap();
        self.rx_buffers.insert(head, address);
        self.guest.kick(RX);
        Some((header, bytes[44..].to_vec()))
    }

    /// The next packet must be `op`, and from port `host` to port `guest`.
    fn expect(&mut self, host: u32, guest: u32, op: Op) -> (Header, Vec<u8>) {
        let (header, data) = self.receive().unwrap_or_else(|| panic!("no packet, but {op:?} expected"));
        assert_eq!(
            (header.op, header.source_port, header.destination_port),
            (Some(op), host, guest),
            "{header:?}"
        );
        (header, data)
    }

    fn expect_nothing(&mut self) {
        assert_eq!(self.receive(), None);
    }

    /// A connection that the guest made to port 80 of the host.
    fn connected(&mut self, guest_port: u32) -> UnixStream {
        let listener = self.listen(80);
        self.send(80, guest_port, Op::Request, 0, &[]);
        self.expect(80, guest_port, Op::Response);
        let (stream, _) = listener.accept().unwrap();
        stream.set_nonblocking(true).unwrap();
        std::fs::remove_file(self.dir.path().join("v_80")).unwrap();
        stream
    }

    /// A connection that the host made to port 9 of the guest.
    fn called(&mut self) -> (UnixStream, u32) {
        let mut stream = UnixStream::connect(&self.path).unwrap();
        stream.write_all(b"CONNECT 9\n").unwrap();
        self.guest.run();
        let (header, _) = self.receive().unwrap();
        assert_eq!((header.op, header.destination_port), (Some(Op::Request), 9));
        self.send(header.source_port, 9, Op::Response, 0, &[]);
        let mut line = [0; 64];
        let length = stream.read(&mut line).unwrap();
        assert_eq!(std::str::from_utf8(&line[..length]).unwrap(), format!("OK {}\n", header.source_port));
        stream.set_nonblocking(true).unwrap();
        (stream, header.source_port)
    }

    fn connections(&self) -> usize {
        self.device.lock().unwrap().connections()
    }
}

fn read_all(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => bytes,
        Err(error) if error.kind() == ErrorKind::WouldBlock => bytes,
        Err(error) => panic!("after {} bytes: {error}", bytes.len()),
    }
}

/// Whether the stream has ended, when all there was has been read.
fn ended(stream: &mut UnixStream) -> bool {
    matches!(stream.read(&mut [0; 1]), Ok(0))
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|n| (n % 251) as u8).collect()
}

#[test]
fn s5_10_4_the_configuration_is_the_guests_cid() {
    let setup = Setup::new();
    assert_eq!((setup.guest.read(0x100), setup.guest.read(0x104), setup.guest.read(0x108)), (3, 0, 0));
    assert_eq!(setup.guest.read(8), 19);
}

#[test]
fn s5_10_6_a_guest_connects_and_bytes_go_both_ways() {
    let mut setup = Setup::new();
    let mut host = setup.connected(1000);
    setup.send(80, 1000, Op::ReadWrite, 0, b"ping");
    assert_eq!(read_all(&mut host), b"ping");
    host.write_all(b"pong").unwrap();
    setup.guest.run();
    assert_eq!(setup.expect(80, 1000, Op::ReadWrite).1, b"pong");
    assert_eq!(setup.guest.take_interrupt(), 1);
}

#[test]
fn a_response_tells_of_the_buffer() {
    let mut setup = Setup::new();
    let _listener = setup.listen(5);
    setup.send(5, 6, Op::Request, 0, &[]);
    let (header, _) = setup.expect(5, 6, Op::Response);
    assert_eq!((header.buffer_allocation, header.forward_count), (ALLOCATION, 0));
}

#[test]
fn what_the_host_has_written_before_it_is_accepted_arrives_with_the_response() {
    let mut setup = Setup::new();
    let listener = setup.listen(80);
    setup.send(80, 1, Op::Request, 0, &[]);
    let (mut host, _) = listener.accept().unwrap();
    host.write_all(b"hello").unwrap();
    setup.guest.run();
    setup.expect(80, 1, Op::Response);
    assert_eq!(setup.expect(80, 1, Op::ReadWrite).1, b"hello");
}

#[test]
fn s5_10_6_nobody_listening_is_a_reset() {
    let mut setup = Setup::new();
    setup.send(81, 1000, Op::Request, 0, &[]);
    setup.expect(81, 1000, Op::Reset);
    assert_eq!(setup.connections(), 0);
}

#[test]
fn s5_10_6_packets_for_unknown_connections_are_reset_but_resets_are_not() {
    let mut setup = Setup::new();
    for op in [Op::Response, Op::ReadWrite, Op::Shutdown, Op::CreditUpdate, Op::CreditRequest] {
        setup.send(7, 8, op, 0, &[]);
        setup.expect(7, 8, Op::Reset);
    }
    setup.send(7, 8, Op::Reset, 0, &[]);
    setup.expect_nothing();
}

#[test]
fn s5_10_6_4_2_unknown_types_and_ops_are_reset_and_foreign_senders_ignored() {
    let mut setup = Setup::new();
    let good = Header {
        source_cid: CID,
        destination_cid: HOST_CID,
        source_port: 1,
        destination_port: 2,
        length: 0,
        stream: true,
        op: Some(Op::Request),
        flags: 0,
        buffer_allocation: 0,
        forward_count: 0,
    };
    setup.send_raw(Header { stream: false, ..good }, &[]);
    setup.expect(2, 1, Op::Reset);
    setup.send_raw(Header { op: None, ..good }, &[]);
    setup.expect(2, 1, Op::Reset);
    setup.send_raw(Header { source_cid: 4, ..good }, &[]);
    setup.expect_nothing();
}

#[test]
fn s5_10_6_4_2_another_machines_cid_is_a_reset_from_there() {
    let mut setup = Setup::new();
    let header = Header {
        source_cid: CID,
        destination_cid: 99,
        source_port: 1,
        destination_port: 2,
        length: 0,
        stream: true,
        op: Some(Op::Request),
        flags: 0,
        buffer_allocation: 0,
        forward_count: 0,
    };
    setup.send_raw(header, &[]);
    let (head, _) = setup.guest.used(RX).unwrap();
    let bytes = setup.guest.bytes(setup.rx_buffers[&head], 44);
    let reset = Header::parse(bytes[..].try_into().unwrap());
    assert_eq!((reset.source_cid, reset.op), (99, Some(Op::Reset)));
}

#[test]
fn the_host_connects_with_a_line_and_is_answered_with_one() {
    let mut setup = Setup::new();
    let (mut host, port) = setup.called();
    assert!(port >= 1 << 30);
    host.write_all(b"to the guest").unwrap();
    setup.guest.run();
    assert_eq!(setup.expect(port, 9, Op::ReadWrite).1, b"to the guest");
    setup.send(port, 9, Op::ReadWrite, 0, b"to the host");
    assert_eq!(read_all(&mut host), b"to the host");
}

#[test]
fn bytes_behind_the_line_are_not_lost() {
    let mut setup = Setup::new();
    let mut host = UnixStream::connect(&setup.path).unwrap();
    host.write_all(b"CONN").unwrap();
    setup.guest.run();
    setup.expect_nothing();
    host.write_all(b"ECT 9\nearly").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    setup.guest.run();
    let (header, _) = setup.receive().unwrap();
    let port = header.source_port;
    setup.expect_nothing();
    setup.send(port, 9, Op::Response, 0, &[]);
    assert_eq!(setup.expect(port, 9, Op::ReadWrite).1, b"early");
    assert_eq!(setup.expect(port, 9, Op::Shutdown).0.flags, SHUTDOWN_SEND);
}

#[test]
fn a_host_that_calls_writes_and_closes_at_once_is_heard() {
    let mut setup = Setup::new();
    let mut host = UnixStream::connect(&setup.path).unwrap();
    host.write_all(b"CONNECT 9\nfire and forget").unwrap();
    drop(host);
    setup.guest.run();
    let port = setup.receive().unwrap().0.source_port;
    setup.send(port, 9, Op::Response, 0, &[]);
    assert_eq!(setup.expect(port, 9, Op::ReadWrite).1, b"fire and forget");
    assert_eq!(setup.expect(port, 9, Op::Shutdown).0.flags, SHUTDOWN_BOTH);
    setup.send(port, 9, Op::Reset, 0, &[]);
    assert_eq!(setup.connections(), 0);
}

#[test]
fn bad_greetings_are_hung_up_on() {
    let mut setup = Setup::new();
    let bad: [&[u8]; 7] = [
        b"\n",
        b"connect 9\n",
        b"CONNECT\n",
        b"CONNECT 4294967296\n",
        b"CONNECT -1\n",
        b"CONNECT 9 \n",
        b"CONNECT 00000000000000000000009\n",
    ];
    for line in bad {
        let mut host = UnixStream::connect(&setup.path).unwrap();
        host.write_all(line).unwrap();
        setup.guest.run();
        assert!(ended(&mut host), "{:?}", String::from_utf8_lossy(line));
    }
    drop(UnixStream::connect(&setup.path).unwrap());
    setup.guest.run();
    setup.expect_nothing();
    assert_eq!(setup.connections(), 0);
}

#[test]
fn a_client_that_says_nothing_is_hung_up_on_when_its_time_is_over_and_another_comes() {
    let mut setup = Setup::new();
    let mut silent = UnixStream::connect(&setup.path).unwrap();
    let (_talking, _) = setup.called();
    silent.set_nonblocking(true).unwrap();
    assert!(!ended(&mut silent), "within its time");
    setup.device.lock().unwrap().muxer.greeting_limit = Duration::ZERO;
    let (_another, _) = setup.called();
    assert!(ended(&mut silent));
    assert_eq!(setup.connections(), 2, "who has greeted stays");
}

#[test]
fn a_guest_that_refuses_is_an_end_to_the_host() {
    let mut setup = Setup::new();
    let mut host = UnixStream::connect(&setup.path).unwrap();
    host.write_all(b"CONNECT 9\n").unwrap();
    setup.guest.run();
    let (header, _) = setup.receive().unwrap();
    setup.send(header.source_port, 9, Op::Reset, 0, &[]);
    assert!(ended(&mut host));
    assert_eq!(setup.connections(), 0);
}

#[test]
fn a_host_that_called_before_the_driver_was_there_gets_through() {
    let mut setup = Setup::new();
    setup.guest.write(0x70, 0);
    let mut host = UnixStream::connect(&setup.path).unwrap();
    host.write_all(b"CONNECT 9\n").unwrap();
    setup.guest.run();
    setup.rx_buffers.clear();
    setup.guest.free_memory();
    setup.guest.start(F_EVENT_IDX, 256);
    setup.offer(4);
    assert_eq!(setup.receive().unwrap().0.op, Some(Op::Request));
}

#[test]
fn s5_10_6_6_1_the_guest_ends_sending_and_still_receives() {
    let mut setup = Setup::new();
    let mut host = setup.connected(1);
    setup.send(80, 1, Op::ReadWrite, 0, b"question");
    setup.send(80, 1, Op::Shutdown, SHUTDOWN_SEND, &[]);
    assert_eq!(read_all(&mut host), b"question");
    assert!(ended(&mut host));
    host.write_all(b"answer").unwrap();
    setup.guest.run();
    assert_eq!(setup.expect(80, 1, Op::ReadWrite).1, b"answer");
    drop(host);
    setup.guest.run();
    assert_eq!(setup.expect(80, 1, Op::Shutdown).0.flags, SHUTDOWN_BOTH);
    setup.send(80, 1, Op::Reset, 0, &[]);
    setup.expect_nothing();
    assert_eq!(setup.connections(), 0);
}

#[test]
fn s5_10_6_6_1_the_host_ends_sending_and_still_receives() {
    let mut setup = Setup::new();
    let mut host = setup.connected(1);
    host.write_all(b"question").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    setup.guest.run();
    assert_eq!(setup.expect(80, 1, Op::ReadWrite).1, b"question");
    assert_eq!(setup.expect(80, 1, Op::Shutdown).0.flags, SHUTDOWN_SEND);
    setup.send(80, 1, Op::ReadWrite, 0, b"answer");
    setup.send(80, 1, Op::Shutdown, SHUTDOWN_BOTH, &[]);
    setup.expect(80, 1, Op::Reset);
    assert_eq!(read_all(&mut host), b"answer");
    assert!(ended(&mut host));
    assert_eq!(setup.connections(), 0);
}

#[test]
fn a_guest_that_writes_and_closes_at_once_loses_nothing_to_a_slow_host() {
    let mut setup = Setup::new();
    let mut host = setup.connected(1);
    let data = pattern(ALLOCATION as usize);
    for chunk in data.chunks(60_000) {
        setup.send(80, 1, Op::ReadWrite, 0, chunk);
    }
    setup.send(80, 1, Op::Shutdown, SHUTDOWN_BOTH, &[]);
    let last = std::iter::from_fn(|| setup.receive()).last().unwrap().0;
    assert_eq!(last.op, Some(Op::Reset), "the guest need not wait for the host");
    assert_eq!(setup.connections(), 1);
    let mut got = Vec::new();
    while got.len() < data.len() {
        got.extend(read_all(&mut host));
        setup.guest.run();
    }
    assert!(got == data);
    assert!(ended(&mut host));
    assert_eq!(setup.connections(), 0);
}

#[test]
fn a_reset_behind_data_does_not_lose_it_either() {
    let mut setup = Setup::new();
    let mut host = setup.connected(1);
    let data = pattern(ALLOCATION as usize);
    for chunk in data.chunks(60_000) {
        setup.send(80, 1, Op::ReadWrite, 0, chunk);
    }
    setup.send(80, 1, Op::Reset, 0, &[]);
    let mut got = Vec::new();
    while got.len() < data.len() {
        got.extend(read_all(&mut host));
        setup.guest.run();
    }
    assert!(got == data && ended(&mut host));
}

#[test]
fn a_host_that_writes_and_closes_at_once_loses_nothing_to_a_slow_guest() {
    let mut setup = Setup::with_rx(2);
    let mut host = setup.connected(1);
    let data = pattern(100_000);
    host.write_all(&data).unwrap();
    drop(host);
    setup.guest.run();
    let mut got = Vec::new();
    loop {
        let (header, bytes) = setup.receive().unwrap();
        got.extend(bytes);
        if header.op == Some(Op::Shutdown) {
            assert_eq!(header.flags, SHUTDOWN_BOTH);
            break;
        }
    }
    assert!(got == data);
}

#[test]
fn a_connection_closed_with_unread_input_is_an_end_and_not_an_error() {
    let mut setup = Setup::new();
    setup.allocation = 0;
    let mut host = setup.connected(1);
    host.write_all(b"never read").unwrap();
    setup.guest.run();
    setup.expect(80, 1, Op::CreditRequest);
    setup.send(80, 1, Op::ReadWrite, 0, b"bye");
    setup.send(80, 1, Op::Shutdown, SHUTDOWN_BOTH, &[]);
    assert_eq!(read_all(&mut host), b"bye");
    assert!(ended(&mut host));
}

#[test]
fn s5_10_6_6_the_guest_may_not_send_after_it_has_shut_down() {
    let mut setup = Setup::new();
    let _host = setup.connected(1);
    setup.send(80, 1, Op::Shutdown, SHUTDOWN_SEND, &[]);
    setup.send(80, 1, Op::ReadWrite, 0, b"more");
    setup.expect(80, 1, Op::Reset);
    assert_eq!(setup.connections(), 0);
}

#[test]
fn a_guest_that_receives_no_more_makes_the_hosts_writes_fail() {
    let mut setup = Setup::new();
    let mut host = setup.connected(1);
    setup.send(80, 1, Op::Shutdown, SHUTDOWN_RECEIVE, &[]);
    assert_eq!(host.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    setup.send(80, 1, Op::ReadWrite, 0, b"still");
    assert_eq!(read_all(&mut host), b"still");
}

#[test]
fn a_second_request_or_response_ends_the_connection() {
    for op in [Op::Request, Op::Response] {
        let mut setup = Setup::new();
        let mut host = setup.connected(1);
        setup.send(80, 1, op, 0, &[]);
        setup.expect(80, 1, Op::Reset);
        assert!(ended(&mut host));
        assert_eq!(setup.connections(), 0);
    }
}

#[test]
fn connections_are_limited_and_the_limit_gives_way_again() {
    let mut setup = Setup::new();
    let listener = setup.listen(80);
    let mut hosts = Vec::new();
    for port in 0..MAX_CONNECTIONS as u32 {
        setup.send(80, port, Op::Request, 0, &[]);
        setup.expect(80, port, Op::Response);
        hosts.push(listener.accept().unwrap().0);
    }
    setup.send(80, 5000, Op::Request, 0, &[]);
    setup.expect(80, 5000, Op::Reset);
    let mut refused = UnixStream::connect(&setup.path).unwrap();
    setup.guest.run();
    assert!(ended(&mut refused));
    setup.send(80, 7, Op::Shutdown, SHUTDOWN_BOTH, &[]);
    setup.expect(80, 7, Op::Reset);
    setup.send(80, 5000, Op::Request, 0, &[]);
    setup.expect(80, 5000, Op::Response);
}

#[test]
fn a_driver_without_buffers_gets_its_packets_when_it_has_some() {
    let mut setup = Setup::with_rx(0);
    setup.send(81, 1, Op::Request, 0, &[]);
    setup.send(82, 2, Op::Request, 0, &[]);
    setup.expect_nothing();
    setup.offer(1);
    setup.expect(81, 1, Op::Reset);
    setup.expect(82, 2, Op::Reset);
}

#[test]
fn s2_1_2_packets_without_a_header_or_with_less_data_than_they_say_stop_the_device() {
    let short: [&[(u64, u32, bool)]; 2] = [&[(0x20_0000, 43, false)], &[(0x20_0000, 44, true)]];
    for buffers in short {
        let mut setup = Setup::new();
        setup.guest.add(TX, buffers).unwrap();
        setup.guest.kick(TX);
        assert_eq!(setup.guest.status(), 15 | 64);
    }
    let mut setup = Setup::new();
    let _host = setup.connected(1);
    let header = Header {
        source_cid: CID,
        destination_cid: HOST_CID,
        source_port: 1,
        destination_port: 80,
        length: 100,
        stream: true,
        op: Some(Op::ReadWrite),
        flags: 0,
        buffer_allocation: 0,
        forward_count: 0,
    };
    let at = setup.guest.place(&header.to_bytes());
    setup.guest.add(TX, &[(at, 44, false)]).unwrap();
    setup.guest.kick(TX);
    assert_eq!(setup.guest.status(), 15 | 64);
}

#[test]
fn a_receive_buffer_without_room_for_a_header_stops_the_device() {
    let mut setup = Setup::with_rx(0);
    setup.guest.add(RX, &[(0x20_0000, 43, true)]).unwrap();
    setup.send(81, 1, Op::Request, 0, &[]);
    assert_eq!(setup.guest.status(), 15 | 64);
}

#[test]
fn reset_closes_the_sockets_and_the_next_driver_starts_anew() {
    let mut setup = Setup::new();
    let mut host = setup.connected(1);
    setup.guest.write(0x70, 0);
    setup.guest.run();
    assert!(ended(&mut host));
    assert_eq!(setup.connections(), 0);
    setup.rx_buffers.clear();
    setup.guest.free_memory();
    setup.guest.start(F_EVENT_IDX, 256);
    setup.offer(16);
    let mut host = setup.connected(1);
    setup.send(80, 1, Op::ReadWrite, 0, b"again");
    assert_eq!(read_all(&mut host), b"again");
}

#[test]
fn a_socket_left_over_is_replaced_and_other_files_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    drop(UnixListener::bind(&path).unwrap());
    drop(Vsock::new(CID, &path).unwrap());
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "precious").unwrap();
    assert!(Vsock::new(CID, &path).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}
