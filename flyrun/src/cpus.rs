//! Numbers of CPUs as docker writes them: a machine with 1.5 has two vCPUs and may use three quarters of their time.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// The most vCPUs that a machine may have.
pub const MAX: u32 = 32;
/// The kernel holds nobody to less than a hundredth of a CPU.
const MIN_MILLI: u32 = 10;

/// `--cpus`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpus {
    milli: u32,
}

impl Cpus {
    /// The vCPUs that the machine sees.
    pub fn count(self) -> u8 {
        self.milli.div_ceil(1000).min(MAX) as u8
    }

    /// Thousandths of a CPU that they may use together, where that is less than all of their time.
    pub fn quota_milli(self) -> Option<u32> {
        (!self.milli.is_multiple_of(1000)).then_some(self.milli)
    }
}

impl Default for Cpus {
    fn default() -> Self {
        Cpus { milli: 1000 }
    }
}

/// What is not a number of CPUs.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("'{0}' is not a number of CPUs: write 0.01 to {MAX}, such as 2 or 1.5")]
pub struct NotCpus(String);

impl FromStr for Cpus {
    type Err = NotCpus;

    fn from_str(text: &str) -> Result<Cpus, NotCpus> {
        let refuse = || NotCpus(text.to_string());
        if !text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
            return Err(refuse());
        }
        let milli = (text.parse::<f64>().map_err(|_| refuse())? * 1000.0).round();
        if (f64::from(MIN_MILLI)..=f64::from(MAX * 1000)).contains(&milli) {
            Ok(Cpus { milli: milli as u32 })
        } else {
            Err(refuse())
        }
    }
}

impl fmt::Display for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", f64::from(self.milli) / 1000.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_cpu_is_a_quota() {
        let cpus = |text: &str| text.parse::<Cpus>().map(|cpus| (cpus.count(), cpus.quota_milli()));
        assert_eq!(cpus("2"), Ok((2, None)));
        assert_eq!(cpus("1.5"), Ok((2, Some(1500))));
        assert_eq!(cpus(".25"), Ok((1, Some(250))));
        assert_eq!(cpus("32"), Ok((32, None)));
        for bad in ["0", "0.001", "33", "32.5", "-1", "1e1", "inf", "NaN", "", ".", "1.2.3"] {
            assert!(cpus(bad).is_err(), "{bad}");
        }
        assert_eq!("1.50".parse::<Cpus>().unwrap().to_string(), "1.5");
    }
}
