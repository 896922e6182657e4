//! Whether the host's rules are as flyrun left them, without an nft that looks: its start alone takes longer than a resume.
//!
//! The kernel counts all changes of a network namespace's rules, whoever makes them. The file of the network's lock holds the
//! number at which flyrun's table stood; as long as the kernel tells the same, it stands.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

use super::nfnetlink::{REQUEST, failure, find, message, messages};
use crate::machine::boot_id;

// include/uapi/linux/netfilter/nf_tables.h.
const NFTABLES: u16 = 10 << 8;
const NEWGEN: u16 = NFTABLES | 15;
const GETGEN: u16 = NFTABLES | 16;
const GEN_ID: u16 = 1;

/// More than is ever written there.
const MAX_NOTE: usize = 256;

/// The number of changes so far.
///
/// # Errors
/// The kernel has no nf_tables, or does not tell.
pub fn generation() -> io::Result<u32> {
    let socket = Socket::new(NETLINK_NETFILTER)?;
    socket.send_to(&message(GETGEN, REQUEST, 0, &[]), &SocketAddr::new(0, 0), 0)?;
    let (answer, _) = socket.recv_from_full()?;
    match messages(&answer).next() {
        // After `struct nfgenmsg`.
        Some((NEWGEN, body)) => body
            .get(4..)
            .and_then(|attributes| find(attributes, GEN_ID)?.first_chunk().copied())
            .map(u32::from_be_bytes)
            .ok_or_else(|| io::ErrorKind::InvalidData.into()),
        Some((_, body)) => Err(failure(body)),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Whether nobody has changed any rules since they were noted to stand. `rules` tells which they are.
pub fn is_noted(lock: &File, rules: &str) -> bool {
    let mut note = [0; MAX_NOTE];
    let expected = generation().ok().and_then(|generation| text(generation, rules));
    lock.read_at(&mut note, 0).is_ok_and(|length| {
        length > 0 && expected.is_some_and(|expected| note.get(..length) == Some(expected.as_bytes()))
    })
}

/// Notes that the rules stand, if a transaction that began at this number is the only one since. They are looked at again
/// otherwise, by being made again.
pub fn note(lock: &File, rules: &str, before: Option<u32>) {
    let after = generation().ok();
    let only_one = before.map(|before| before.wrapping_add(1)).is_some_and(|next| after == Some(next));
    let text = after.filter(|_| only_one).and_then(|after| text(after, rules));
    let _ = lock.set_len(0).and_then(|()| lock.write_all_at(text.unwrap_or_default().as_bytes(), 0));
}

/// Notes that they do not stand.
pub fn forget(lock: &File) {
    let _ = lock.set_len(0);
}

/// The number means something in one network namespace, and until the host is restarted.
fn text(generation: u32, rules: &str) -> Option<String> {
    let namespace = std::fs::read_link("/proc/self/ns/net").ok()?;
    let digest = super::digest(&[rules.as_bytes()]);
    Some(format!("{} {} {digest:016x} {generation}\n", boot_id()?, namespace.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// EPROTONOSUPPORT: no netfilter over netlink.
    const PROTOCOL_UNKNOWN: i32 = 93;

    #[test]
    fn rules_stand_only_with_a_note_of_just_these_at_this_number() {
        let lock = tempfile::tempfile().unwrap();
        assert!(!is_noted(&lock, "rules"));
        let now = match generation() {
            // Not where this may not be asked, or the kernel has no nf_tables.
            Err(_) if !rustix::process::geteuid().is_root() => return,
            Err(error) if error.raw_os_error() == Some(PROTOCOL_UNKNOWN) => return,
            told => told.unwrap(),
        };
        note(&lock, "rules", Some(now.wrapping_sub(1)));
        assert!(is_noted(&lock, "rules") && !is_noted(&lock, "other rules"));
        // Somebody else was there too, before or after.
        note(&lock, "rules", Some(now.wrapping_sub(2)));
        assert!(!is_noted(&lock, "rules"));
        note(&lock, "rules", Some(now.wrapping_sub(1)));
        lock.write_all_at(b"x", 0).unwrap();
        assert!(!is_noted(&lock, "rules"));
        note(&lock, "rules", Some(now.wrapping_sub(1)));
        forget(&lock);
        assert!(!is_noted(&lock, "rules"));
    }
}
