//! Paths of an archive, made harmless.

use std::fmt;

use protocol::FailureKind;

use crate::failure::Failure;

/// NAME_MAX of every filesystem that is of use here.
const MAX_COMPONENT_BYTES: usize = 255;
/// PATH_MAX of Linux, without the final NUL.
const MAX_PATH_BYTES: usize = 4095;

/// A path below the root: no empty, `.` or `..` component, no slash at either end. Empty is the root itself.
///
/// Symbolic links on its way are not looked at here: the kernel resolves them within the root.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct CleanPath(Vec<u8>);

impl CleanPath {
    /// Takes a path as an archive has it; absolute ones are below the root, too.
    ///
    /// # Errors
    /// [`FailureKind::BadLayer`] for one that leads out of the root by `..`, holds a NUL, or is too long for Linux.
    pub fn new(raw: &[u8]) -> Result<Self, Failure> {
        let refuse = |why: &str| {
            let shown =
                String::from_utf8_lossy(raw.get(..raw.len().min(300)).unwrap_or_default()).into_owned();
            Err(Failure::new(FailureKind::BadLayer, format!("the path {shown:?} {why}")))
        };
        if raw.contains(&0) {
            return refuse("holds a NUL byte");
        }
        let mut parts: Vec<&[u8]> = Vec::new();
        for part in raw.split(|byte| *byte == b'/') {
            match part {
                b"" | b"." => {}
                b".." => {
                    if parts.pop().is_none() {
                        return refuse("leads out of the root");
                    }
                }
                part if part.len() > MAX_COMPONENT_BYTES => {
                    return refuse("has a name of more than 255 bytes, which Linux does not allow");
                }
                part => parts.push(part),
            }
        }
        let path = parts.join(&b'/');
        if path.len() > MAX_PATH_BYTES {
            return refuse("has more than 4095 bytes, which Linux does not allow");
        }
        Ok(Self(path))
    }

    /// Takes the target of a symbolic link, where a `..` of the root is the root, as it is for the kernel.
    ///
    /// # Errors
    /// As [`CleanPath::new`], but for the leaving of the root.
    pub fn of_link(raw: &[u8]) -> Result<Self, Failure> {
        let mut parts: Vec<&[u8]> = Vec::new();
        for part in raw.split(|byte| *byte == b'/') {
            if part == b".." {
                parts.pop();
            } else {
                parts.push(part);
            }
            parts.pop_if(|part| matches!(*part, b"" | b"."));
        }
        Self::new(&parts.join(&b'/'))
    }

    /// The bytes of the path.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether this is the root itself.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The directory it is in and its name there; `None` for the root.
    pub fn split(&self) -> Option<(CleanPath, &[u8])> {
        if self.is_root() {
            return None;
        }
        let slash = self.0.iter().rposition(|byte| *byte == b'/');
        Some(match slash {
            Some(at) => (CleanPath(self.0.get(..at)?.to_vec()), self.0.get(at + 1..)?),
            None => (CleanPath::default(), &self.0),
        })
    }

    /// All directories on the way to it, from the top, then itself.
    pub fn prefixes(&self) -> impl Iterator<Item = CleanPath> + '_ {
        let ends = self.0.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
        let whole = (!self.is_root()).then_some(self.0.len());
        ends.chain(whole).map(|end| CleanPath(self.0.get(..end).unwrap_or_default().to_vec()))
    }
}

impl fmt::Display for CleanPath {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = if self.is_root() { b"/" } else { self.bytes() };
        formatter.write_str(&String::from_utf8_lossy(shown))
    }
}

impl fmt::Debug for CleanPath {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn clean(raw: &str) -> Option<String> {
        CleanPath::new(raw.as_bytes()).ok().map(|path| String::from_utf8(path.0).unwrap())
    }

    #[test]
    fn paths_are_below_the_root() {
        for (raw, path) in [
            ("./a/b", "a/b"),
            ("/a//b/", "a/b"),
            (".", ""),
            ("", ""),
            ("a/../b", "b"),
            ("a/./b", "a/b"),
            ("/", ""),
        ] {
            assert_eq!(clean(raw).as_deref(), Some(path), "{raw}");
        }
    }

    #[test]
    fn paths_that_leave_the_root_are_refused() {
        for raw in ["..", "a/../..", "../a", "/..", "a\0b"] {
            assert_eq!(clean(raw), None, "{raw}");
        }
    }

    #[test]
    fn a_link_cannot_lead_above_the_root() {
        for (raw, path) in
            [("/var/../../run", "run"), ("../a", "a"), ("a//./b/..", "a"), ("/", ""), ("./..", "")]
        {
            assert_eq!(
                CleanPath::of_link(raw.as_bytes()).unwrap().to_string().trim_matches('/'),
                path,
                "{raw}"
            );
        }
    }

    #[test]
    fn names_beyond_linuxs_bounds_are_refused() {
        assert!(clean(&"a".repeat(255)).is_some());
        assert!(clean(&"a".repeat(256)).is_none());
        assert!(clean(&"a/".repeat(2048)).is_some());
        assert!(clean(&"a/".repeat(2049)).is_none());
    }

    #[test]
    fn a_path_knows_its_directories() {
        let path = CleanPath::new(b"a/b/c").unwrap();
        let (parent, name) = path.split().unwrap();
        assert_eq!((parent.bytes(), name), (&b"a/b"[..], &b"c"[..]));
        let prefixes: Vec<String> = path.prefixes().map(|prefix| prefix.to_string()).collect();
        assert_eq!(prefixes, ["a", "a/b", "a/b/c"]);
        assert_eq!(CleanPath::default().prefixes().count(), 0);
        assert!(CleanPath::default().split().is_none());
    }

    proptest! {
        #[test]
        fn no_path_keeps_a_component_that_could_leave(raw in "[./ab]{0,40}") {
            if let Ok(path) = CleanPath::new(raw.as_bytes()) {
                let is_harmless = |part: &[u8]| !matches!(part, b"" | b"." | b"..");
                prop_assert!(path.is_root() || path.bytes().split(|byte| *byte == b'/').all(is_harmless));
            }
        }
    }
}
