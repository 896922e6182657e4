//! The socket device under random use and random abuse.

use proptest::prelude::*;

use super::*;

/// One step of the random test, for one of a few connections.
#[derive(Clone, Debug)]
enum Step {
    GuestSends(usize),
    HostSends(usize),
    HostReads(usize),
    GuestReads(usize),
    GuestShuts,
    HostShuts,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (1usize..70_000).prop_map(Step::GuestSends),
        6 => (1usize..200_000).prop_map(Step::HostSends),
        6 => (1usize..300_000).prop_map(Step::HostReads),
        6 => (1usize..50).prop_map(Step::GuestReads),
        1 => Just(Step::GuestShuts),
        1 => Just(Step::HostShuts),
    ]
}

/// Both ends of a connection as its users see it.
struct Stream {
    host: UnixStream,
    port: u32,
    guest_sent: Vec<u8>,
    host_got: Vec<u8>,
    host_sent: Vec<u8>,
    guest_got: Vec<u8>,
    guest_shut: bool,
    host_shut: bool,
    guest_saw_end: bool,
    credit: (u32, u32),
}

impl Stream {
    fn guest_takes(&mut self, header: &Header, data: &[u8]) {
        self.credit = (header.buffer_allocation, header.forward_count);
        match header.op {
            Some(Op::ReadWrite) => {
                assert!(!self.guest_saw_end);
                self.guest_got.extend(data);
            }
            Some(Op::Shutdown) => self.guest_saw_end |= header.flags & SHUTDOWN_SEND != 0,
            Some(Op::CreditUpdate | Op::CreditRequest) => {}
            other => panic!("{other:?}"),
        }
    }

    fn room(&self) -> usize {
        (self.credit.0 - (self.guest_sent.len() as u32).wrapping_sub(self.credit.1)) as usize
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever users do on several connections at a time: both sides get exactly the bytes of the other, in order, and
    /// then its end; the sender's credit is never overdrawn, and nothing is stuck.
    #[test]
    fn streams_are_streams(steps in prop::collection::vec((0usize..3, step()), 1..60), rx in 1usize..64, event_idx: bool) {
        let mut setup = Setup::with(rx, if event_idx { F_EVENT_IDX } else { 0 });
        let mut streams: Vec<Stream> = (1..4).map(|port| Stream {
            host: setup.connected(port), port, guest_sent: vec![], host_got: vec![], host_sent: vec![],
            guest_got: vec![], guest_shut: false, host_shut: false, guest_saw_end: false, credit: (ALLOCATION, 0),
        }).collect();
        let deliver = |setup: &mut Setup, streams: &mut Vec<Stream>, most: usize| {
            let mut moved = false;
            for _ in 0..most {
                let Some((header, data)) = setup.receive() else { break };
                moved = true;
                let stream = &mut streams[header.destination_port as usize - 1];
                stream.guest_takes(&header, &data);
                if header.op == Some(Op::CreditRequest) {
                    setup.forwarded = stream.guest_got.len() as u32;
                    setup.send(80, stream.port, Op::CreditUpdate, 0, &[]);
                }
            }
            moved
        };
        for (n, step) in steps {
            let stream = &mut streams[n];
            match step {
                Step::GuestSends(length) if !stream.guest_shut => {
                    let length = length.min(stream.room());
                    let data: Vec<u8> = (0..length).map(|n| (n + stream.guest_sent.len()) as u8).collect();
                    stream.guest_sent.extend(&data);
                    setup.forwarded = stream.guest_got.len() as u32;
                    setup.send(80, stream.port, Op::ReadWrite, 0, &data);
                }
                Step::HostSends(length) if !stream.host_shut => {
                    let data: Vec<u8> = (0..length).map(|n| (n + 7 * stream.host_sent.len()) as u8).collect();
                    if let Ok(sent) = stream.host.write(&data) {
                        stream.host_sent.extend(&data[..sent]);
                    }
                    setup.guest.run();
                }
                Step::HostReads(length) => {
                    let mut data = vec![0; length];
                    if let Ok(read) = stream.host.read(&mut data) {
                        stream.host_got.extend(&data[..read]);
                    }
                    setup.guest.run();
                }
                Step::GuestReads(packets) => { deliver(&mut setup, &mut streams, packets); }
                Step::GuestShuts if !stream.guest_shut => {
                    stream.guest_shut = true;
                    setup.forwarded = stream.guest_got.len() as u32;
                    setup.send(80, stream.port, Op::Shutdown, SHUTDOWN_SEND, &[]);
                }
                Step::HostShuts if !stream.host_shut => {
                    stream.host_shut = true;
                    stream.host.shutdown(Shutdown::Write).unwrap();
                    setup.guest.run();
                }
                _ => {}
            }
        }
        // Everybody ends and reads until nothing moves any more.
        for stream in &streams {
            if !stream.guest_shut {
                setup.forwarded = stream.guest_got.len() as u32;
                setup.send(80, stream.port, Op::Shutdown, SHUTDOWN_SEND, &[]);
            }
            let _ = stream.host.shutdown(Shutdown::Write);
        }
        setup.guest.run();
        loop {
            let mut moved = deliver(&mut setup, &mut streams, usize::MAX);
            for stream in &mut streams {
                let got = read_all(&mut stream.host);
                moved |= !got.is_empty();
                stream.host_got.extend(got);
            }
            setup.guest.run();
            if !moved {
                break;
            }
        }
        for stream in &mut streams {
            prop_assert!(stream.host_got == stream.guest_sent, "{} of {} bytes to the host", stream.host_got.len(), stream.guest_sent.len());
            prop_assert!(stream.guest_got == stream.host_sent, "{} of {} bytes to the guest", stream.guest_got.len(), stream.host_sent.len());
            prop_assert!(ended(&mut stream.host) && stream.guest_saw_end);
        }
        prop_assert_eq!(setup.guest.status(), 15);
    }

    /// Whatever packets the guest makes up: the device lives or needs a reset, and connections stay within the limit.
    #[test]
    fn any_packets_are_survived(
        packets in prop::collection::vec((0u32..4, 0u32..4, 0u16..9, any::<u8>(), 0u32..5, prop_oneof![Just(0u32), 0u32..3000, any::<u32>()]), 0..80),
    ) {
        let mut setup = Setup::new();
        let listener = setup.listen(1);
        let mut hosts = Vec::new();
        for (host, guest, op, byte, flags, number) in packets {
            let data = vec![byte; number as usize % 3000];
            let mut bytes = Header {
                source_cid: CID, destination_cid: HOST_CID, source_port: guest, destination_port: host,
                length: data.len() as u32, stream: byte != 0, op: None, flags, buffer_allocation: number,
                forward_count: number / 2,
            }.to_bytes().to_vec();
            bytes[30] = op as u8;
            bytes.extend(&data);
            setup.guest.memory.write_slice(&bytes, vm_memory::GuestAddress(0x70_0000)).unwrap();
            setup.guest.add(TX, &[(0x70_0000, bytes.len() as u32, false)]).unwrap();
            setup.guest.kick(TX);
            setup.guest.used(TX).unwrap();
            while setup.receive().is_some() {}
            if let Ok((mut stream, _)) = listener.accept() {
                stream.set_nonblocking(true).unwrap();
                let _ = stream.write(&data);
                hosts.push(stream);
            } else if byte % 5 == 0 {
                hosts.pop();
            }
            setup.guest.run();
        }
        prop_assert_eq!(setup.guest.status(), 15);
        prop_assert!(setup.connections() <= 16);
    }
}
