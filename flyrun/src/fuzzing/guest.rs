//! What a guest, or a VMM that it has taken over, says to the host.

use std::fs;
use std::io::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Instant;

use protocol::FromGuest;

use super::{assert_harmless, parts};
use crate::http_status::status_of;
use crate::network::dns::{answer, tcp};
use crate::session::{self, Link};
use crate::vm::{Event, Mailbox, pass_frames, read_answer};

/// A connection at whose other end is written what a socket holds, and no more comes.
fn said(bytes: &[u8]) -> UnixStream {
    let (ours, mut theirs) = UnixStream::pair().expect("there are sockets");
    theirs.set_nonblocking(true).expect("it can be set");
    let _ = theirs.write_all(bytes);
    theirs.shutdown(Shutdown::Write).expect("it is connected");
    // What is answered is lost, as with a guest that has ended.
    ours
}

/// Each part of the input as a frame, the last as it is.
fn framed(bytes: &[u8]) -> Vec<u8> {
    let parts = parts(bytes);
    let (last, frames) = parts.split_last().map_or((&[][..], &[][..]), |(last, frames)| (*last, frames));
    let mut stream = Vec::with_capacity(bytes.len() * 2);
    for frame in frames {
        stream.extend(u32::try_from(frame.len()).unwrap_or(0).to_le_bytes());
        stream.extend(*frame);
    }
    stream.extend(last);
    stream
}

/// Guest-init's control connection.
pub fn control_stream(bytes: &[u8]) {
    let mailbox = Mailbox::new();
    let (stream, post) = (said(&framed(bytes)), mailbox.post());
    // It waits where too much was not heard yet.
    let passing = thread::spawn(move || pass_frames(stream, &post));
    loop {
        let is_all = passing.is_finished();
        while let Ok(event) = mailbox.next(Some(Instant::now())) {
            if let Event::Guest(FromGuest::Failed { message, .. } | FromGuest::NotFrozen { message }) = event
            {
                assert_harmless(&message);
                assert!(!message.contains('\n'));
            }
        }
        if is_all {
            break;
        }
        thread::yield_now();
    }
    if let Some(error) = passing.join().expect("it does not panic") {
        assert_harmless(&error);
    }
}

/// `flyrun cp` out of a machine: nothing is written but below its destination, and no message has what a terminal obeys.
pub fn copy_out(directory: &Path, bytes: &[u8]) {
    let stream = framed(bytes);
    let (inside, outside) = (directory.join("inside"), directory.join("outside"));
    if !outside.exists() {
        fs::create_dir_all(&outside).expect("a directory can be made");
        fs::write(outside.join("secret"), "untouched").expect("a file can be made");
    }
    fs::create_dir_all(inside.join("there")).expect("a directory can be made");
    symlink("../outside", inside.join("link")).expect("a link can be made");
    let destination = inside.to_string_lossy();
    let mut tar = Vec::new();
    let outcomes = [
        session::copy_out(&Link::new(said(&stream)), "/link", false, &destination, false),
        session::copy_out_tar(&Link::new(said(&stream)), "/x", false, &mut tar),
    ];
    for error in outcomes.iter().filter_map(|outcome| outcome.as_ref().err()) {
        assert_harmless(&error.to_string());
    }
    let names = |path: &Path| {
        let entries = fs::read_dir(path).expect("the directory is there");
        let mut names: Vec<_> = entries.map(|entry| entry.expect("it can be read").file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(&outside), ["secret"]);
    assert_eq!(fs::read(outside.join("secret")).expect("it is there"), b"untouched");
    assert!(names(directory).iter().all(|name| name == "inside" || name == "outside"));
    remove(&inside);
}

/// Also what its modes keep from being entered, which root does not notice.
fn remove(directory: &Path) {
    fs::remove_dir_all(directory).expect("what was copied can be removed");
}

/// A question to the machine's name server, by UDP and behind its length.
pub fn dns(bytes: &[u8]) {
    let find = |name: &str| (name.len() != 3).then_some((Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST));
    if let Some(reply) = answer::own(bytes, find) {
        assert_eq!(reply.get(..2), bytes.get(..2), "an answer has the question's number");
        assert!(reply.len() <= 12 + 2 * 300 + 100, "an answer of {} bytes", reply.len());
        assert_eq!(answer::id_of_question(&reply), None);
    }
    if let Some(id) = answer::id_of_question(bytes) {
        assert!(bytes.starts_with(&id));
    }
    if let Ok(message) = tcp::read_message(&mut &bytes[..]) {
        assert!(bytes.get(2..).is_some_and(|rest| rest.starts_with(&message)));
    }
}

/// What a machine answers to a health check, and what a client asks of the page.
pub fn http(bytes: &[u8]) {
    if let Ok(Some(status)) = status_of(bytes) {
        assert!((100..=999).contains(&status) || status < 100, "{status}");
    }
    let Some((method, path, host)) = crate::serve::asked_for(bytes) else { return };
    assert!(!path.contains('?'));
    let peer = Ipv4Addr::LOCALHOST.into();
    let request = page::Request { method: &method, path: &path, host: host.as_deref(), peer };
    let nothing = page::State::default;
    if let Some(page::Answer::Whole(whole)) = page::answer(&request, &nothing) {
        assert!((200..=599).contains(&whole.status));
        assert!(whole.location.is_none_or(|location| !location.contains(['\r', '\n'])));
    }
}

/// What flyrun-vmm answers on its standard input.
pub fn vmm_answers(bytes: &[u8]) {
    if let Err(error) = read_answer(&said(bytes)) {
        assert_harmless(&error.to_string());
    }
}
