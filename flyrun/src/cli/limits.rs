//! The flags that limit what a machine takes of its host, for those who make one and those who change it.

use std::str::FromStr;

use clap::Args;

use crate::machine::Rates;
use crate::size::Size;

/// `--cpu-shares`: docker's range.
pub fn cpu_shares(text: &str) -> Result<u32, String> {
    let shares = text.parse().ok().filter(|shares| (2..=262_144).contains(shares));
    shares.ok_or_else(|| "write 2 to 262144; 1024 is what a machine has without it".to_string())
}

/// `--pids-limit`; 0 and -1 are without, as docker has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PidsLimit(pub Option<u32>);

impl FromStr for PidsLimit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // The kernel has no more (PID_MAX_LIMIT).
        match text.parse::<i64>() {
            Ok(-1 | 0) => Ok(PidsLimit(None)),
            Ok(limit @ 1..=4_194_304) => Ok(PidsLimit(Some(limit as u32))),
            _ => Err("write 1 to 4194304, or -1 for no limit".to_string()),
        }
    }
}

/// The flags that hold a machine's devices to a rate.
#[derive(Clone, Copy, Debug, Args)]
pub struct RateArguments {
    /// Most bytes per second of each of the machine's disks, its volumes and root filesystem among them; 0 for no limit
    #[arg(long, value_name = "SIZE")]
    disk_bandwidth: Option<Bandwidth>,
    /// Most requests per second of each of these disks; 0 for no limit
    #[arg(long, value_name = "N", value_parser = per_second)]
    disk_iops: Option<u64>,
    /// Most bytes per second of the machine's network, each way; 0 for no limit. Packets then go through flyrun-vmm
    #[arg(long, value_name = "SIZE")]
    net_bandwidth: Option<Bandwidth>,
    /// Most packets per second, each way; 0 for no limit
    #[arg(long, value_name = "N", value_parser = per_second)]
    net_packets: Option<u64>,
}

impl RateArguments {
    /// The same, as a machine's limits are changed.
    pub fn rates(&self) -> Rates {
        Rates {
            disk_bandwidth: self.disk_bandwidth.map(|Bandwidth(bytes)| bytes),
            disk_iops: self.disk_iops,
            net_bandwidth: self.net_bandwidth.map(|Bandwidth(bytes)| bytes),
            net_packets: self.net_packets,
        }
    }
}

/// Bytes per second; 0 is without a limit. What a guest reads and writes are pages, so one is the least.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bandwidth(u64);

impl FromStr for Bandwidth {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse::<Size>().map_err(|error| error.to_string())? {
            Size(bytes @ (0 | 4096..=MAX_BANDWIDTH)) => Ok(Bandwidth(bytes)),
            _ => Err("write bytes per second, 4k to 1t, or 0 for no limit".to_string()),
        }
    }
}

const MAX_BANDWIDTH: u64 = 1 << 40;

/// Requests or packets.
fn per_second(text: &str) -> Result<u64, String> {
    let number = text.parse().ok().filter(|number| *number <= 1_000_000_000);
    number.ok_or_else(|| "write a number per second, 1 to 1000000000, or 0 for no limit".to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_sizes_and_numbers_per_second() {
        assert_eq!("1m".parse(), Ok(Bandwidth(1 << 20)));
        assert_eq!("0".parse(), Ok(Bandwidth(0)));
        for bad in ["4095", "2t", "-1", "fast", ""] {
            assert!(bad.parse::<Bandwidth>().is_err(), "{bad}");
        }
        assert_eq!((per_second("0"), per_second("1000000000")), (Ok(0), Ok(1_000_000_000)));
        for bad in ["1000000001", "-1", "1k", "1.5", ""] {
            assert!(per_second(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn limits_have_dockers_ranges() {
        assert_eq!("-1".parse(), Ok(PidsLimit(None)));
        assert_eq!("100".parse(), Ok(PidsLimit(Some(100))));
        for bad in ["-2", "4194305", "x", ""] {
            assert!(bad.parse::<PidsLimit>().is_err(), "{bad}");
        }
        assert_eq!(cpu_shares("2"), Ok(2));
        for bad in ["1", "262145", "-5", "half"] {
            assert!(cpu_shares(bad).is_err(), "{bad}");
        }
    }
}
