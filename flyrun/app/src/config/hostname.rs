//! The host names by which requests find an app.

use std::fmt;
use std::str::FromStr;

/// An element of `[flyrun] hostnames`. Names are in lower case, without a dot at the end.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hostname {
    /// `shop.example.com`: this name and no other.
    Exact(String),
    /// `*.example.com`: every name below `example.com`, without `example.com`.
    Below(String),
    /// `*`: every name that no other app has.
    Any,
}

impl Hostname {
    /// How closely this fits the name that a client asked for, in lower case and without a port; `None` if it does not.
    /// Among several apps the closest wins.
    pub fn fit(&self, host: &str) -> Option<usize> {
        match self {
            Hostname::Exact(name) => (host == name).then_some(usize::MAX),
            Hostname::Below(name) => {
                let below = host.strip_suffix(name.as_str()).and_then(|rest| rest.strip_suffix('.'));
                below.filter(|rest| !rest.is_empty()).map(|_| name.len())
            }
            Hostname::Any => Some(0),
        }
    }
}

impl FromStr for Hostname {
    type Err = String;

    fn from_str(text: &str) -> Result<Hostname, String> {
        if text == "*" {
            return Ok(Hostname::Any);
        }
        let lower = text.to_ascii_lowercase();
        let lower = lower.strip_suffix('.').unwrap_or(&lower);
        let (name, is_below) = lower.strip_prefix("*.").map_or((lower, false), |rest| (rest, true));
        if name.len() > 253 || !name.split('.').all(is_label) {
            return Err("a host name such as shop.example.com, *.example.com or *, without a port".into());
        }
        Ok(if is_below { Hostname::Below(name.into()) } else { Hostname::Exact(name.into()) })
    }
}

/// RFC 1123, section 2.1.
fn is_label(label: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&label.len())
        && label.bytes().all(inner)
        && !label.starts_with('-')
        && !label.ends_with('-')
}

impl fmt::Display for Hostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Hostname::Exact(name) => f.write_str(name),
            Hostname::Below(name) => write!(f, "*.{name}"),
            Hostname::Any => f.write_str("*"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closest_name_wins() {
        let names: Vec<Hostname> = ["*", "*.example.com", "*.a.example.com", "x.a.example.com"]
            .map(|text| text.parse().unwrap())
            .into();
        let best = |host: &str| {
            names
                .iter()
                .max_by_key(|name| name.fit(host))
                .filter(|name| name.fit(host).is_some())
                .unwrap()
                .to_string()
        };
        assert_eq!(best("x.a.example.com"), "x.a.example.com");
        assert_eq!(best("y.a.example.com"), "*.a.example.com");
        assert_eq!(best("b.example.com"), "*.example.com");
        assert_eq!(best("example.com"), "*");
        assert_eq!(best("notexample.com"), "*");
        assert_eq!("*.example.com".parse::<Hostname>().unwrap().fit(".example.com"), None);
    }

    #[test]
    fn what_is_no_host_name_is_refused() {
        assert_eq!("Shop.Example.COM.".parse(), Ok(Hostname::Exact("shop.example.com".into())));
        for bad in ["", ".", "a..b", "-a", "a-", "a:80", "http://a", "a b", "*.*", "a*", "*.", "ü.de"] {
            assert!(bad.parse::<Hostname>().is_err(), "{bad}");
        }
    }
}
