//! What systemd is told, where it has started this process: sd_notify(3).

use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Tells systemd something, such as `READY=1`, if there is one that wants to know.
pub fn notify(what: &str) {
    if let Some(path) = std::env::var_os("NOTIFY_SOCKET") {
        // Whoever does not listen any more need not be told.
        let _ = send(path.as_bytes(), what);
    }
}

fn send(path: &[u8], what: &str) -> std::io::Result<()> {
    let address = match path.split_first() {
        Some((b'@', name)) => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(path))?,
    };
    UnixDatagram::unbound()?.send_to_addr(what.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systemd_hears_what_it_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let listener = UnixDatagram::bind(&path).unwrap();
        send(path.as_os_str().as_bytes(), "READY=1").unwrap();
        let mut told = [0; 32];
        let count = listener.recv(&mut told).unwrap();
        assert_eq!(&told[..count], b"READY=1");
        let name = format!("flyrun-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let listener = UnixDatagram::bind_addr(&address).unwrap();
        send(format!("@{name}").as_bytes(), "STOPPING=1").unwrap();
        let count = listener.recv(&mut told).unwrap();
        assert_eq!(&told[..count], b"STOPPING=1");
    }
}
