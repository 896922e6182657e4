//! The flags that limit what a machine takes of its host, for those who make one and those who change it.

use std::str::FromStr;

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

#[cfg(test)]
mod tests {
    use super::*;

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
