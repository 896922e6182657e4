//! HAProxy as a plain reverse proxy to a machine.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};

const PORT: u16 = 18081;
const ATTEMPTS: usize = 500;

/// As plain as it can be said, with what flyrun's proxy does for each request too: keep-alive on both sides, connections to the
/// machine used again, the client's address told.
const CONFIGURATION: &str = "
global
    nbthread 1
    maxconn 1000
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    option http-keep-alive
    http-reuse always
    option forwardfor
frontend clients
    bind 127.0.0.1:PORT
    default_backend machines
backend machines
    server machine MACHINE
";

/// A HAProxy, which ends when it is dropped.
#[derive(Debug)]
pub struct Peer {
    child: Child,
    _directory: tempfile::TempDir,
}

impl Peer {
    /// Starts one in front of a machine.
    pub fn start(program: &Path, machine: SocketAddr) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let file = directory.path().join("haproxy.cfg");
        let text = CONFIGURATION.replace("PORT", &PORT.to_string()).replace("MACHINE", &machine.to_string());
        std::fs::write(&file, text)?;
        let mut command = Command::new(program);
        command.arg("-db").arg("-f").arg(&file).stdin(Stdio::null()).stdout(Stdio::null());
        let child = command.spawn().context("haproxy cannot be started")?;
        let mut peer = Self { child, _directory: directory };
        for _ in 0..ATTEMPTS {
            if TcpStream::connect(peer.address()).is_ok() {
                return Ok(peer);
            }
            if let Some(status) = peer.child.try_wait()? {
                bail!("haproxy ended with {status}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        bail!("haproxy does not listen on port {PORT}")
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, PORT).into()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _gone_already = self.child.kill();
        let _reaped_already = self.child.wait();
    }
}
