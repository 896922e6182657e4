//! The device between a guest and a virtiofsd of the test's own, which speaks vhost-user byte by byte.

use std::{
    fs::File,
    io::{Read, Write},
    net::Shutdown,
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    sync::Mutex,
    thread::JoinHandle,
};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tempfile::TempDir;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::{
    testing::{Guest, MEMORY_SIZE},
    virtio::mmio::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1},
};

const SET_FEATURES: u32 = 2;
const GET_FEATURES: u32 = 1;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_ADDR: u32 = 9;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;

const PROTOCOL_FEATURES: u64 = 1 << 30;
const GOOD_FEATURES: u64 = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC | PROTOCOL_FEATURES;
const MQ: u64 = 1;
const REPLY_ACK: u64 = 1 << 3;
const NEED_REPLY: u32 = 8;
const IS_REPLY: u32 = 4;

/// A message and the descriptors that came with it.
struct Message {
    request: u32,
    flags: u32,
    body: Vec<u8>,
    files: Vec<OwnedFd>,
}

/// What the fake daemon does.
#[derive(Clone, Copy)]
struct Daemon {
    features: u64,
    protocol: u64,
    /// The request that is not answered any more.
    deaf_to: Option<u32>,
}

const GOOD: Daemon = Daemon { features: GOOD_FEATURES, protocol: MQ | REPLY_ACK, deaf_to: None };

/// What the fake daemon was told, until its connection ended.
#[derive(Default)]
struct Heard {
    messages: Vec<Message>,
}

impl Heard {
    fn all(&self, request: u32) -> Vec<&Message> {
        self.messages.iter().filter(|message| message.request == request).collect()
    }
}

fn receive(stream: &mut UnixStream) -> Option<Message> {
    let mut header = [0; 12];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [std::io::IoSliceMut::new(&mut header)];
    let got = recvmsg(&*stream, &mut parts, &mut ancillary, RecvFlags::WAITALL).ok()?;
    let files = ancillary.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => files.collect::<Vec<_>>(),
        _ => vec![],
    });
    let files = files.collect();
    let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
    if got.bytes < header.len() {
        return None;
    }
    let mut body = vec![0; word(8) as usize];
    stream.read_exact(&mut body).ok()?;
    Some(Message { request: word(0), flags: word(4), body, files })
}

fn reply(stream: &mut UnixStream, request: u32, body: &[u8]) {
    let header = [request, 1 | IS_REPLY, body.len() as u32].map(u32::to_le_bytes).concat();
    stream.write_all(&[&header, body].concat()).unwrap();
}

impl Daemon {
    /// Serves one connection to its end, and gives what it heard.
    fn serve(self, stream: &mut UnixStream) -> Heard {
        let mut heard = Heard::default();
        while let Some(message) = receive(stream) {
            let (request, flags, body) = (message.request, message.flags, message.body.clone());
            heard.messages.push(message);
            if self.deaf_to == Some(request) {
                continue;
            }
            match request {
                GET_FEATURES => reply(stream, request, &self.features.to_le_bytes()),
                GET_PROTOCOL_FEATURES => reply(stream, request, &self.protocol.to_le_bytes()),
                GET_QUEUE_NUM => reply(stream, request, &2u64.to_le_bytes()),
                GET_VRING_BASE => reply(stream, request, &body),
                _ if flags & NEED_REPLY != 0 => reply(stream, request, &0u64.to_le_bytes()),
                _ => {}
            }
        }
        heard
    }
}

/// A device with a fake daemon, and the daemon's end of the connection.
struct Setup {
    device: Arc<Mutex<Fs>>,
    daemon: JoinHandle<Heard>,
    connection: UnixStream,
    _directory: TempDir,
}

fn connect(daemon: Daemon, limit: Duration) -> io::Result<Setup> {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("fs");
    let listener = UnixListener::bind(&socket).unwrap();
    let (sender, connections) = std::sync::mpsc::channel();
    #[allow(clippy::disallowed_methods, reason = "a test's own")]
    let daemon = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        sender.send(stream.try_clone().unwrap()).unwrap();
        daemon.serve(&mut stream)
    });
    let device = Arc::new(Mutex::new(Fs::new("fs0", UnixStream::connect(&socket)?, limit, || {})?));
    Ok(Setup { device, daemon, connection: connections.recv().unwrap(), _directory: directory })
}

