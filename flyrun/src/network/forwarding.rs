//! The host's kernel settings without which no packet gets from a machine to anywhere else.

use std::fs;
use std::path::Path;

use super::address::Number;
use crate::error::{Context, Result};

const FORWARD4: &str = "/proc/sys/net/ipv4/ip_forward";
const FORWARD6: &str = "/proc/sys/net/ipv6/conf/all/forwarding";

/// Lets the host forward packets. It stays so afterwards: others may have come to rely on it.
///
/// # Errors
/// The setting cannot be written. A host without IPv6 has none for it.
pub fn enable() -> Result<()> {
    set(FORWARD4)?;
    if Path::new(FORWARD6).exists() && !is_on(FORWARD6) {
        keep_router_advertisements();
        set(FORWARD6)?;
    }
    Ok(())
}

/// Lets what the host sends to its own 127.0.0.1 leave for this machine.
///
/// # Errors
/// The setting cannot be written.
pub fn allow_loopback(number: Number) -> Result<()> {
    set(&format!("/proc/sys/net/ipv4/conf/{}/route_localnet", number.tap()))
}

/// A host that forwards ignores router advertisements, from which it may have its own default route, unless told to
/// heed them all the same.
fn keep_router_advertisements() {
    for entry in fs::read_dir("/proc/sys/net/ipv6/conf").into_iter().flatten().flatten() {
        let setting = entry.path().join("accept_ra");
        let ours = entry.file_name().to_str().is_some_and(|name| Number::of_tap(name).is_some());
        let general = entry.file_name() == "all" || entry.file_name() == "default";
        if !ours && !general && is_on(&setting) {
            let _ = fs::write(&setting, "2");
        }
    }
}

fn is_on(path: impl AsRef<Path>) -> bool {
    fs::read_to_string(path).is_ok_and(|text| text.trim() == "1")
}

fn set(path: &str) -> Result<()> {
    if is_on(path) {
        return Ok(());
    }
    fs::write(path, "1").context(format!("cannot set {path}"))
}
