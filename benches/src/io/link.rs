//! The host's end of a guest's cable: a TAP with an address, and iperf3's server there.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result};

/// The interface.
pub const TAP: &str = "bench0";
/// The address of the guest's card. Its IP address, 10.99.0.2, is in `benches/guest/io`.
pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 99];
const ADDRESS: &str = "10.99.0.1/24";

/// The interface and the server. Both go when it is dropped.
#[derive(Debug)]
pub struct Link {
    server: Child,
}

impl Link {
    /// Makes the interface and starts the server.
    pub fn new(iperf3: &Path) -> Result<Self> {
        ip(&["tuntap", "add", "dev", TAP, "mode", "tap"])?;
        ip(&["link", "set", TAP, "addrgenmode", "none"])?;
        ip(&["address", "add", ADDRESS, "dev", TAP])?;
        ip(&["link", "set", TAP, "up"])?;
        let server = Command::new(iperf3).arg("-s").stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        Ok(Self { server: server.context("iperf3 cannot be started")? })
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let _gone_already = self.server.kill();
        let _reaped_already = self.server.wait();
        if let Err(error) = ip(&["link", "delete", TAP]) {
            eprintln!("bench: {error:#}");
        }
    }
}

fn ip(words: &[&str]) -> Result<()> {
    let status = Command::new("ip").args(words).status().context("ip cannot be started")?;
    anyhow::ensure!(status.success(), "ip {} ended with {status}", words.join(" "));
    Ok(())
}