fn shared_guest(device: &Arc<Mutex<Fs>>) -> Guest {
    let half = MEMORY_SIZE / 2;
    let file = tempfile::tempfile().unwrap();
    file.set_len(MEMORY_SIZE).unwrap();
    let at = |start| Some(FileOffset::new(File::try_clone(&file).unwrap(), start));
    let ranges = [(GuestAddress(0), half as usize, at(0)), (GuestAddress(half), half as usize, at(half))];
    let device = Arc::clone(device) as Arc<Mutex<dyn VirtioDevice>>;
    Guest::with_memory(GuestMemoryMmap::from_ranges_with_files(ranges).unwrap(), device)
}

impl Setup {
    fn good() -> (Setup, Guest) {
        let setup = connect(GOOD, ANSWER_LIMIT).unwrap();
        let guest = shared_guest(&setup.device);
        (setup, guest)
    }

    fn heard(self, guest: Guest) -> Heard {
        drop((guest, self.device));
        self.daemon.join().unwrap()
    }
}

fn fuse_request(unique: u64) -> Vec<u8> {
    let mut request = [40u32.to_le_bytes(), 1u32.to_le_bytes()].concat();
    request.extend(unique.to_le_bytes());
    request.resize(40, 0);
    request
}

/// Puts a request into a queue without telling anybody; gives where its answer goes.
fn ask(guest: &mut Guest, queue: usize, unique: u64) -> u64 {
    let request = guest.place(&fuse_request(unique));
    let answer = guest.allocate(80);
    guest.add(queue, &[(request, 40, false), (answer, 80, true)]).unwrap();
    answer
}

fn refusal(unique: u64) -> Vec<u8> {
    let mut answer = [16u32.to_le_bytes(), (-libc::ENOTCONN).to_le_bytes()].concat();
    answer.extend(unique.to_le_bytes());
    answer
}

