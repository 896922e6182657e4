//! What the owner of a machine can write to its stream: each line is answered by one, but for one kind.
#![no_main]
#![allow(clippy::expect_used, reason = "only fuzzers run this")]

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    sync::{Arc, Mutex},
};

use event_manager::{EventManager, SubscriberOps};
use libfuzzer_sys::fuzz_target;
use vmm::{
    channel::{Channel, MAX_LINE, Owned},
    ending::Ending,
    machine::Machine,
};

fuzz_target!(|data: &[u8]| {
    let (mut owner, stream) = UnixStream::pair().expect("there are sockets");
    stream.set_nonblocking(true).expect("it can be set");
    owner.set_nonblocking(true).expect("it can be set");
    let ending = Arc::new(Ending::new().expect("there are descriptors"));
    let machine = Arc::new(Mutex::new(Machine::new(vec![], Arc::clone(&ending))));
    if data.first().is_some_and(|byte| byte & 1 == 0) {
        let _ = machine.lock().expect("nobody has panicked").start();
    }
    let owned = Owned { subject: None, owner: None, ending };
    let mut events = EventManager::new().expect("there are descriptors");
    events.add_subscriber(Channel::new(stream, machine, owned));
    // In two pieces, as a stream may be.
    let lines = data.get(1..).unwrap_or_default();
    for piece in lines.chunks((lines.len() / 2).max(1)) {
        if owner.write_all(piece).is_err() {
            break;
        }
        events.run_with_timeout(0).expect("events can be waited for");
    }
    let mut answers = Vec::new();
    let _ = owner.read_to_end(&mut answers);
    let text = String::from_utf8(answers).expect("answers are text");
    assert!(text.lines().all(|line| line == "ok" || line.starts_with("ok ") || line.starts_with("error ")));
    if lines.len() < MAX_LINE {
        let asked = lines.split_inclusive(|byte| *byte == b'\n').filter(|line| line.ends_with(b"\n"));
        let answered = asked.filter(|line| line.trim_ascii() != b"read-ahead").count();
        assert_eq!(text.lines().count(), answered, "{text:?}");
    }
});
