//! What an image, and the registry that has it, may cost: limits that an environment variable changes each.

use std::time::Duration;

use images::{PullOptions, ROOTFS_BYTES};

use crate::error::{Error, Result};
use crate::size::Size;

/// Seconds that a registry may be silent.
const STALL: &str = "FLYRUN_PULL_STALL";
/// Bytes per second that it has to send at least.
const MIN_RATE: &str = "FLYRUN_PULL_MIN_RATE";
/// Hosts that it may send us to, wherever they are.
const REDIRECTS: &str = "FLYRUN_PULL_REDIRECTS";
/// The largest root filesystem.
const ROOTFS_MAX: &str = "FLYRUN_ROOTFS_MAX";
/// Seconds that an image may take to unpack.
const UNPACK_TIMEOUT: &str = "FLYRUN_UNPACK_TIMEOUT";

/// No root filesystem of fewer bytes is of use.
const MIN_ROOTFS_MAX: u64 = 256 << 20;
/// A day.
const MAX_SECONDS: u64 = 86_400;

/// How to pull, as the environment has it and the defaults where it says nothing.
///
/// # Errors
/// A variable does not parse.
pub fn pull_options() -> Result<PullOptions> {
    let mut options = PullOptions::default();
    if let Some(text) = variable(STALL) {
        options.stall_timeout = seconds(STALL, &text)?;
    }
    if let Some(text) = variable(MIN_RATE) {
        options.min_bytes_per_second = size(MIN_RATE, &text)?;
    }
    if let Some(text) = variable(REDIRECTS) {
        options.inward_hosts = hosts(&text);
    }
    Ok(options)
}

/// What a root filesystem may become, and how long that may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unpacking {
    /// Bytes of its filesystem.
    pub most_bytes: u64,
    pub timeout: Duration,
}

impl Unpacking {
    /// As the environment has it.
    ///
    /// # Errors
    /// A variable does not parse, or is out of range.
    pub fn from_environment() -> Result<Unpacking> {
        let most_bytes = variable(ROOTFS_MAX).map_or(Ok(ROOTFS_BYTES), |text| rootfs_max(&text))?;
        let timeout = variable(UNPACK_TIMEOUT)
            .map_or(Ok(Duration::from_secs(3600)), |text| seconds(UNPACK_TIMEOUT, &text))?;
        Ok(Unpacking { most_bytes, timeout })
    }

    /// What to do about an image that is larger.
    pub fn advice(self) -> String {
        match self.most_bytes {
            ROOTFS_BYTES => {
                "If the image is good elsewhere, remove it with `flyrun rmi` and pull it again.".into()
            }
            most => {
                format!("{ROOTFS_MAX} allows {} MiB; unset, it is {} GiB.", most >> 20, ROOTFS_BYTES >> 30)
            }
        }
    }

    /// What is told of an image that takes longer.
    pub fn overdue(self, image: &str) -> Error {
        Error::new(format!("{image} was not unpacked after {} seconds", self.timeout.as_secs()))
            .advice(format!("{UNPACK_TIMEOUT} gives it more."))
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|text| !text.is_empty())
}

fn size(name: &str, text: &str) -> Result<u64> {
    text.parse::<Size>().map(|size| size.0).map_err(|error| Error::new(format!("{name}: {error}")))
}

fn rootfs_max(text: &str) -> Result<u64> {
    let bytes = size(ROOTFS_MAX, text)?;
    if (MIN_ROOTFS_MAX..=ROOTFS_BYTES).contains(&bytes) {
        return Ok(bytes);
    }
    Err(Error::new(format!("{ROOTFS_MAX} is {text}, which is out of range")).advice(format!(
        "Choose between {} and {} MiB.",
        MIN_ROOTFS_MAX >> 20,
        ROOTFS_BYTES >> 20
    )))
}

fn seconds(name: &str, text: &str) -> Result<Duration> {
    let seconds = text.parse().ok().filter(|seconds| (1..=MAX_SECONDS).contains(seconds));
    seconds.map(Duration::from_secs).ok_or_else(|| {
        Error::new(format!("{name} is {text:?}, which is no number of seconds from 1 to {MAX_SECONDS}"))
    })
}

/// As they stand in an address, IPv6 ones in brackets or not.
fn hosts(text: &str) -> Vec<String> {
    let host = |word: &str| match word.trim_matches(['[', ']']).parse::<std::net::Ipv6Addr>() {
        Ok(address) => format!("[{address}]"),
        Err(_) => word.to_ascii_lowercase(),
    };
    text.split([',', ' ']).filter(|word| !word.is_empty()).map(host).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_out_of_range_is_refused_by_name() {
        for (told, name) in [
            (rootfs_max("1m").map(|_| ()), ROOTFS_MAX),
            (rootfs_max("65g").map(|_| ()), ROOTFS_MAX),
            (rootfs_max("big").map(|_| ()), ROOTFS_MAX),
            (seconds(STALL, "0").map(|_| ()), STALL),
            (seconds(STALL, "1h").map(|_| ()), STALL),
            (size(MIN_RATE, "-1").map(|_| ()), MIN_RATE),
        ] {
            assert!(told.unwrap_err().to_string().contains(name));
        }
        assert_eq!(rootfs_max("1g").unwrap(), 1 << 30);
    }

    #[test]
    fn hosts_are_written_as_in_an_address() {
        assert_eq!(
            hosts("Storage.LAN, fd00::1,[FD00::2] 10.0.0.1"),
            ["storage.lan", "[fd00::1]", "[fd00::2]", "10.0.0.1"]
        );
    }
}
