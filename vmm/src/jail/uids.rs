//! Which machine has which user id.
//!
//! The claims are locks on single bytes of one file, at the number's offset, of open file descriptions (fcntl(2)): there is nothing
//! to be cleaned up, and a number is free when the last process that holds it has ended, monitor or `flyrun-vmm`. All flyruns of a
//! host use the same file, as they share its numbers.

use std::{
    fmt,
    fs::File,
    io,
    os::{
        fd::{AsRawFd, IntoRawFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
    str::FromStr,
};

/// The file of claims.
pub const CLAIMS: &str = "/run/flyrun-uids";

/// Numbers that no distribution gives to users, and systemd to none of its containers or services.
const FIRST: u32 = 2_000_000_000;
const COUNT: u32 = 1 << 16;

/// The numbers that machines may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    first: u32,
    last: u32,
}

impl Default for Range {
    fn default() -> Self {
        Self { first: FIRST, last: FIRST + (COUNT - 1) }
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl FromStr for Range {
    type Err = String;

    /// `FIRST-LAST`; neither is root's, nor the number that means none.
    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('-').and_then(|(first, last)| {
            let range = Self { first: first.trim().parse().ok()?, last: last.trim().parse().ok()? };
            (0 < range.first && range.first <= range.last && range.last < u32::MAX).then_some(range)
        });
        parsed.ok_or_else(|| format!("{text:?} is not a range of user ids such as {}", Self::default()))
    }
}

impl Range {
    /// All numbers, beginning with the one that the name has if nobody else has it: most often the same each time.
    fn beginning_with(self, name: &str) -> impl Iterator<Item = u32> {
        let count = u64::from(self.last - self.first) + 1;
        // FNV-1a.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        (0..count).filter_map(move |index| {
            let offset = (hash % count + index) % count;
            Some(self.first + u32::try_from(offset).ok()?)
        })
    }
}

/// A number that a machine has, as long as this lives.
#[derive(Debug)]
pub struct Claim {
    uid: u32,
    _lock: File,
}

impl Claim {
    /// Takes a number that no machine has.
    ///
    /// # Errors
    /// All are taken, or the host refuses.
    pub fn take(range: Range, name: &str) -> io::Result<Self> {
        Self::take_in(Path::new(CLAIMS), range, name)
    }

    fn take_in(file: &Path, range: Range, name: &str) -> io::Result<Self> {
        let file = open(file)?;
        for uid in range.beginning_with(name) {
            // Then shared with the machine's process, at once: no lock is let go of in between.
            if lock(&file, uid, libc::F_WRLCK)? && lock(&file, uid, libc::F_RDLCK)? {
                return Ok(Self { uid, _lock: file });
            }
        }
        Err(io::Error::other(format!("all user ids of {range} are taken; FLYRUN_UIDS gives more")))
    }

    /// The number.
    pub fn uid(&self) -> u32 {
        self.uid
    }
}

/// Holds the number that the monitor has taken, until this process ends.
pub(super) fn hold(uid: u32) -> io::Result<()> {
    let file = open(Path::new(CLAIMS))?;
    match lock(&file, uid, libc::F_RDLCK)? {
        true => {
            // Open for good.
            let _ = file.into_raw_fd();
            Ok(())
        }
        false => Err(io::Error::other(format!("{uid} is being given to another machine"))),
    }
}

fn open(path: &Path) -> io::Result<File> {
    let flags = libc::O_NOFOLLOW;
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(flags)
        .open(path)
}

/// Whether the byte could be locked.
fn lock(file: &File, uid: u32, kind: libc::c_int) -> io::Result<bool> {
    // SAFETY: `flock` is a plain C struct for which all zeros is valid.
    let mut wanted = unsafe { std::mem::zeroed::<libc::flock>() };
    wanted.l_type = kind as libc::c_short;
    wanted.l_whence = libc::SEEK_SET as libc::c_short;
    wanted.l_start = libc::off_t::from(uid);
    wanted.l_len = 1;
    // SAFETY: F_OFD_SETLK reads one `flock`.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const wanted) } == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        error if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        error => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_range_has_a_first_and_a_last_that_are_nobodys_else() {
        assert_eq!("100000-165535".parse(), Ok(Range { first: 100_000, last: 165_535 }));
        assert_eq!(Range::default().to_string().parse(), Ok(Range::default()));
        for bad in ["", "7", "0-9", "9-8", "1-4294967295", "1-x", "-1-5"] {
            assert!(bad.parse::<Range>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_number_is_one_machines_until_it_ends() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("uids");
        let range = "7-9".parse().unwrap();
        let take = |name| Claim::take_in(&file, range, name);
        let claims = ["a", "a", "b"].map(|name| take(name).unwrap());
        let mut taken = claims.each_ref().map(Claim::uid);
        taken.sort_unstable();
        assert_eq!(taken, [7, 8, 9]);
        assert!(take("c").unwrap_err().to_string().contains("7-9"));
        // As the machine's own process does.
        let held = open(&file).unwrap();
        let [first, ..] = claims;
        assert!(lock(&held, first.uid(), libc::F_RDLCK).unwrap());
        let uid = first.uid();
        drop(first);
        assert!(take("a").is_err());
        drop(held);
        assert_eq!(take("a").unwrap().uid(), uid);
    }

    proptest! {
        #[test]
        fn every_number_is_tried_once(name in ".*", first in 1u32..u32::MAX - 200, count in 0u32..200) {
            let range = Range { first, last: first + count };
            let mut tried: Vec<u32> = range.beginning_with(&name).collect();
            tried.sort_unstable();
            prop_assert!(tried.into_iter().eq(first..=first + count));
        }
    }
}
