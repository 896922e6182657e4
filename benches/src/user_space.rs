//! When a guest first runs in user space: KVM's tracepoint `kvm_entry` tells the address that it enters the guest at, and the
//! filter leaves those of the kernel's half out. A guest that has all its pages may have run there before; nobody is told.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result};

const TRACING: &str = "/sys/kernel/tracing";
const EVENT: &str = "events/kvm/kvm_entry";
/// Where the kernel's half of the address space begins, or what is between both.
const USER_END: u64 = 1 << 47;

/// The events since this was made. One at a time.
#[derive(Debug)]
pub struct Watch(());

impl Watch {
    /// Begins to watch all machines of this host.
    pub fn begin() -> Result<Self> {
        if !Path::new(TRACING).join("trace").exists() {
            let status = Command::new("mount").args(["-t", "tracefs", "tracefs", TRACING]).status()?;
            anyhow::ensure!(status.success(), "mount -t tracefs ended with {status}");
        }
        put("trace_clock", "mono")?;
        put(&format!("{EVENT}/filter"), &format!("rip < {USER_END}"))?;
        put("trace", "")?;
        put(&format!("{EVENT}/enable"), "1")?;
        Ok(Self(()))
    }

    /// The first entry in user space, in µs of CLOCK_MONOTONIC.
    pub fn first_us(self) -> Result<Option<u64>> {
        first(&fs::read_to_string(Path::new(TRACING).join("trace"))?)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = put(&format!("{EVENT}/enable"), "0");
    }
}

fn put(name: &str, value: &str) -> Result<()> {
    let path = Path::new(TRACING).join(name);
    fs::write(&path, value).with_context(|| format!("cannot write {}", path.display()))
}

/// Of lines such as `vcpu0-320 [000] ..... 18.203014: kvm_entry: vcpu 0, rip 0x401000`.
fn first(trace: &str) -> Result<Option<u64>> {
    let Some(line) = trace.lines().find(|line| line.contains(": kvm_entry: ")) else { return Ok(None) };
    let time = line.split(": kvm_entry: ").next().and_then(|before| before.split_whitespace().last());
    let parts = time.and_then(|time| time.split_once('.'));
    let (seconds, micros) = parts.with_context(|| format!("no time in {line}"))?;
    Ok(Some(seconds.parse::<u64>()? * 1_000_000 + micros.parse::<u64>()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_the_first_entry_is_read() {
        let trace = "# tracer: nop\n#\n  vcpu0-320  [000] .....  18.203014: kvm_entry: vcpu 0, rip 0x401000\n  \
                     vcpu0-320  [000] .....  19.000001: kvm_entry: vcpu 0, rip 0x401004\n";
        assert_eq!(first(trace).unwrap(), Some(18_203_014));
        assert_eq!(first("# tracer: nop\n").unwrap(), None);
    }
}
