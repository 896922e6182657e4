//! The records of a pax extended header (POSIX pax, "pax extended header"): `length key=value\n`.

use super::{TarError, Time};

/// The records that mean something here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Records {
    /// `path`
    pub path: Option<Vec<u8>>,
    /// `linkpath`
    pub link: Option<Vec<u8>>,
    /// `size`
    pub size: Option<u64>,
    /// `uid`
    pub uid: Option<i64>,
    /// `gid`
    pub gid: Option<i64>,
    /// `mtime`
    pub mtime: Option<Time>,
    /// `atime`
    pub atime: Option<Time>,
    /// `SCHILY.xattr.*`, the last value of each name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// `GNU.sparse.*`
    pub sparse: SparseRecords,
}

/// The `GNU.sparse.*` records (GNU tar manual, "Storing Sparse Files").
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SparseRecords {
    /// `major` and `minor` of version 1.0.
    pub version: (Option<u64>, Option<u64>),
    /// `name`: the file's, where `path` has an invented one.
    pub name: Option<Vec<u8>>,
    /// `size` or `realsize`: with the holes.
    pub size: Option<u64>,
    /// `offset` and `numbytes` (0.0), or `map` (0.1), as pairs.
    pub map: Vec<u64>,
}

/// Parses a whole extended header.
///
/// # Errors
/// [`TarError::Pax`] for anything that is not such a record, or a value that is none for its key.
pub fn parse(mut bytes: &[u8]) -> Result<Records, TarError> {
    let mut records = Records::default();
    while !bytes.is_empty() {
        let (key, value, rest) = split_record(bytes).ok_or(TarError::Pax("a record"))?;
        records.take(key, value)?;
        bytes = rest;
    }
    Ok(records)
}

fn split_record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(20).position(|byte| *byte == b' ')?;
    let length = usize::try_from(decimal(bytes.get(..space)?)?).ok()?;
    let record = bytes.get(space + 1..length)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    let (key, value) = (record.get(..equals)?, record.get(equals + 1..)?);
    (!key.is_empty()).then_some((key, value, bytes.get(length..)?))
}

impl Records {
    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarError> {
        // An empty value takes back what an earlier record said.
        let some = |value: &[u8]| (!value.is_empty()).then(|| value.to_vec());
        match key {
            b"path" => self.path = some(without_nul(value, "path")?),
            b"linkpath" => self.link = some(without_nul(value, "linkpath")?),
            b"size" => self.size = optional(value, decimal, "size")?,
            b"uid" => self.uid = optional(value, |value| i64::try_from(decimal(value)?).ok(), "uid")?,
            b"gid" => self.gid = optional(value, |value| i64::try_from(decimal(value)?).ok(), "gid")?,
            b"mtime" => self.mtime = optional(value, time, "mtime")?,
            b"atime" => self.atime = optional(value, time, "atime")?,
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    let name = without_nul(name, "an xattr's name")?.to_vec();
                    self.xattrs.retain(|(known, _)| *known != name);
                    self.xattrs.push((name, value.to_vec()));
                } else if let Some(name) = key.strip_prefix(b"GNU.sparse.") {
                    self.sparse.take(name, value)?;
                }
            }
        }
        Ok(())
    }
}

impl SparseRecords {
    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarError> {
        match key {
            b"major" => self.version.0 = optional(value, decimal, "GNU.sparse.major")?,
            b"minor" => self.version.1 = optional(value, decimal, "GNU.sparse.minor")?,
            b"name" => self.name = Some(without_nul(value, "GNU.sparse.name")?.to_vec()),
            b"size" | b"realsize" => self.size = optional(value, decimal, "GNU.sparse.size")?,
            b"offset" | b"numbytes" => {
                // Version 0.0 repeats the two in turn.
                let is_its_turn = self.map.len().is_multiple_of(2) == (key == b"offset");
                let number = decimal(value).filter(|_| is_its_turn);
                self.map.push(number.ok_or(TarError::Pax("GNU.sparse.offset and numbytes"))?);
            }
            b"map" => {
                let numbers = value.split(|byte| *byte == b',').map(decimal).collect::<Option<Vec<u64>>>();
                self.map = numbers.ok_or(TarError::Pax("GNU.sparse.map"))?;
            }
            _ => {}
        }
        Ok(())
    }
}

