//! Points in time as docker writes them, and durations.

use std::str::FromStr;
use std::time::{Duration, SystemTime};

/// `--since` and `--until`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
pub struct Moment(pub SystemTime);

impl FromStr for Moment {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Moment, String> {
        let bad = || {
            format!(
                "'{text}' is not a time: write 2026-01-31T12:00:00Z, seconds since the epoch, or a duration such as 10m"
            )
        };
        if let Ok(seconds) = text.parse::<f64>() {
            let since = Duration::try_from_secs_f64(seconds).map_err(|_| bad())?;
            return SystemTime::UNIX_EPOCH.checked_add(since).map(Moment).ok_or_else(bad);
        }
        if let Ok(ago) = humantime::parse_duration(text) {
            return SystemTime::now().checked_sub(ago).map(Moment).ok_or_else(bad);
        }
        humantime::parse_rfc3339_weak(text)
            .or_else(|_| humantime::parse_rfc3339_weak(&format!("{text}T00:00:00")))
            .map(Moment)
            .map_err(|_| bad())
    }
}

/// `30s`, `1m30s` or `500ms`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Period(pub Duration);

impl FromStr for Period {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Period, String> {
        let period = humantime::parse_duration(text);
        period.map(Period).map_err(|_| format!("'{text}' is not a duration: write 30s, 1m30s or 500ms"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_absolute_or_relative() {
        let epoch = |seconds| Moment(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!("86400".parse::<Moment>(), Ok(epoch(86_400)));
        assert_eq!("1970-01-02T00:00:00Z".parse::<Moment>(), Ok(epoch(86_400)));
        assert_eq!("1970-01-02T00:00:00".parse::<Moment>(), Ok(epoch(86_400)));
        assert_eq!("1970-01-02".parse::<Moment>(), Ok(epoch(86_400)));
        assert!("10m".parse::<Moment>().unwrap() < Moment(SystemTime::now()));
        for bad in ["", "yesterday", "-5", "1e300", "NaN"] {
            assert!(bad.parse::<Moment>().is_err(), "{bad}");
        }
    }

    #[test]
    fn periods_are_written_as_docker_does() {
        let ms = |text: &str| text.parse::<Period>().map(|period| period.0.as_millis());
        assert_eq!([ms("30s"), ms("1m30s"), ms("500ms"), ms("0s")], [Ok(30_000), Ok(90_000), Ok(500), Ok(0)]);
        for bad in ["", "5", "-1s", "1 fortnight"] {
            assert!(ms(bad).is_err(), "{bad}");
        }
    }
}
