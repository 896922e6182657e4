//! Sizes as docker writes them: a number and a unit, powers of 1024.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Size(pub u64);

impl Size {
    pub const fn mib(count: u64) -> Size {
        Size(count << 20)
    }

    pub const fn gib(count: u64) -> Size {
        Size(count << 30)
    }

    /// Whole MiB, rounded up.
    pub fn to_mib(self) -> u64 {
        self.0.div_ceil(1 << 20)
    }
}

/// What is not a size.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("'{0}' is not a size: write a number and b, k, m, g or t, such as 512m or 10g")]
pub struct NotASize(String);

impl FromStr for Size {
    type Err = NotASize;

    fn from_str(text: &str) -> Result<Size, NotASize> {
        let refuse = || NotASize(text.to_string());
        let lower = text.to_ascii_lowercase();
        let digits = lower.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(lower.len());
        let (number, unit) = lower.split_at(digits);
        let shift = match unit {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            _ => return Err(refuse()),
        };
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(1 << shift).map(Size).ok_or_else(refuse);
        }
        match number.parse::<f64>() {
            Ok(value) if shift > 0 && value * ((1u64 << shift) as f64) < u64::MAX as f64 => {
                Ok(Size((value * ((1u64 << shift) as f64)) as u64))
            }
            _ => Err(refuse()),
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, shift) in [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)] {
            if self.0 >> shift > 0 {
                let value = self.0 as f64 / (1u64 << shift) as f64;
                let decimals = usize::from(value < 100.0 && value.fract() >= 0.05);
                return write!(f, "{value:.decimals$} {unit}");
            }
        }
        write!(f, "{} B", self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn docker_forms_are_read() {
        assert_eq!("512m".parse(), Ok(Size::mib(512)));
        assert_eq!("1G".parse(), Ok(Size::gib(1)));
        assert_eq!("1.5g".parse(), Ok(Size::mib(1536)));
        assert_eq!("1048576".parse(), Ok(Size::mib(1)));
    }

    #[test]
    fn nonsense_is_refused_with_an_example() {
        for text in ["", "m", "12q", "-5m", "1.5", "99999999999g", "1e9g", "NaNg"] {
            let error = text.parse::<Size>().unwrap_err().to_string();
            assert!(error.contains("such as 512m"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in ".*") {
            let _ = text.parse::<Size>();
        }
    }
}