fn without_nul<'a>(value: &'a [u8], key: &'static str) -> Result<&'a [u8], TarError> {
    if value.contains(&0) { Err(TarError::Pax(key)) } else { Ok(value) }
}

fn optional<T>(
    value: &[u8],
    parse: impl Fn(&[u8]) -> Option<T>,
    key: &'static str,
) -> Result<Option<T>, TarError> {
    if value.is_empty() {
        return Ok(None);
    }
    parse(value).map(Some).ok_or(TarError::Pax(key))
}

/// A decimal number without a sign.
pub fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0u64, |value, digit| match digit {
        b'0'..=b'9' => value.checked_mul(10)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    })
}

/// Seconds with an optional sign and fraction; of the fraction nine digits count.
fn time(text: &[u8]) -> Option<Time> {
    let (negative, text) = text.strip_prefix(b"-").map_or((false, text), |rest| (true, rest));
    let mut parts = text.splitn(2, |byte| *byte == b'.');
    let seconds = i64::try_from(decimal(parts.next()?)?).ok()?;
    let mut nanoseconds = 0i64;
    let fraction = parts.next().unwrap_or_default();
    for at in 0..9 {
        let digit = fraction.get(at).copied().unwrap_or(b'0');
        nanoseconds = nanoseconds * 10 + i64::from(digit.is_ascii_digit().then(|| digit - b'0')?);
    }
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    Some(match (negative, nanoseconds) {
        (false, _) => Time { seconds, nanoseconds },
        (true, 0) => Time { seconds: -seconds, nanoseconds },
        (true, _) => Time { seconds: -seconds - 1, nanoseconds: 1_000_000_000 - nanoseconds },
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn records_are_read_with_the_last_one_winning() {
        let records =
            parse(b"11 path=ab\n12 path=abc\n21 mtime=1.000000002\n27 SCHILY.xattr.user.a=x=\n\n").unwrap();
        assert_eq!(records.path.as_deref(), Some(&b"abc"[..]));
        assert_eq!(records.mtime, Some(Time { seconds: 1, nanoseconds: 2 }));
        assert_eq!(records.xattrs, [(b"user.a".to_vec(), b"x=\n".to_vec())]);
    }

    #[test]
    fn an_empty_value_takes_the_earlier_one_back() {
        let records = parse(b"12 path=abc\n8 path=\n").unwrap();
        assert_eq!(records.path, None);
    }

    #[test]
    fn what_is_no_record_is_refused() {
        for bad in [
            &b"x"[..],
            b"5 a=b",
            b"99 a=b\n",
            b"6 a=b\nx",
            b"4 ab\n",
            b"5 =bc\n",
            b" a=b\n",
            b"0 a=b\n",
            b"10 size=-1\n",
            b"12 path=a\0b\n",
            b"99999999999999999999 a=b\n",
        ] {
            assert!(parse(bad).is_err(), "{:?}", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn times_before_1970_count_backwards() {
        assert_eq!(time(b"-1.25"), Some(Time { seconds: -2, nanoseconds: 750_000_000 }));
        assert_eq!(time(b"-3"), Some(Time { seconds: -3, nanoseconds: 0 }));
        assert_eq!(time(b"1.1234567899"), Some(Time { seconds: 1, nanoseconds: 123_456_789 }));
        assert_eq!(time(b"1."), Some(Time { seconds: 1, nanoseconds: 0 }));
        assert_eq!(time(b"1.2x"), None);
        assert_eq!(time(b""), None);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn a_record_comes_back(value in proptest::collection::vec(1u8.., 1..300)) {
            let mut length = value.len() + 7;
            while length.to_string().len() + value.len() + 7 != length {
                length = length.to_string().len() + value.len() + 7;
            }
            let record = [format!("{length} path=").as_bytes(), &value, b"\n"].concat();
            prop_assert_eq!(parse(&record).unwrap().path, Some(value));
        }
    }
}
