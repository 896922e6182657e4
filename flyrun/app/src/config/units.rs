//! Durations and sizes as fly.toml writes them.

use std::fmt;
use std::time::Duration;

/// A number of bytes. Displayed as fly.toml has it: `512mb`, in powers of 1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

/// Each unit of a size with its power of two, the largest first.
const SIZES: [(&str, u32); 4] = [("tb", 40), ("gb", 30), ("mb", 20), ("kb", 10)];
/// Each unit of a duration in milliseconds, the largest first, as Go has them.
const TIMES: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

impl Bytes {
    /// So many MiB.
    pub const fn mib(count: u64) -> Bytes {
        Bytes(count << 20)
    }

    /// `512mb`, `1gb`, `1.5 GiB`.
    pub(crate) fn parse(text: &str) -> Option<Bytes> {
        let text = text.trim().to_ascii_lowercase();
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, unit) = text.split_at_checked(digits)?;
        let unit = unit.trim_start();
        let shift = match unit {
            "b" => 0,
            _ => SIZES.iter().find(|(name, _)| is_unit(unit, name))?.1,
        };
        decimal(number, 1 << shift).map(Bytes)
    }
}

/// `mb`, `mib` and `m` are one unit.
fn is_unit(text: &str, name: &str) -> bool {
    let letter = name.strip_suffix('b').unwrap_or(name);
    text.strip_prefix(letter).is_some_and(|rest| matches!(rest, "" | "b" | "ib"))
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = SIZES.iter().find(|(_, shift)| self.0 > 0 && self.0.trailing_zeros() >= *shift);
        match whole {
            Some((unit, shift)) => write!(f, "{}{unit}", self.0 >> shift),
            None => write!(f, "{}b", self.0),
        }
    }
}

/// `10s`, `1m30s`, `1.5h`: Go's form, to the millisecond.
pub(crate) fn parse_duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let (mut rest, mut total) = (text, 0u64);
    while !rest.is_empty() {
        let (number, tail) = rest.split_at(rest.find(|c: char| !c.is_ascii_digit() && c != '.')?);
        let (unit, tail) = tail.split_at(tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len()));
        let (_, millis) = TIMES.iter().find(|(name, _)| *name == unit)?;
        total = total.checked_add(decimal(number, *millis)?)?;
        rest = tail;
    }
    (!text.is_empty()).then(|| Duration::from_millis(total))
}

/// The shortest text that reads as this duration, which is whole milliseconds.
pub(crate) fn duration_text(duration: Duration) -> String {
    let mut rest = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let mut text = String::new();
    for (unit, millis) in TIMES {
        if rest >= millis {
            text.push_str(&format!("{}{unit}", rest / millis));
            rest %= millis;
        }
    }
    if text.is_empty() { "0s".to_string() } else { text }
}

/// `number` times `unit`, if that is a whole number. `number` has digits and dots only.
fn decimal(number: &str, unit: u64) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let mut total = match whole {
        "" if fraction.is_empty() => return None,
        "" => 0,
        _ => whole.parse::<u64>().ok()?.checked_mul(unit)?,
    };
    if !fraction.is_empty() {
        let scale = 10u64.checked_pow(u32::try_from(fraction.len()).ok()?)?;
        let part = u128::from(fraction.parse::<u64>().ok()?) * u128::from(unit);
        if part % u128::from(scale) != 0 {
            return None;
        }
        total = total.checked_add(u64::try_from(part / u128::from(scale)).ok()?)?;
    }
    Some(total)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn durations_are_gos() {
        let ms = |text| parse_duration(text).map(|duration| duration.as_millis());
        assert_eq!(ms("10s"), Some(10_000));
        assert_eq!(ms("1m30s"), Some(90_000));
        assert_eq!(ms("1.5h"), Some(5_400_000));
        assert_eq!(ms("250ms"), Some(250));
        assert_eq!(ms("0"), Some(0));
        for bad in ["", "10", "s", "-1s", "1d", "1 s", "0.1ms", "1.s5", "99999999999999999h", "1..5s", ".s"] {
            assert_eq!(ms(bad), None, "{bad}");
        }
    }

    #[test]
    fn sizes_have_a_unit() {
        for (text, bytes) in
            [("512mb", 512 << 20), ("1GB", 1 << 30), ("1.5 GiB", 3 << 29), ("2g", 2 << 30), ("1b", 1)]
        {
            assert_eq!(Bytes::parse(text), Some(Bytes(bytes)), "{text}");
        }
        for bad in ["", "mb", "512", "1qb", "-1mb", "1.0001kb", "99999999999tb", "1ib", "."] {
            assert_eq!(Bytes::parse(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_reads_as_the_same(millis in any::<u32>(), bytes in any::<u64>()) {
            let duration = Duration::from_millis(u64::from(millis));
            prop_assert_eq!(parse_duration(&duration_text(duration)), Some(duration));
            prop_assert_eq!(Bytes::parse(&Bytes(bytes).to_string()), Some(Bytes(bytes)));
        }

        #[test]
        fn no_text_makes_a_parser_panic(text in ".*") {
            let _ = (parse_duration(&text), Bytes::parse(&text));
        }
    }
}