#[test]
fn s5_11_4_the_configuration_has_the_tag_and_one_request_queue() {
    let (setup, guest) = Setup::good();
    let mut config = [0xee; 44];
    setup.device.lock().unwrap().read_config(0, &mut config);
    assert_eq!(&config[..4], b"fs0\0");
    assert_eq!(&config[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(guest.read(0x08), 26);
    drop(guest);
}

#[test]
fn virtiofsd_gets_memory_rings_and_events_at_the_start_and_gives_them_back_at_reset() {
    let (setup, mut guest) = Setup::good();
    guest.start(F_EVENT_IDX | F_INDIRECT_DESC, 64);
    assert!(guest.transport.is_active());
    guest.write(0x70, 0);
    guest.start(0, 64);
    assert!(guest.transport.is_active());
    let heard = setup.heard(guest);
    let features = |message: &Message| u64::from_le_bytes(message.body[..8].try_into().unwrap());
    let agreed: Vec<_> = heard.all(SET_FEATURES).into_iter().map(features).collect();
    assert_eq!(agreed, [GOOD_FEATURES, F_VERSION_1 | PROTOCOL_FEATURES]);
    assert_eq!(features(heard.all(SET_PROTOCOL_FEATURES)[0]), MQ | REPLY_ACK);
    let tables = heard.all(SET_MEM_TABLE);
    assert_eq!((tables.len(), tables[0].body[0], tables[0].files.len()), (2, 2, 2));
    for request in [SET_VRING_KICK, SET_VRING_CALL] {
        assert!(heard.all(request).iter().all(|message| message.files.len() == 1));
        assert_eq!(heard.all(request).len(), 4);
    }
    assert_eq!((heard.all(SET_VRING_ADDR).len(), heard.all(SET_VRING_ENABLE).len()), (4, 4));
    assert_eq!(heard.all(GET_VRING_BASE).len(), 2, "only the running device had rings to give back");
}

#[test]
fn guest_memory_that_is_not_shared_is_not_handed_over() {
    let setup = connect(GOOD, ANSWER_LIMIT).unwrap();
    let mut guest = Guest::with_shared(Arc::clone(&setup.device) as Arc<Mutex<dyn VirtioDevice>>);
    guest.start(0, 64);
    assert!(!guest.transport.is_active());
    assert!(setup.heard(guest).all(SET_MEM_TABLE).is_empty());
}

#[test]
fn a_virtiofsd_that_lacks_a_feature_is_refused_by_name() {
    let lacking = Daemon { features: GOOD_FEATURES & !F_EVENT_IDX, ..GOOD };
    let error = connect(lacking, ANSWER_LIMIT).err().unwrap();
    assert!(error.to_string().contains("0x20000000"), "{error}");
}

#[test]
fn a_virtiofsd_that_never_answers_does_not_hang_anybody() {
    let deaf = |request| Daemon { deaf_to: Some(request), ..GOOD };
    let limit = Duration::from_millis(50);
    let error = connect(deaf(GET_FEATURES), limit).err().unwrap();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    for request in [SET_MEM_TABLE, GET_VRING_BASE] {
        let setup = connect(deaf(request), limit).unwrap();
        let mut guest = shared_guest(&setup.device);
        guest.start(0, 64);
        guest.write(0x70, 0);
        guest.start(0, 64);
        assert_eq!(guest.status() & 64, 64, "the device must be failed");
        setup.heard(guest);
    }
}

#[test]
fn when_virtiofsd_dies_each_request_fails_instead_of_hanging() {
    let (setup, mut guest) = Setup::good();
    guest.start(F_EVENT_IDX, 16);
    let pending = ask(&mut guest, 1, 7);
    setup.connection.shutdown(Shutdown::Both).unwrap();
    guest.run_until(|guest| guest.used(1).is_some());
    assert_eq!(guest.bytes(pending, 16), refusal(7));
    assert_eq!(guest.take_interrupt() & 1, 1);
    for unique in 100..140 {
        let answer = ask(&mut guest, 1, unique);
        guest.kick(1);
        assert!(guest.used(1).is_some_and(|(_, written)| written == 16));
        assert_eq!(guest.bytes(answer, 16), refusal(unique));
    }
    // FUSE_FORGET, which has no answer.
    let forget = guest.place(&fuse_request(1));
    guest.add(0, &[(forget, 40, false)]).unwrap();
    guest.kick(0);
    assert!(guest.used(0).is_some_and(|(_, written)| written == 0));
    // Whoever begins anew learns that there is nobody.
    guest.start(0, 16);
    assert_eq!(guest.status() & 64, 64);
    setup.daemon.join().unwrap();
}

#[test]
fn what_virtiofsd_had_finished_is_not_answered_twice() {
    let (setup, mut guest) = Setup::good();
    guest.start(0, 16);
    let first = ask(&mut guest, 1, 1);
    let second = ask(&mut guest, 1, 2);
    // The daemon's doing: the first request is used, with an answer of its own.
    let used = guest.queues[1].used();
    guest.memory.write_obj(0u32, GuestAddress(used + 4)).unwrap();
    guest.memory.write_obj(1u16, GuestAddress(used + 2)).unwrap();
    setup.connection.shutdown(Shutdown::Both).unwrap();
    guest.run_until(|guest| guest.bytes(second, 16) == refusal(2));
    assert_eq!(guest.bytes(first, 16), [0; 16]);
    assert!(guest.used(1).is_some() && guest.used(1).is_some() && guest.used(1).is_none());
    drop(guest);
}

#[test]
fn a_request_that_is_none_fails_the_device_and_nothing_else() {
    let (setup, mut guest) = Setup::good();
    guest.start(0, 16);
    let short = guest.place(&[0; 8]);
    guest.add(1, &[(short, 8, false)]).unwrap();
    setup.connection.shutdown(Shutdown::Both).unwrap();
    guest.run_until(|guest| guest.status() & 64 != 0);
    setup.daemon.join().unwrap();
}
